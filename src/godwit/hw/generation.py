"""The generation of a guest: a random number that a copy of the guest finds changed.

Microsoft's 'Virtual Machine Generation ID' (go.microsoft.com/fwlink/?LinkId=260709): 16 bytes in
the guest's memory whose address ACPI names, and a notification. Linux seeds its random numbers anew
(drivers/virt/vmgenid.c, since 5.18).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from . import acpi
from .capabilities import Renews
from .device import Device
from .memory import GuestMemory

SIZE = 16


class GenerationState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state, which is in the guest's memory alone."""


class Generation(Device, Renews):
    """The number, and the event that reports a new one by ``raise_event(number)``."""

    kind = "vmgenid"
    State = GenerationState

    def __init__(self, memory: GuestMemory, raise_event: Callable[[int], None]) -> None:
        self.id = "generation0"
        self._memory = memory
        self._raise_event = raise_event

    def renew(self) -> None:
        """Give the guest a new number, and have it look."""
        self._memory.write(acpi.GENERATION, os.urandom(SIZE))
        self._raise_event(acpi.GENERATION_EVENT)

    def reset(self) -> None:
        """Do nothing: a boot writes a number beside the tables that name its place."""

    def save(self) -> GenerationState:
        """Return the (empty) saved state."""
        return GenerationState()

    def load(self, state: GenerationState) -> None:
        """Take over a saved state, which is empty."""
