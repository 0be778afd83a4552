"""Port I/O and MMIO: the devices by their addresses."""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol


class BusDevice(Protocol):
    """The registers of a device, at offsets from the address where the device was mapped."""

    def read(self, offset: int, size: int) -> int:
        """Return the value of ``size`` bytes (1, 2, 4 or 8) at ``offset``."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``size`` bytes of ``value`` at ``offset``."""


class PortBus:
    """The 65,536 ports, of which free ones read as all ones, as on a PC."""

    def __init__(self) -> None:
        self._ports: dict[int, tuple[int, BusDevice]] = {}

    def map(self, first: int, count: int, device: BusDevice) -> None:
        """Map ports ``first`` to ``first + count - 1`` to ``device``."""
        for port in range(first, first + count):
            self._ports[port] = (first, device)

    def claim(self, first: int, count: int, device: BusDevice) -> bool:
        """Map ports the guest chose, or return False when one of them is taken."""
        if first + count > 1 << 16 or any(p in self._ports for p in range(first, first + count)):
            return False
        self.map(first, count, device)
        return True

    def unmap(self, first: int, count: int) -> None:
        """Free ports ``first`` to ``first + count - 1``."""
        for port in range(first, first + count):
            self._ports.pop(port, None)

    def read(self, port: int, size: int) -> int:
        """Return the value for an ``in`` of ``size`` bytes."""
        found = self._ports.get(port)
        if found is None:
            return (1 << 8 * size) - 1
        return found[1].read(port - found[0], size)

    def write(self, port: int, size: int, value: int) -> None:
        """Do an ``out`` of ``size`` bytes."""
        found = self._ports.get(port)
        if found is not None:
            found[1].write(port - found[0], size, value)


class MmioBus:
    """The address ranges of devices in guest physical memory.

    An overlap is refused: the guest's accesses go to the device that was mapped first.
    """

    def __init__(self) -> None:
        # One object, replaced by one store: a vCPU that looks up while another moves a BAR must
        # find the ranges that stayed.
        self._table: tuple[list[int], list[tuple[int, int, BusDevice]]] = ([], [])

    def map(self, start: int, size: int, device: BusDevice) -> bool:
        """Map an address range, or return False, with nothing mapped, when another overlaps."""
        if any(s < start + size and start < e for s, e, _ in self._table[1]):
            return False
        self._set([*self._table[1], (start, start + size, device)])
        return True

    def unmap(self, device: BusDevice) -> None:
        """Take all address ranges of ``device`` away."""
        self._set([r for r in self._table[1] if r[2] is not device])

    def _set(self, ranges: list[tuple[int, int, BusDevice]]) -> None:
        ranges.sort(key=lambda r: r[0])
        self._table = ([r[0] for r in ranges], ranges)

    def _find(self, address: int) -> tuple[int, BusDevice] | None:
        starts, ranges = self._table
        index = bisect_right(starts, address) - 1
        if index >= 0:
            start, end, device = ranges[index]
            if start <= address < end:
                return address - start, device
        return None

    def read(self, address: int, size: int) -> int:
        """Return the value for a load of ``size`` bytes, all ones at a free address."""
        found = self._find(address)
        if found is None:
            return (1 << 8 * size) - 1
        return found[1].read(found[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        """Do a store of ``size`` bytes, which has no effect at a free address."""
        found = self._find(address)
        if found is not None:
            found[1].write(found[0], size, value)
