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
#: Pieces that the kernel takes at once (UIO_MAXIOV).
MOST_PIECES = 1024

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

    @property
    def pieces(self) -> int:
        """The number of pieces, which the kernel bounds."""
        return len(self.iovecs) // ENTRY.size

    def parts(self, pieces: int) -> Iterator[Vector]:
        """Yield the vector in parts of at most so many pieces."""
        lengths = memoryview(self.iovecs).cast("Q")[1::2].tolist()
        for first in range(0, len(lengths), pieces):
            end = first + pieces
            iovecs = self.iovecs[ENTRY.size * first : ENTRY.size * end]
            yield Vector(iovecs, sum(lengths[first:end]))

    def read(self) -> bytes:
        """Return a copy of the bytes."""
        buffer = bytearray(self.size)
        self.copy_to(buffer)
        return bytes(buffer)

    def copy_to(self, buffer: bytearray | memoryview) -> None:
        """Copy the first bytes into a writable buffer, as many as the buffer has room for."""
        self._copy(buffer, out=True)

    def fill(self, buffer: bytearray | memoryview) -> int:
        """Copy as much of a writable buffer into the pieces as there is room for.

        Returns the number of bytes copied.
        """
        return self._copy(buffer, out=False)

    def _copy(self, buffer: bytearray | memoryview, *, out: bool) -> int:
        if not len(buffer):
            return 0
        base, at = address_of(buffer), 0
        for address, length in self._pieces():
            count = min(length, len(buffer) - at)
            if not count:
                continue
            there, here = (base + at, address) if out else (address, base + at)
            ctypes.memmove(there, here, count)
            at += count
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
        done = function(fd, vector.iovecs, vector.pieces, at, flags)
        if done >= 0:
            return done
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
