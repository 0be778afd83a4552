"""Which pages to send: what is populated at first, what got dirty since, and what is all zeros.

Three sources of dirt: KVM logs the guest's writes, vhost its own, and guest memory what the VMM
itself wrote. All of it is bitmaps, a bit per page, that become runs of pages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from ..errors import HostError
from ..hw.memory import PAGE, Region
from ..kvm.ioctl import address_of
from ..machine import Machine
from .codec import MAX_PAGES, Run

_PAGEMAP_ENTRY = 8
#: Bit 63: present, bit 62: swapped (Documentation/admin-guide/mm/pagemap.rst); top byte of eight.
_POPULATED = bytes(49 if byte & 0xC0 else 48 for byte in range(256))
#: Bytes of a bitmap that are looked at as one number: pieces without a bit cost next to nothing.
_BITMAP_PIECE = 4096
#: Pages of zeros come in hordes. Fewer together are sent: to find them would cost more.
_HORDE = 8
_QUIET = re.compile(rb"\0{%d,}" % _HORDE)
#: Pages compared at once.
_CHUNK = 64
_ZERO = bytes(_CHUNK * PAGE)


class DirtyLog:
    """The dirty log of a machine; :meth:`start` before the first page is sent."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._on = False
        self._bitmaps = [
            bytearray(-(-region.size // PAGE // 64) * 8) for region in machine.memory.regions
        ]

    def start(self) -> None:
        """Log from now on; all that was written before counts as the first pass."""
        machine = self._machine
        machine.memory.start_log()
        for nic in machine.nics:
            nic.start_log()
        machine.set_dirty_log(True)
        self._on = True

    def stop(self) -> None:
        """Log no more; harmless when it does not."""
        if self._on:
            self._on = False
            machine = self._machine
            machine.set_dirty_log(False)
            for nic in machine.nics:
                nic.stop_log()
            machine.memory.stop_log()

    def populated(self) -> list[Run]:
        """The pages that exist at all, from the kernel's page map."""
        runs: list[Run] = []
        for region in self._machine.memory.regions:
            runs += _populated(region)
        return runs

    def take(self) -> list[Run]:
        """The pages that got dirty since the last call."""
        machine = self._machine
        others = [nic.take_log() for nic in machine.nics]
        own = machine.memory.take_log()
        runs: list[Run] = []
        for region, bitmap in zip(machine.memory.regions, self._bitmaps, strict=True):
            machine.vm.dirty_log(region.slot, address_of(bitmap))
            merged = _merge(region, bitmap, others, own)
            runs += bitmap_runs(merged, region.start)
        return runs


def _merge(
    region: Region, bitmap: bytearray, logs: Iterable[bytes | None], own: set[int]
) -> bytes | bytearray:
    first = region.start // PAGE // 8  # in bytes of a bitmap over all of guest memory
    for log in logs:
        if log is not None:
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


def bitmap_runs(bitmap: bytes | bytearray, start: int) -> list[Run]:
    """Runs of set bits; bit 0 is the page at guest address ``start``."""
    runs: list[Run] = []
    for at in range(0, len(bitmap), _BITMAP_PIECE):
        bits = int.from_bytes(bitmap[at : at + _BITMAP_PIECE], "little")
        if bits:
            base = start + at * 8 * PAGE
            for first, pages in _spans(bin(bits)[:1:-1]):
                _add(runs, base + first * PAGE, pages)
    return runs


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """(first, count) of the ones in a text of zeros and ones: a search for a character is quick."""
    first = text.find("1")
    while first >= 0:
        end = text.find("0", first)
        if end < 0:
            end = len(text)
        yield first, end - first
        first = text.find("1", end)


def _populated(region: Region) -> Iterator[Run]:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        count = region.size // PAGE * _PAGEMAP_ENTRY
        offset = region.host // PAGE * _PAGEMAP_ENTRY
        entries = bytearray()
        while len(entries) < count:
            got = os.pread(pagemap.fileno(), count - len(entries), offset + len(entries))
            if not got:
                raise HostError("/proc/self/pagemap ends before the guest's RAM does")
            entries += got
    for first, pages in _spans(entries[7::8].translate(_POPULATED).decode("ascii")):
        yield region.start + first * PAGE, pages


def portions(runs: Iterable[Run], pages: int = MAX_PAGES) -> Iterator[list[Run]]:
    """``runs`` in groups of at most ``pages`` pages."""
    group: list[Run] = []
    room = pages
    for address, count in runs:
        while count:
            taken = min(count, room)
            group.append((address, taken))
            address += taken * PAGE
            count -= taken
            room -= taken
            if not room:
                yield group
                group, room = [], pages
    if group:
        yield group


def split_zeros(machine: Machine, runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """``runs`` as (those with something in them, those that are all zeros).

    The first byte of each page is gathered by one strided copy, and only where a horde of them is
    zero are pages compared whole. Smaller hordes count as data.
    """
    data: list[Run] = []
    zero: list[Run] = []
    for address, pages in runs:
        view = machine.memory.view(address, pages * PAGE)
        at = 0
        for quiet in _QUIET.finditer(view[::PAGE].tobytes()):
            for first, count in _empty(view, quiet.start(), quiet.end()):
                if first > at:
                    _add(data, address + at * PAGE, first - at)
                _add(zero, address + first * PAGE, count)
                at = first + count
        if at < pages:
            _add(data, address + at * PAGE, pages - at)
    return data, zero


def _empty(view: memoryview, first: int, end: int) -> Iterator[Run]:
    """(first, count) of hordes between the pages ``first`` and ``end`` that are all zeros.

    ``startswith`` compares with memcmp and copies nothing; memcmp itself through ctypes costs tens
    of times more a call, and gives the GIL away each time.
    """
    for start in range(first, end, _CHUNK):
        todo = [(start, min(start + _CHUNK, end))]
        while todo:
            start, stop = todo.pop()
            if _ZERO.startswith(view[start * PAGE : stop * PAGE]):
                yield start, stop - start
            elif stop - start >= 2 * _HORDE:
                half = (start + stop) // 2
                todo += [(half, stop), (start, half)]


def _add(runs: list[Run], address: int, pages: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] * PAGE == address:
        runs[-1] = runs[-1][0], runs[-1][1] + pages
    else:
        runs.append((address, pages))


def pages_in(runs: Iterable[Run]) -> int:
    """How many pages."""
    return sum(pages for _, pages in runs)
