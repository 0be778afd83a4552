"""pvpanic: a port by which a guest reports that it panicked (QEMU's docs/specs/pvpanic.rst).

Linux finds the device by ACPI, as QEMU0001 (drivers/misc/pvpanic/pvpanic-mmio.c).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .device import Device

PANICKED, CRASH_LOADED = 1, 2
_EVENTS = PANICKED | CRASH_LOADED


class PanicState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of the port, which keeps nothing."""


class Pvpanic(Device):
    """The port, which calls ``on_panic(crash_loaded)`` in the vCPU's thread.

    ``crash_loaded``: the guest goes on by itself, in a kernel that saves a dump.
    """

    kind = "pvpanic"
    State = PanicState

    def __init__(self, on_panic: Callable[[bool], None]) -> None:
        self.id = "panic0"
        self._on_panic = on_panic

    def read(self, offset: int, size: int) -> int:
        """Return the events that may be reported."""
        return _EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a guest's report, of which the other bits have no meaning."""
        if value & PANICKED:
            self._on_panic(False)
        elif value & CRASH_LOADED:
            self._on_panic(True)

    def reset(self) -> None:
        """Do nothing, as nothing is kept."""

    def save(self) -> PanicState:
        """Return the (empty) saved state."""
        return PanicState()

    def load(self, state: PanicState) -> None:
        """Take over a saved state, which is empty."""
