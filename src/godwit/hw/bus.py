"""Port I/O and MMIO: which device answers at an address."""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol


class BusDevice(Protocol):
    """A device's registers; ``offset`` is relative to where it was mapped."""

    def read(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes (1, 2, 4 or 8) at ``offset``."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value``."""


class PortBus:
    """65,536 ports; nobody there reads as all ones, as on a PC."""

    def __init__(self) -> None:
        self._ports: dict[int, tuple[int, BusDevice]] = {}

    def map(self, first: int, count: int, device: BusDevice) -> None:
        """``device`` answers ports ``first`` to ``first + count - 1``."""
        for port in range(first, first + count):
            self._ports[port] = (first, device)

    def claim(self, first: int, count: int, device: BusDevice) -> bool:
        """As :meth:`map`, for ports that the guest chose: False when one of them is taken."""
        if first + count > 1 << 16 or any(p in self._ports for p in range(first, first + count)):
            return False
        self.map(first, count, device)
        return True

    def unmap(self, first: int, count: int) -> None:
        """Nobody answers there any more."""
        for port in range(first, first + count):
            self._ports.pop(port, None)

    def read(self, port: int, size: int) -> int:
        """What an ``in`` gives."""
        found = self._ports.get(port)
        if found is None:
            return (1 << 8 * size) - 1
        return found[1].read(port - found[0], size)

    def write(self, port: int, size: int, value: int) -> None:
        """What an ``out`` does."""
        found = self._ports.get(port)
        if found is not None:
            found[1].write(port - found[0], size, value)


class MmioBus:
    """Device windows in guest physical memory; the newest mapping of an address wins nothing:
    an overlap is refused, and the guest's accesses go to who was there first."""

    def __init__(self) -> None:
        # One object, replaced by one store: a vCPU that looks up while another moves a BAR must
        # find the windows that did not move.
        self._table: tuple[list[int], list[tuple[int, int, BusDevice]]] = ([], [])

    def map(self, start: int, size: int, device: BusDevice) -> bool:
        """Map a window; False when it overlaps another, and then nothing is mapped."""
        if any(s < start + size and start < e for s, e, _ in self._table[1]):
            return False
        self._set([*self._table[1], (start, start + size, device)])
        return True

    def unmap(self, device: BusDevice) -> None:
        """Take all windows of ``device`` away."""
        self._set([w for w in self._table[1] if w[2] is not device])

    def _set(self, windows: list[tuple[int, int, BusDevice]]) -> None:
        windows.sort(key=lambda w: w[0])
        self._table = ([w[0] for w in windows], windows)

    def _find(self, address: int) -> tuple[int, BusDevice] | None:
        starts, windows = self._table
        index = bisect_right(starts, address) - 1
        if index >= 0:
            start, end, device = windows[index]
            if start <= address < end:
                return address - start, device
        return None

    def read(self, address: int, size: int) -> int:
        """What a load gives; all ones where nobody is."""
        found = self._find(address)
        if found is None:
            return (1 << 8 * size) - 1
        return found[1].read(found[0], size)

    def write(self, address: int, size: int, value: int) -> None:
        """What a store does; nothing where nobody is."""
        found = self._find(address)
        if found is not None:
            found[1].write(found[0], size, value)
