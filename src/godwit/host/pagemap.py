"""Which pages of a mapping exist at all: asked for, or else read from the kernel's page map.

Source: Documentation/admin-guide/mm/pagemap.rst. The ioctl PAGEMAP_SCAN (Linux 6.7) answers with
ranges, where the map has 8 bytes for each page. Of a memfd, which other processes populate as well,
only the file knows all: SEEK_DATA and SEEK_HOLE (lseek(2)).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

from godwit.errors import HostError

from . import sandbox
from .ioctl import address_of, ioctl_out, iowr

PAGE = 4096
#: (address or offset in bytes, pages).
Pages = tuple[int, int]

# include/uapi/linux/fs.h
_SCAN_ARG = struct.Struct("12Q")
_PAGEMAP_SCAN = iowr(ord("f"), 16, _SCAN_ARG.size)
_PRESENT = 1 << 3
_SWAPPED = 1 << 4
_RANGE = struct.Struct("3Q")
#: Ranges asked for at once. With more than the kernel's own buffer holds, those of a 2 MB walk,
#: walk_end may lie before ranges that were reported already (seen with 1,024 on Linux 6.18).
_RANGES = 512
_ENTRY = 8
#: Bit 63: present, bit 62: swapped; top byte of eight.
_POPULATED = bytes(49 if byte & 0xC0 else 48 for byte in range(256))


def populated(start: int, size: int) -> list[Pages]:
    """Return the pages of this process's mapping that are in memory or in swap, by address.

    All others of a private anonymous mapping are zeros.

    Raises:
        HostError, OSError: the kernel does not answer.
    """
    fd = _fd()
    try:
        try:
            return list(_scan(fd, start, size))
        except OSError:  # an older kernel, ENOTTY; or a sandbox that knows its ioctls
            return list(_read(fd, start, size))
    finally:
        if fd != sandbox.pagemap:
            os.close(fd)


def _fd() -> int:
    """Return a descriptor of the process's page map, to be closed unless kept."""
    if sandbox.pagemap is not None:
        return sandbox.pagemap
    return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def populated_file(fd: int, start: int, size: int) -> list[Pages]:
    """Return the pages of a memfd that any process has populated, by offset in the file.

    Raises:
        OSError: the file cannot be asked.
    """
    pages: list[Pages] = []
    at, end = start, start + size
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end
                break
            raise
        if at >= end:
            break
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        pages.append((at, -(-(hole - at) // PAGE)))
        at = hole
    return pages


def _scan(fd: int, start: int, size: int) -> Iterator[Pages]:
    ranges = bytearray(_RANGES * _RANGE.size)
    at = known = start
    end = start + size
    either = _PRESENT | _SWAPPED
    while at < end:
        # size, flags, start, end, walk_end, vec, vec_len, max_pages, then of categories:
        # inverted, all of, any of, returned
        argument = bytearray(
            _SCAN_ARG.pack(
                *(_SCAN_ARG.size, 0, at, end, 0, address_of(ranges), _RANGES, 0),
                *(0, 0, either, either),
            )
        )
        count = ioctl_out(fd, _PAGEMAP_SCAN, argument)
        for first, stop, _ in _RANGE.iter_unpack(ranges[: count * _RANGE.size]):
            if stop > known:  # never twice, whatever the kernel's buffer
                first = max(first, known)
                yield first, (stop - first) // PAGE
                known = stop
        walked = max(_SCAN_ARG.unpack(argument)[4], known)
        if walked <= at:
            raise HostError("the kernel's scan of the guest's pages does not get on")
        at = walked


def _read(fd: int, start: int, size: int) -> Iterator[Pages]:
    count = size // PAGE * _ENTRY
    offset = start // PAGE * _ENTRY
    entries = bytearray()
    while len(entries) < count:
        got = os.pread(fd, count - len(entries), offset + len(entries))
        if not got:
            raise HostError("/proc/self/pagemap ends before the guest's RAM does")
        entries += got
    for first, pages in spans(entries[7::8].translate(_POPULATED).decode("ascii")):
        yield start + first * PAGE, pages


def spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of ones in a text of zeros and ones.

    A search for a character is quick.
    """
    first = text.find("1")
    while first >= 0:
        end = text.find("0", first)
        if end < 0:
            end = len(text)
        yield first, end - first
        first = text.find("1", end)
