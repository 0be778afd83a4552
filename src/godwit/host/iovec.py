"""Memory in pieces, as the kernel takes it for one read or write (struct iovec, readv(2))."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from struct import Struct, pack
from typing import NamedTuple

from .ioctl import address_of

#: struct iovec: address and bytes.
ENTRY = Struct("<QQ")

_libc = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.preadv2, _libc.pwritev2):
    _function.argtypes = [
        *(ctypes.c_int, ctypes.c_char_p, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_int),
    ]
    _function.restype = ctypes.c_ssize_t


class Vector(NamedTuple):
    """Pieces of this process's memory, which the caller keeps mapped: ``size`` bytes in all.

    Not a list of views: Python would make an object for each piece, some hundreds in one request.
    """

    #: An array of :data:`ENTRY`.
    iovecs: bytes
    size: int

    @classmethod
    def of(cls, parts: Sequence[bytearray | memoryview]) -> Vector:
        """Return the vector of writable buffers."""
        words = [word for part in parts if len(part) for word in (address_of(part), len(part))]
        return cls(pack(f"<{len(words)}Q", *words), sum(words[1::2]))

    def _pieces(self) -> Iterator[tuple[int, int]]:
        return ENTRY.iter_unpack(self.iovecs)

    def after(self, count: int) -> Vector:
        """Return the vector without its first ``count`` bytes."""
        left, size = bytearray(), self.size - count
        for address, length in self._pieces():
            taken = min(count, length)
            count -= taken
            if taken < length:
                left += ENTRY.pack(address + taken, length - taken)
        return Vector(bytes(left), size)

    def read(self) -> bytes:
        """Return a copy of the bytes."""
        return b"".join(ctypes.string_at(address, length) for address, length in self._pieces())

    def fill(self, data: bytes) -> int:
        """Copy as much of ``data`` into the pieces as there is room for, and return how much."""
        at = 0
        for address, length in self._pieces():
            part = data[at : at + length]
            ctypes.memmove(address, part, len(part))
            at += len(part)
        return at


def read(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
    """Read from byte ``at`` of a file, and return how many bytes came (preadv2(2)).

    Raises:
        OSError: the host cannot; EAGAIN if RWF_NOWAIT is in ``flags``, and it would wait.
    """
    return _call(_libc.preadv2, fd, vector, at, flags)


def write(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
    """Write from byte ``at`` of a file on, and return how many bytes went (pwritev2(2)).

    Raises:
        OSError: the host cannot.
    """
    return _call(_libc.pwritev2, fd, vector, at, flags)


def _call(
    function: Callable[[int, bytes, int, int, int], int],
    fd: int,
    vector: Vector,
    at: int,
    flags: int,
) -> int:
    while True:
        done = function(fd, vector.iovecs, len(vector.iovecs) // ENTRY.size, at, flags)
        if done >= 0:
            return done
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
