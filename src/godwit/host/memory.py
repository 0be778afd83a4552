"""Memory mappings of this process: backed by a memfd, populated, given back.

Python's mmap maps no file at a fixed address, and cannot populate: libc does (mmap(2), madvise(2)).
"""

from __future__ import annotations

import ctypes
import fcntl
import os

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2  # linux/mman.h
_MADV_DONTNEED, _MADV_REMOVE = 4, 9  # asm-generic/mman-common.h
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_F_ADD_SEALS = 1033  # linux/fcntl.h
_SEALS = 1 | 2 | 4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_mmap = _libc.mmap
_mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
]
_mmap.restype = ctypes.c_void_p
_mremap = _libc.mremap
_mremap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
]
_mremap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_HUGE = 2 << 20
_ZEROS = bytes(_HUGE)


def sealed_memfd(name: str, size: int) -> int:
    """Return a memfd of a fixed size: nobody who has the descriptor can truncate the file.

    Raises:
        OSError: the kernel does not give one.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_shared(address: int, size: int, fd: int, offset: int) -> None:
    """Map a file over a part of a mapping the caller owns. Raises OSError."""
    _map(address, size, _MAP_SHARED, fd, offset)


def map_private(address: int, size: int, fd: int, offset: int) -> None:
    """Map a file likewise, with pages of our own once they are written. Raises OSError."""
    _map(address, size, _MAP_PRIVATE | _MAP_NORESERVE, fd, offset)


def map_zeros(address: int, size: int) -> None:
    """Map zeros over a part of a mapping the caller owns. Raises OSError."""
    _map(address, size, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    advise_huge(address, size)


def make_private(address: int, size: int) -> None:
    """Put a copy in place of a part of a private mapping, which nobody writes meanwhile.

    Whoever reads finds the same bytes at any time. Raises OSError.
    """
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    made = _mmap(None, size, _PROT_READ | _PROT_WRITE, flags, -1, 0)
    if made is None or made == ctypes.c_void_p(-1).value:
        raise _error()
    advise_huge(made, size)
    source, target = (
        memoryview((ctypes.c_ubyte * size).from_address(at)).cast("B") for at in (address, made)
    )
    for at in range(0, size, _HUGE):
        piece = source[at : at + _HUGE]
        if not _ZEROS.startswith(piece):
            target[at : at + _HUGE] = piece
    if _mremap(made, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, address) != address:
        error = _error()
        _munmap(made, size)
        raise error


def _map(address: int, size: int, flags: int, fd: int, offset: int) -> None:
    got = _mmap(address, size, _PROT_READ | _PROT_WRITE, flags | _MAP_FIXED, fd, offset)
    if got != address:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def advise_huge(address: int, size: int) -> None:
    """Ask for huge pages, where the kernel has some for this mapping."""
    _madvise(address, size, _MADV_HUGEPAGE)


def populate(address: int, size: int) -> None:
    """Populate pages for writing, without holding the GIL. An older kernel does nothing."""
    _madvise(address, size, _MADV_POPULATE_WRITE)


def discard(address: int, size: int, shared: bool) -> None:
    """Give pages back, which are zeros from now on, if ``shared`` for all who map the file."""
    _madvise(address, size, _MADV_REMOVE if shared else _MADV_DONTNEED)
