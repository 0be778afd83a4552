"""A 16550A UART (National Semiconductor PC16550D data sheet, register summary in table II).

Input waits on the line until a driver takes it: a byte reaches the receiver's FIFO only while the
driver has receive interrupts on (IER) and, once it has raised RTS, keeps RTS up (MCR). So what is
typed before the driver opens the port outlives the driver's clearing of the FIFO. A driver that has
never turned on an interrupt polls, and gets its input without.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec

from godwit.spec.saved import U8

from .device import Device

PORT = 0x3F8
GSI = 4

_IER_RX, _IER_THR = 1, 2
_MCR_RTS = 2
_IIR_NONE, _IIR_THR, _IIR_RX = 1, 2, 4
_LCR_DLAB = 0x80
_MCR_LOOP = 0x10
_LSR_DATA, _LSR_THRE, _LSR_IDLE = 1, 0x20, 0x40
_MSR_CTS, _MSR_DSR, _MSR_DCD = 0x10, 0x20, 0x80
#: Bytes of the receiver's FIFO, and bytes on the line before it.
_FIFO, _RX_LIMIT = 16, 1 << 16


class Sink(Protocol):
    """A receiver of the transmitted bytes."""

    def has_space(self) -> bool:
        """Return whether a byte may be written now."""

    def write(self, data: bytes) -> None:
        """Take ``data`` to be sent, without blocking."""


def _at_once(callback: Callable[[], None]) -> None:
    callback()


class SerialState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The UART's registers and the input the guest has not read."""

    ier: U8
    fcr: U8
    lcr: U8
    mcr: U8
    scr: U8
    dll: U8
    dlm: U8
    thr_pending: bool
    received: Annotated[bytes, msgspec.Meta(max_length=_RX_LIMIT)]


class Serial(Device):
    """The UART, whose interrupt line ``set_irq(level)`` drives.

    ``later(callback)`` calls back after the time that a FIFO full of bytes takes on the line: a
    FIFO that was full again at once would leave a vCPU no time but for its interrupt.
    """

    kind = "serial"
    State = SerialState

    def __init__(
        self,
        sink: Sink,
        set_irq: Callable[[bool], None],
        id: str = "serial0",
        later: Callable[[Callable[[], None]], object] = _at_once,
    ) -> None:
        self.id = id
        self._sink = sink
        self._set_irq = set_irq
        self._later = later
        self._lock = threading.RLock()  # ``later`` may call at once
        self._rx: deque[int] = deque()
        self._line: deque[int] = deque()  # what outlives a reset: nobody took it
        self._full = False
        #: Called from any thread when the line has room again after it was full.
        self.on_room: Callable[[], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Set the registers as after power-on."""
        self._ier = self._fcr = self._lcr = self._scr = self._dlm = 0
        self._mcr = 0x08
        self._dll = 12
        self._thr_pending = False
        self._level = self._stale = False
        self._refilling = False
        self._interrupts_known = self._rts_known = False
        self._rx.clear()

    def resume(self) -> None:
        """Interrupt for input that came with a saved state: the line's level may be older."""
        with self._lock:
            if self._stale:
                self._stale = False
                self._level = False
            self._refill()

    def pause(self) -> None:
        """Fill the FIFO, for a state whose input and interrupt line agree."""
        with self._lock:
            self._refill()

    def receive(self, data: bytes) -> int:
        """Take bytes from the outside, and return how many of them had space."""
        with self._lock:
            taken = data[: max(0, _RX_LIMIT - len(self._rx) - len(self._line))]
            self._full = len(taken) < len(data)
            self._line.extend(taken)
            if not self._refilling:
                self._refill()
        return len(taken)

    def _refill(self) -> None:
        """Move what the driver is ready for from the line to the FIFO."""
        self._refilling = False
        if self._wanted():
            while self._line and len(self._rx) < _FIFO:
                self._rx.append(self._line.popleft())
        self._update()
        if self._full and len(self._line) < _RX_LIMIT // 2 and self.on_room is not None:
            self._full = False
            self.on_room()

    def _wanted(self) -> bool:
        if self._mcr & _MCR_LOOP:
            return False  # the receiver hears the transmitter, and not the line
        polls = not self._interrupts_known
        held = self._rts_known and not self._mcr & _MCR_RTS
        return bool(self._ier & _IER_RX or polls) and not held

    def _refill_later(self) -> None:
        if self._line and not self._rx and not self._refilling and self._wanted():
            self._refilling = True
            self._later(self._refill_now)

    def _refill_now(self) -> None:
        with self._lock:
            if self._refilling:
                self._refill()

    def space_again(self) -> None:
        """Interrupt a guest that waits for the transmitter: the sink takes bytes again."""
        with self._lock:
            if self._ier & _IER_THR:
                self._thr_pending = True
            self._update()

    def read(self, offset: int, size: int) -> int:
        """Return the register at ``offset``, of which every one is a byte."""
        with self._lock:
            if offset == 0:
                if self._lcr & _LCR_DLAB:
                    return self._dll
                value = self._rx.popleft() if self._rx else 0
                self._update()
                self._refill_later()
                return value
            if offset == 1:
                return self._dlm if self._lcr & _LCR_DLAB else self._ier
            if offset == 2:
                cause = self._cause()
                if cause == _IIR_THR:
                    self._thr_pending = False
                    self._update()
                return cause | (0xC0 if self._fcr & 1 else 0)
            if offset == 3:
                return self._lcr
            if offset == 4:
                return self._mcr
            if offset == 5:
                ready = _LSR_THRE | _LSR_IDLE if self._sink.has_space() else 0
                return ready | (_LSR_DATA if self._rx else 0)
            if offset == 6:
                if self._mcr & _MCR_LOOP:
                    mcr = self._mcr
                    # RTS->CTS, DTR->DSR, OUT1->RI, OUT2->DCD in loopback.
                    return (
                        (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
                    ) & 0xF0
                return _MSR_CTS | _MSR_DSR | _MSR_DCD
            return self._scr

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the register at ``offset``, of which every one is a byte."""
        value &= 0xFF
        with self._lock:
            if offset == 0:
                if self._lcr & _LCR_DLAB:
                    self._dll = value
                    return
                if self._mcr & _MCR_LOOP:
                    if len(self._rx) < _FIFO and len(self._rx) + len(self._line) < _RX_LIMIT:
                        self._rx.append(value)
                else:
                    self._sink.write(bytes((value,)))
                # The byte is gone at once: the register is empty again, unless the sink is full.
                self._thr_pending = self._sink.has_space()
            elif offset == 1:
                if self._lcr & _LCR_DLAB:
                    self._dlm = value
                    return
                rising = value & ~self._ier & _IER_THR
                self._ier = value & 0x0F
                if self._ier:
                    self._interrupts_known = True
                if rising and self._sink.has_space():
                    self._thr_pending = True
            elif offset == 2:
                self._fcr = value & 0xC9
                if value & 2:
                    if not self._ier & _IER_RX:  # nobody asked for them yet
                        room = _RX_LIMIT - len(self._line)  # a driver that loops has more
                        self._line.extendleft(reversed([*self._rx][:room]))
                    self._rx.clear()
            elif offset == 3:
                self._lcr = value
            elif offset == 4:
                self._mcr = value & 0x1F
                if value & _MCR_RTS and not value & _MCR_LOOP:
                    self._rts_known = True
            elif offset == 7:
                self._scr = value
            self._update()
            self._refill_later()

    def save(self) -> SerialState:
        """Return the state of a stopped VM's UART."""
        with self._lock:
            return SerialState(
                ier=self._ier,
                fcr=self._fcr,
                lcr=self._lcr,
                mcr=self._mcr,
                scr=self._scr,
                dll=self._dll,
                dlm=self._dlm,
                thr_pending=self._thr_pending,
                received=bytes((*self._rx, *self._line)),
            )

    def load(self, state: SerialState) -> None:
        """Take over a saved state. The line's level lives in the saved interrupt controllers."""
        with self._lock:
            self._ier, self._fcr, self._lcr = state.ier, state.fcr, state.lcr
            self._mcr, self._scr = state.mcr, state.scr
            self._dll, self._dlm = state.dll, state.dlm
            self._thr_pending = state.thr_pending
            self._interrupts_known = bool(self._ier)
            self._rts_known = bool(self._mcr & _MCR_RTS)
            self._line = deque(state.received)
            self._rx = deque()
            if self._ier & _IER_RX:
                self._rx.extend(self._line.popleft() for _ in range(min(_FIFO, len(self._line))))
            self._level = self._cause() != _IIR_NONE
            self._stale = True

    def _cause(self) -> int:
        if self._ier & _IER_RX and self._rx:
            return _IIR_RX
        if self._ier & _IER_THR and self._thr_pending:
            return _IIR_THR
        return _IIR_NONE

    def _update(self) -> None:
        level = self._cause() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._set_irq(level)
