"""The e1000 as a NIC of the machine: the controller, PCI and a tap together.

Registers are accessed by vCPUs, the tap is read by the event loop; one lock covers all of it. The
guest's frames are sent by the vCPU that announces them, up to a budget, and the rest by the loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

import msgspec

from godwit.errors import ConfigError, GuestError, StreamError
from godwit.host.net.tap import Tap
from godwit.hw.nic.nic import Parts
from godwit.hw.nic.rx_filter_info import FilterView
from godwit.hw.nic.tap_reader import TapReader
from godwit.hw.setup_hints import Foresight
from godwit.spec.config import NicConfig

from .mac import Mac, Wires
from .pci import E1000Pci
from .state import E1000State


def _check(config: NicConfig) -> None:
    """Refuse what only virtio-net has."""
    for key, given, remedy in (
        ("guest-announce=on", config.guest_announce is True, "the host announces it, by RARP"),
        ("mtu=", config.mtu is not None, "set the MTU in the guest"),
        ("queue-size=", config.queue_size is not None, "the guest's driver sizes its rings"),
    ):
        if given:
            raise ConfigError(
                f"--nic {config.id}: {key} needs model=virtio-net; leave it out here ({remedy})"
            )


class E1000:
    """See :class:`..model.Nic`.

    Raises:
        ConfigError: the configuration has what this model lacks.
    """

    model = "e1000"
    version = 1
    #: There is no negotiation: what a driver uses, it uses.
    offered = 0
    negotiated = 0

    def __init__(self, config: NicConfig, parts: Parts) -> None:
        _check(config)
        self.name = config.id
        #: Never told: the guest has no way to acknowledge.
        self.on_ack: Callable[[], None] = lambda: None
        #: Told of changes of the filter, once for as many as come before the loop's turn.
        self.on_filter: Callable[[], None] = lambda: None
        self._filter_changed = False
        self._loop = parts.loop
        self._lock = threading.RLock()
        self._paused = True
        self._transmit_due = False
        self._tap = Tap(config.tap)
        self.tap_fd = self._tap.fd
        wires = Wires(
            send=self._send,
            interrupt=lambda level: self.function.update_line(),
            receive=self._receive_changed,
            transmit=self._transmit,
            offend=lambda message: parts.on_offence(config.id, message),
            filter=self._tell_of_filter,
        )
        self._mac = Mac(parts.memory, config.mac, wires)
        self.function = E1000Pci(
            self._mac, self._lock, parts.bar, parts.port, parts.intx, self._dma_changed
        )
        self._reader = TapReader(self._tap, parts.loop, self._mac.accepts, self._deliver)

    # --- NicModel ---------------------------------------------------------------------------------
    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        with self._lock:
            return self._mac.filter.mac

    def announce(self) -> bool:
        """False: this controller has no way to ask its driver for it."""
        return False

    def send_from_host(self, frame: bytes) -> None:
        """As if the guest had sent it. Raises OSError."""
        self._tap.send(frame)

    def rx_filter(self) -> FilterView:
        """What the receive filter takes."""
        with self._lock:
            return self._mac.view_filter()

    def _tell_of_filter(self) -> None:
        def tell() -> None:
            self._filter_changed = False
            self.on_filter()

        if not self._filter_changed:
            self._filter_changed = True
            self._loop.call_soon(tell)

    # --- Nic --------------------------------------------------------------------------------------
    def foresight(self) -> None:
        """Nothing of it is slow to set up."""

    def foresee(self, negotiated: int, foresight: Foresight | None) -> None:
        """Nothing to have ready."""

    def pause(self) -> None:
        """Move no frames. The line keeps its level: what holds it up is saved."""
        with self._lock:
            self._paused = True
            self._reader.stop()

    def resume(self) -> None:
        """Move frames. KVM forgets a line's level on the way to another host: tell it again."""
        with self._lock:
            self._paused = False
            self.function.update_line(always=True)
            self._dma_changed()

    def reset(self) -> None:
        """Power-on."""
        with self._lock:
            self._mac.reset()
            self._reader.clear()
            self.function.reset_config()
            self.function.reset_io()
            self.function.update_line(always=True)

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._paused = True
            self._reader.stop()
            self._tap.close()

    def start_log(self) -> None:
        """Nothing to do: guest memory marks what this process writes."""

    def take_log(self) -> bytes | None:
        """None: guest memory has it."""
        return None

    def stop_log(self) -> None:
        """Nothing to do."""

    def drain(self) -> int:
        """Throw away what waits in the tap."""
        with self._lock:
            return self._reader.drain()

    def hold(self) -> None:
        """The tap has to wait."""
        with self._lock:
            self._reader.hold()

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """Before the tap's."""
        with self._lock:
            return self._reader.put_ahead(frames)

    def release(self) -> int:
        """The tap's turn."""
        with self._lock:
            return self._reader.release()

    def take(self, limit: int) -> list[bytes]:
        """What waits."""
        with self._lock:
            return self._reader.take(limit)

    def save(self) -> E1000State:
        """The state."""
        with self._lock:
            io_bar, io_address = self.function.save_io()
            return E1000State(
                pci=self.function.save_config(),
                io_bar=io_bar,
                io_address=io_address,
                mac=self._mac.save(),
            )

    def load(self, state: msgspec.Struct) -> None:
        """Take over a saved state. Raises StreamError."""
        if not isinstance(state, E1000State):
            raise StreamError(f"{self.name}: the state of another model")
        with self._lock:
            try:
                self._mac.load(state.mac)
            except StreamError as error:
                raise StreamError(f"{self.name}: {error}") from error
            self.function.load_io(state.io_bar, state.io_address)
            self.function.load_config(state.pci)

    # --- frames -----------------------------------------------------------------------------------
    def _works(self) -> bool:
        return not self._paused and self.function.may_dma

    def _dma_changed(self) -> None:
        self._receive_changed()
        self._transmit()

    def _receive_changed(self) -> None:
        """The receiver was turned on or off, or has more room."""
        if not self._works() or not self._mac.receiving:
            self._reader.stop()
            return
        self._reader.start(self._receive)
        if self._reader.holds:
            self._loop.call_soon(self._receive)  # its readiness is no event of the tap's

    def _receive(self) -> None:
        with self._lock:
            if not self._works() or not self._mac.receiving:
                return
            try:
                if self._reader.turn():
                    self._mac.received()
            except GuestError as error:
                self._mac.offend(str(error))

    def _deliver(self, frame: bytes) -> bool:
        return self._mac.receiver.deliver(frame)

    def _transmit(self) -> None:
        if self._works() and self._mac.transmit() and not self._transmit_due:
            self._transmit_due = True
            self._loop.call_soon(self._transmit_more)

    def _transmit_more(self) -> None:
        with self._lock:
            self._transmit_due = False
            self._transmit()

    def _send(self, frame: bytes) -> None:
        try:
            os.write(self._tap.fd, frame)
        except OSError:
            # The tap is down or its queue is full, or the offload makes no sense: a NIC drops the
            # frame, and so do we.
            pass
