"""Which pages of guest RAM exist at all: asked for, or else read from the kernel's page map.

Source: Documentation/admin-guide/mm/pagemap.rst. The ioctl PAGEMAP_SCAN (Linux 6.7) answers with
ranges, where the map has 8 bytes for each page.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from godwit.errors import HostError
from godwit.host.ioctl import address_of, ioctl_out, iowr
from godwit.hw.memory import PAGE, Region
from godwit.migration.wire.messages import Run

from .page_runs import add, spans

# include/uapi/linux/fs.h
_SCAN_ARG = struct.Struct("12Q")
_PAGEMAP_SCAN = iowr(ord("f"), 16, _SCAN_ARG.size)
_PRESENT = 1 << 3
_SWAPPED = 1 << 4
_RANGE = struct.Struct("3Q")
#: Ranges asked for at once. With more than the kernel's own buffer holds, those of a 2 MB walk,
#: walk_end may lie before ranges that were told already (seen with 1,024 on Linux 6.18).
_RANGES = 512
_ENTRY = 8
#: Bit 63: present, bit 62: swapped; top byte of eight.
_POPULATED = bytes(49 if byte & 0xC0 else 48 for byte in range(256))


def populated(region: Region) -> list[Run]:
    """The region's pages that are in memory or in swap; all others are zeros.

    Raises:
        HostError, OSError: the kernel does not tell.
    """
    runs: list[Run] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        try:
            for run in _asked_for(pagemap.fileno(), region):
                add(runs, *run)
        except OSError:  # an older kernel, ENOTTY; or a sandbox that knows its ioctls
            runs = list(_read(pagemap.fileno(), region))
    return runs


def _asked_for(fd: int, region: Region) -> Iterator[Run]:
    ranges = bytearray(_RANGES * _RANGE.size)
    at = told = region.host
    end = region.host + region.size
    either = _PRESENT | _SWAPPED
    while at < end:
        # size, flags, start, end, walk_end, vec, vec_len, max_pages, then of categories:
        # inverted, all of, any of, told
        argument = bytearray(
            _SCAN_ARG.pack(
                *(_SCAN_ARG.size, 0, at, end, 0, address_of(ranges), _RANGES, 0),
                *(0, 0, either, either),
            )
        )
        count = ioctl_out(fd, _PAGEMAP_SCAN, argument)
        for first, stop, _ in _RANGE.iter_unpack(ranges[: count * _RANGE.size]):
            if stop > told:  # never twice, whatever the kernel's buffer
                first = max(first, told)
                yield region.start + first - region.host, (stop - first) // PAGE
                told = stop
        walked = max(_SCAN_ARG.unpack(argument)[4], told)
        if walked <= at:
            raise HostError("the kernel's scan of the guest's pages does not get on")
        at = walked


def _read(fd: int, region: Region) -> Iterator[Run]:
    count = region.size // PAGE * _ENTRY
    offset = region.host // PAGE * _ENTRY
    entries = bytearray()
    while len(entries) < count:
        got = os.pread(fd, count - len(entries), offset + len(entries))
        if not got:
            raise HostError("/proc/self/pagemap ends before the guest's RAM does")
        entries += got
    for first, pages in spans(entries[7::8].translate(_POPULATED).decode("ascii")):
        yield region.start + first * PAGE, pages
