"""ioctl: request numbers, and calls that release the GIL.

``fcntl.ioctl`` keeps the GIL when it is given a mutable buffer, and a vCPU ioctl then deadlocks
with a running vCPU thread (the ioctl waits for the vCPU mutex, KVM_RUN's return for the GIL).
ctypes releases the GIL. Encoding: include/uapi/asm-generic/ioctl.h.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_ioctl.restype = ctypes.c_int

_NONE, _WRITE, _READ = 0, 1, 2


def _encode(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def io(kind: int, number: int) -> int:
    """Return the number of an ``_IO`` request: no argument, or a plain integer."""
    return _encode(_NONE, kind, number, 0)


def ior(kind: int, number: int, size: int) -> int:
    """Return the number of an ``_IOR`` request: the kernel writes ``size`` bytes."""
    return _encode(_READ, kind, number, size)


def iow(kind: int, number: int, size: int) -> int:
    """Return the number of an ``_IOW`` request: the kernel reads ``size`` bytes."""
    return _encode(_WRITE, kind, number, size)


def iowr(kind: int, number: int, size: int) -> int:
    """Return the number of an ``_IOWR`` request: the kernel reads and writes ``size`` bytes."""
    return _encode(_READ | _WRITE, kind, number, size)


def ioctl(fd: int, request: int, argument: int = 0) -> int:
    """Call ioctl with an integer (or an address).

    Raises:
        OSError: with the kernel's errno.
    """
    result: int = _ioctl(fd, request, argument)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ioctl {request:#x}: {os.strerror(error)}")
    return result


def ioctl_in(fd: int, request: int, data: bytes) -> int:
    """Call ioctl with a struct the kernel only reads.

    Raises:
        OSError: with the kernel's errno.
    """
    result: int = _ioctl(fd, request, data)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ioctl {request:#x}: {os.strerror(error)}")
    return result


def ioctl_out(fd: int, request: int, data: bytearray) -> int:
    """Call ioctl with a struct the kernel may write.

    Raises:
        OSError: with the kernel's errno.
    """
    return ioctl(fd, request, address_of(data))


def address_of(buffer: bytearray | memoryview) -> int:
    """Return the address of a writable buffer, which the caller keeps alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
