"""The pages to send: existing ones at first, later dirty ones, and which of them are zeros.

Three sources of dirt: KVM logs the guest's writes, devices with :class:`.LogsDirtyPages` (vhost)
log theirs, and guest memory notes the VMM's. All of these are bitmaps, a bit per page, and become
runs of pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from godwit.host.ioctl import address_of
from godwit.hw.capabilities import LogsDirtyPages
from godwit.hw.memory import PAGE, Region
from godwit.machine.machine import Machine
from godwit.migration.wire.messages import Run

from .page_runs import add, bitmap_runs

#: Pages of zeros come many together. Fewer than this are sent: to find them would cost more.
_MANY = 8
_QUIET = re.compile(rb"\0{%d,}" % _MANY)
#: Pages compared at once.
_CHUNK = 64
_ZERO = bytes(_CHUNK * PAGE)


class DirtyLog:
    """The dirty log of a machine, to be started before the first page is sent."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._on = False
        self._bitmaps = [
            bytearray(-(-region.size // PAGE // 64) * 8) for region in machine.memory.regions
        ]

    def start(self) -> None:
        """Log written pages from now on.

        All that was written before counts as the first round.
        """
        machine = self._machine
        machine.memory.start_log()
        for part in machine.devices.having(LogsDirtyPages):
            part.start_log()
        machine.set_dirty_log(True)
        self._on = True

    def stop(self) -> None:
        """Log no more pages, which is harmless if none are logged."""
        if self._on:
            self._on = False
            machine = self._machine
            machine.set_dirty_log(False)
            for part in machine.devices.having(LogsDirtyPages):
                part.stop_log()
            machine.memory.stop_log()

    def take(self) -> list[Run]:
        """Return the pages that got dirty since the last call."""
        machine = self._machine
        others = [part.take_log() for part in machine.devices.having(LogsDirtyPages)]
        own = machine.memory.take_log()
        runs: list[Run] = []
        for region, bitmap in zip(machine.memory.regions, self._bitmaps, strict=True):
            machine.vm.dirty_log(region.slot, address_of(bitmap))
            merged = _merge(region, bitmap, others, own)
            runs += bitmap_runs(merged, region.start)
        return runs


def _merge(
    region: Region, bitmap: bytearray, logs: Iterable[bytes], own: set[int]
) -> bytes | bytearray:
    first = region.start // PAGE // 8  # in bytes of a bitmap over all of guest memory
    for log in logs:
        part = log[first : first + len(bitmap)]
        if part.count(0) != len(part):
            both = int.from_bytes(bitmap, "little") | int.from_bytes(part, "little")
            bitmap[:] = both.to_bytes(len(bitmap), "little")
    start = region.start // PAGE
    for page in own:
        index = page - start
        if 0 <= index < region.size // PAGE:
            bitmap[index // 8] |= 1 << index % 8
    return bitmap


def split_zeros(machine: Machine, runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Return ``runs`` as (runs with something in them, runs of zeros only).

    The first byte of each page is gathered by one strided copy, and only where many together are
    zero are pages compared whole. Fewer count as data.
    """
    data: list[Run] = []
    zero: list[Run] = []
    for address, pages in runs:
        view = machine.memory.view(address, pages * PAGE)
        at = 0
        for quiet in _QUIET.finditer(view[::PAGE].tobytes()):
            for first, count in _empty(view, quiet.start(), quiet.end()):
                if first > at:
                    add(data, address + at * PAGE, first - at)
                add(zero, address + first * PAGE, count)
                at = first + count
        if at < pages:
            add(data, address + at * PAGE, pages - at)
    return data, zero


def _empty(view: memoryview, first: int, end: int) -> Iterator[Run]:
    """Yield (first, count) of the pages between ``first`` and ``end`` that are all zeros.

    ``startswith`` compares with memcmp and copies nothing; memcmp itself through ctypes costs tens
    of times more a call, and gives the GIL away each time.
    """
    for start in range(first, end, _CHUNK):
        todo = [(start, min(start + _CHUNK, end))]
        while todo:
            start, stop = todo.pop()
            if _ZERO.startswith(view[start * PAGE : stop * PAGE]):
                yield start, stop - start
            elif stop - start >= 2 * _MANY:
                half = (start + stop) // 2
                todo += [(half, stop), (start, half)]
