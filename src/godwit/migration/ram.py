"""Which pages to send: what is populated at first, what got dirty since, and what is all zeros.

Three sources of dirt: KVM logs the guest's writes, vhost its own, and guest memory what the VMM
itself wrote. All of it is bitmaps, a bit per page, that become runs of pages.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator

from ..errors import HostError
from ..hw.memory import PAGE, Region
from ..kvm.ioctl import address_of
from ..machine import Machine
from .codec import Run

_PAGEMAP_ENTRY = 8
_BITS = [bytes(49 if byte >> bit & 1 else 48 for bit in range(8)) for byte in range(256)]
_ONES = re.compile(rb"1+")
_BUSY = re.compile(rb"[^\0]+")
_ZEROS = re.compile(rb"\0+")
#: Bit 63: present, bit 62: swapped (Documentation/admin-guide/mm/pagemap.rst); top byte of eight.
_POPULATED = bytes(49 if byte & 0xC0 else 48 for byte in range(256))
#: Where in a page a byte is looked at before the whole page is compared with zeros.
_SAMPLES = (0, 8, 64, 1032, 2048, 4088)
#: Pages in a run from which on looking for zeros pays.
_WORTH_A_LOOK = 16
_ZERO = bytes(2 << 20)
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]


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
    for busy in _BUSY.finditer(bitmap):
        text = b"".join([_BITS[byte] for byte in busy[0]])
        base = start + busy.start() * 8 * PAGE
        for ones in _ONES.finditer(text):
            address, pages = base + ones.start() * PAGE, ones.end() - ones.start()
            if runs and runs[-1][0] + runs[-1][1] * PAGE == address:
                runs[-1] = runs[-1][0], runs[-1][1] + pages
            else:
                runs.append((address, pages))
    return runs


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
    for ones in _ONES.finditer(bytes(entries[7::8]).translate(_POPULATED)):
        yield region.start + ones.start() * PAGE, ones.end() - ones.start()


def portions(runs: Iterable[Run], pages: int = 512) -> Iterator[list[Run]]:
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

    A few bytes of each page are gathered first, by one strided copy for each; only pages whose
    samples are all zero are compared whole. Short runs are not looked at: pages that the guest
    just wrote are seldom zeros, and looking costs more than sending.
    """
    data: list[Run] = []
    zero: list[Run] = []
    for address, pages in runs:
        if pages < _WORTH_A_LOOK:
            _add(data, address, pages)
            continue
        view = machine.memory.view(address, pages * PAGE)
        seen = 0
        for offset in _SAMPLES:
            seen |= int.from_bytes(view[offset::PAGE].tobytes(), "little")
        host = address_of(view)
        at = 0
        for quiet in _ZEROS.finditer(seen.to_bytes(pages, "little")):
            if quiet.start() > at:
                _add(data, address + at * PAGE, quiet.start() - at)
            at = quiet.end()
            for first, count, empty in _compare(host, quiet.start(), at - quiet.start()):
                _add(zero if empty else data, address + first * PAGE, count)
        if at < pages:
            _add(data, address + at * PAGE, pages - at)
    return data, zero


def _compare(host: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """(first, count, all zeros) of parts of a run: whole if it is all zeros, else by the page."""
    size = count * PAGE
    if size <= len(_ZERO) and not _memcmp(host + first * PAGE, _ZERO, size):
        yield first, count, True
        return
    for page in range(first, first + count):
        yield page, 1, not _memcmp(host + page * PAGE, _ZERO, PAGE)


def _add(runs: list[Run], address: int, pages: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] * PAGE == address:
        runs[-1] = runs[-1][0], runs[-1][1] + pages
    else:
        runs.append((address, pages))


def pages_in(runs: Iterable[Run]) -> int:
    """How many pages."""
    return sum(pages for _, pages in runs)
