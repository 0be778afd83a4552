"""Interrupts: INTx lines, the MSI routing table, and a device's MSI-X vectors as irqfds.

PCI Local Bus 3.0, 6.8.2 'MSI-X Capability & Table Structures'. Every vector has an eventfd for the
device's life; only the irqfd comes and goes with the mask, so what is signalled while masked waits
in the eventfd, and polling the eventfd is the pending bit.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Annotated

import msgspec

from godwit.host import eventfd
from godwit.host.kvm.handles import Vm

from .layout import INTX_GSIS, intx_gsi

_FIRST_GSI = 24
_ENTRY = 16
_MASKED = 1


class IntxLines:
    """INTA of every slot, high while a device holds the pin up (PCI 3.0, 2.2.6)."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._high: dict[int, set[int]] = {gsi: set() for gsi in INTX_GSIS}
        self._lock = threading.Lock()

    def of(self, slot: int) -> Callable[[bool], None]:
        """Return a function that sets the level of the line of ``slot``."""
        gsi = intx_gsi(slot)

        def set_level(level: bool) -> None:
            with self._lock:
                holders = self._high[gsi]
                if level:
                    holders.add(slot)
                else:
                    holders.discard(slot)
                self._vm.irq_line(gsi, bool(holders))

        return set_level


class Routes:
    """The VM's MSI routes, which KVM_SET_GSI_ROUTING replaces as a whole each time."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._routes: dict[int, tuple[int, int]] = {}
        self._next = _FIRST_GSI
        self._held = self._changed = False
        # Devices have a lock each, and vCPUs unmask vectors of two at once: a table made before the
        # other's route was known must not reach the kernel after it.
        self._lock = threading.Lock()

    def allocate(self) -> int:
        """Return a GSI for one vector."""
        self._next += 1
        return self._next - 1

    def set(self, gsi: int, address: int, data: int) -> None:
        """Have ``gsi`` send the message ``data`` to ``address``."""
        with self._lock:
            if self._routes.get(gsi) != (address, data):
                self._routes[gsi] = (address, data)
                self._changed = True
                self._commit()

    def hold(self) -> None:
        """Collect changes until :meth:`release`, as loading a state sets many at once."""
        self._held = True

    def release(self) -> None:
        """Hand the collected changes, if any, to the kernel in one call."""
        with self._lock:
            self._held = False
            self._commit()

    def _commit(self) -> None:
        if self._changed and not self._held:
            self._vm.set_routes((gsi, *route) for gsi, route in self._routes.items())
            self._changed = False  # what the kernel refused is tried again


class MsixState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table, the control bits, and the vectors that wait for their unmasking."""

    table: Annotated[bytes, msgspec.Meta(max_length=_ENTRY * 64)]
    enabled: bool
    masked: bool
    pending: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=64)]], msgspec.Meta(max_length=64)]


class Msix:
    """The vectors of one device, detached at first, and accessed under the device's lock."""

    def __init__(self, vm: Vm, routes: Routes, count: int) -> None:
        self._vm = vm
        self._routes = routes
        self.count = count
        self.fds = [eventfd.make() for _ in range(count)]
        self._gsis = [routes.allocate() for _ in range(count)]
        self._live = [False] * count
        self._table = bytearray()
        # A vector that is loaded as pending must not meet its irqfd before its route is known.
        self._attached = False
        self.reset()

    def reset(self) -> None:
        """Disable MSI-X and mask every vector, as after power-on."""
        self._table = bytearray((bytes(12) + _MASKED.to_bytes(4, "little")) * self.count)
        self._enabled = self._masked = False
        for fd in self.fds:
            eventfd.drain(fd)
        self._update()

    def signal(self, vector: int) -> None:
        """Raise ``vector``, which may be out of range for 'no vector'."""
        if 0 <= vector < self.count and self._enabled:
            os.eventfd_write(self.fds[vector], 1)

    def control(self) -> int:
        """Return message control, for configuration space."""
        return self.count - 1 | self._masked << 14 | self._enabled << 15

    def set_control(self, value: int) -> None:
        """Take the guest's write of message control."""
        self._masked = bool(value & 1 << 14)
        self._enabled = bool(value & 1 << 15)
        self._update()

    def read_table(self, offset: int, size: int) -> int:
        """Return what the guest reads in the table."""
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Take the guest's write of the table."""
        if offset + size <= len(self._table):
            self._table[offset : offset + size] = value.to_bytes(size, "little")
            if offset % _ENTRY + size > 12:  # vector control
                self._update(offset // _ENTRY)

    def read_pending(self, offset: int, size: int) -> int:
        """Return what the guest reads in the pending bit array."""
        bits = sum(1 << vector for vector in self._pending())
        return bits >> 8 * offset & (1 << 8 * size) - 1

    def detach(self) -> None:
        """Take the irqfds away and wait until what they carried has reached the APICs."""
        self._attached = False
        self._update()

    def attach(self) -> None:
        """Give the irqfds back to KVM."""
        self._attached = True
        self._update()

    @property
    def table(self) -> bytes:
        """The table as the guest wrote it."""
        return bytes(self._table)

    def prepare(self, table: bytes) -> None:
        """Prepare the routes of the table the arriving guest has."""
        for vector, gsi in enumerate(self._gsis):
            entry = table[vector * _ENTRY : (vector + 1) * _ENTRY]
            if len(entry) == _ENTRY and not entry[12] & _MASKED:
                address = int.from_bytes(entry[:8], "little")
                self._routes.set(gsi, address, int.from_bytes(entry[8:12], "little"))

    def save(self) -> MsixState:
        """Return the state of a paused device's vectors."""
        return MsixState(bytes(self._table), self._enabled, self._masked, self._pending())

    def load(self, state: MsixState) -> None:
        """Take over a saved state.

        Raises:
            ValueError: the state is not this device's.
        """
        if len(state.table) != len(self._table):
            raise ValueError(f"msix.table has {len(state.table)} bytes, not {len(self._table)}")
        if any(vector >= self.count for vector in state.pending):
            raise ValueError(f"msix.pending names a vector above {self.count - 1}")
        self._table[:] = state.table
        self._enabled, self._masked = state.enabled, state.masked
        for vector in state.pending:
            os.eventfd_write(self.fds[vector], 1)
        self._update()

    def close(self) -> None:
        """Give all of the descriptors back."""
        self.detach()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def _pending(self) -> list[int]:
        poll = select.poll()
        by_fd = {}
        for vector, fd in enumerate(self.fds):
            if not self._live[vector]:
                poll.register(fd, select.POLLIN)
                by_fd[fd] = vector
        return sorted(by_fd[fd] for fd, _ in poll.poll(0))

    def _update(self, only: int | None = None) -> None:
        on = self._enabled and not self._masked
        for vector in range(self.count) if only is None else (only,):
            at = vector * _ENTRY
            wanted = on and not self._table[at + 12] & _MASKED
            live = wanted and self._attached
            if wanted:
                address = int.from_bytes(self._table[at : at + 8], "little")
                data = int.from_bytes(self._table[at + 8 : at + 12], "little")
                self._routes.set(self._gsis[vector], address, data)
            if live != self._live[vector]:
                self._live[vector] = live
                self._vm.irqfd(self.fds[vector], self._gsis[vector], live)
