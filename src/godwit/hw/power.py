"""Power off, power button and general purpose events by ACPI's registers, and the reset ports.

The addresses of the registers, and the sources of all that is here, are in layout.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from godwit.spec.saved import U16

from .device import Device
from .layout import RESET_PORT, SLEEP_TYPE_S5

_STS_PWRBTN = 1 << 8
_CNT_SCI_EN = 1
_CNT_SLP_EN = 1 << 13


class PowerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The saved registers of PM1 and GPE0, of which older machines have no second."""

    status: U16
    enable: U16
    control: U16
    events: U16 = 0
    events_enabled: U16 = 0


class Pm1(Device):
    """PM1a event and control blocks and GPE0, twelve ports from :data:`.layout.PM1_EVENT`."""

    kind = "power"
    State = PowerState

    def __init__(self, set_sci: Callable[[bool], None], off: Callable[[], None]) -> None:
        self.id = "power0"
        self._set_sci = set_sci
        self._off = off
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Set the registers as after power-on, in ACPI mode (there is no SMI to ask for it)."""
        self._status = self._enable = self._events = self._events_enabled = 0
        self._control = _CNT_SCI_EN
        self._level = False

    def press(self) -> None:
        """Press the guest's power button."""
        with self._lock:
            self._status |= _STS_PWRBTN
            self._update()

    def raise_event(self, number: int) -> None:
        """Report a general purpose event of that number, up to 15."""
        with self._lock:
            self._events |= 1 << number
            self._update()

    def read(self, offset: int, size: int) -> int:
        """Read any width, as the registers lie side by side."""
        with self._lock:
            whole = self._status | self._enable << 16 | self._control << 32
            whole |= self._events << 64 | self._events_enabled << 80
        return whole >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear status bits by ones. SLP_EN with S5's type switches the VM off."""
        off = False
        with self._lock:
            for i in range(size):
                byte = value >> 8 * i & 0xFF
                at = offset + i
                shift = 8 * (at & 1)
                if at < 2:
                    self._status &= ~(byte << shift)
                elif at < 4:
                    self._enable = self._enable & ~(0xFF << shift) | byte << shift
                elif at < 6:
                    self._control = self._control & ~(0xFF << shift) | byte << shift
                elif 8 <= at < 10:
                    self._events &= ~(byte << shift)
                elif 10 <= at < 12:
                    self._events_enabled = self._events_enabled & ~(0xFF << shift) | byte << shift
            self._control |= _CNT_SCI_EN
            if self._control & _CNT_SLP_EN:
                off = self._control >> 10 & 7 == SLEEP_TYPE_S5
                self._control &= ~_CNT_SLP_EN
            self._update()
        if off:
            self._off()

    def save(self) -> PowerState:
        """Return the state of a stopped VM's registers."""
        return PowerState(
            self._status, self._enable, self._control, self._events, self._events_enabled
        )

    def load(self, state: PowerState) -> None:
        """Take over a saved state."""
        self._status, self._enable = state.status, state.enable
        self._control = state.control
        self._events, self._events_enabled = state.events, state.events_enabled
        self._level = self._asserted()

    def _asserted(self) -> bool:
        """Return whether the SCI is to be raised."""
        fixed = self._status & self._enable & _STS_PWRBTN
        return bool(fixed or self._events & self._events_enabled)

    def _update(self) -> None:
        level = self._asserted()
        if level != self._level:
            self._level = level
            self._set_sci(level)


class ResetPorts:
    """The reset control register, and the 8042's command port, which does nothing else."""

    def __init__(self, kind: int, reset: Callable[[], None]) -> None:
        self._kind = kind
        self._reset = reset

    def read(self, offset: int, size: int) -> int:
        """Return 0 from the reset register, all ones from the absent keyboard controller."""
        return 0 if self._kind == RESET_PORT else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on bit 2 to 0xCF9, or on 0xFE to the keyboard controller."""
        if self._kind == RESET_PORT:
            if value & 4:
                self._reset()
        elif value & 0xFF == 0xFE:
            self._reset()
