"""The filter of system calls (Documentation/userspace-api/seccomp_filter.rst).

seccomp(2): the kernel runs the filter before each call, with the call's number, architecture and
arguments as data. Two halves of an argument are two words, the low one first.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from struct import Struct

from godwit.host.bpf import AND, JA, JEQ, JGE, JSET, LD_W_ABS, RET, Instruction, Op, assemble

from .syscalls import ALLOWED, CHECKED, UNKNOWN, YOUNGEST

KILL, ERRNO, LOG, ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFC_0000, 0x7FFF_0000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X86_64 = 0xC000_003E  # AUDIT_ARCH_X86_64
_X32 = 0x4000_0000  # __X32_SYSCALL_BIT

_SET_MODE_FILTER, _TSYNC, _FLAG_LOG = 1, 1, 2
_SECCOMP = 317
_PROGRAM = Struct("=HxxxxxxQ")  # struct sock_fprog
_FILTER = Struct("=HBBI")  # struct sock_filter

#: Kinds of ioctls (bits 8 to 15): KVM's, vhost's.
_KINDS = (0xAE, 0xAF)
#: A tap's have terminals' kind, and higher numbers (linux/if_tun.h).
_TTY_KIND, _FIRST_TUN = 0x54, 200
#: Terminal: size, settings; descriptors: FIONREAD, FIONBIO, FIOCLEX; an interface's MTU, flags and
#: name; PAGEMAP_SCAN. TIOCSTI and TIOCLINUX, which type on the operator's terminal, are not here.
_REQUESTS = (
    *(0x5401, 0x5402, 0x5403, 0x5404, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    *(0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D),  # TCGETS2 and the like: glibc from 2.42 on
    *(0x8910, 0x8913, 0x8921, 0x8927, 0x8933),
    0xC0606610,
)
#: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET.
_FAMILIES = (1, 2, 10, 16, 17)
_PROT_EXEC, _PROT_WRITE = 4, 2
_MAP_ANONYMOUS = 0x20
#: F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to whomever, sent by the kernel.
_OWNERS = (8, 10, 15)
_CLONE_THREAD = 0x10000
#: New namespaces, as CLONE_NEW*.
_CLONE_NEW = 0x7E02_0080
#: PR_SET_NAME, PR_GET_NAME, PR_SET_VMA.
_PRCTLS = (15, 16, 0x53564D41)


def program(pid: int, otherwise: int = KILL) -> list[Instruction]:
    """Return the filter for the process ``pid``, with ``otherwise`` for what is not allowed."""
    lines: list[Op | str] = [
        *(Op(LD_W_ABS, _ARCHITECTURE), Op(JEQ, _X86_64, "native"), Op(RET, KILL), "native"),
        *(Op(LD_W_ABS, _NUMBER), Op(JGE, _X32, None, "no x32"), Op(RET, KILL), "no x32"),
    ]
    for name, number in CHECKED.items():
        lines += [
            *(Op(JEQ, number, None, f"not {name}"), *_CHECKS[name](pid)),
            *(Op(RET, otherwise), f"{name} allowed", Op(RET, ALLOW), f"not {name}"),
        ]
    for number in UNKNOWN.values():
        lines += [
            *(Op(JEQ, number, None, f"not {number}"), Op(RET, ERRNO | errno.ENOSYS)),
            f"not {number}",
        ]
    lines += [Op(JGE, YOUNGEST, None, "known"), Op(RET, ERRNO | errno.ENOSYS), "known"]
    lines += [Op(JEQ, number, "allowed") for number in ALLOWED.values()]
    lines += [Op(RET, otherwise), "allowed", Op(RET, ALLOW)]
    return assemble(lines)


def _argument(index: int) -> Op:
    return Op(LD_W_ABS, _ARGUMENTS + 8 * index)


def _ioctl(_: int) -> list[Op | str]:
    ok = "ioctl allowed"
    return [
        _argument(1),
        *(Op(JEQ, request, ok) for request in _REQUESTS),
        *(Op(AND, 0xFF00), *(Op(JEQ, kind << 8, ok) for kind in _KINDS)),
        Op(JEQ, _TTY_KIND << 8, None, "not a tap's"),
        *(_argument(1), Op(AND, 0xFF), Op(JGE, _FIRST_TUN, ok)),
        "not a tap's",
    ]


def _mmap(_: int) -> list[Op | str]:
    # What is executed comes from files, and is not written.
    ok, refused = "mmap allowed", "mmap refused"
    return [
        *(_argument(2), Op(JSET, _PROT_EXEC, None, ok), Op(JSET, _PROT_WRITE, refused)),
        *(_argument(3), Op(JSET, _MAP_ANONYMOUS, None, ok), refused),
    ]


def _fcntl(_: int) -> list[Op | str]:
    return [
        _argument(1),
        *(Op(JEQ, command, "an owner") for command in _OWNERS),
        *(Op(JA, yes="fcntl allowed"), "an owner"),
    ]


def _own_thread(name: str) -> Callable[[int], list[Op | str]]:
    return lambda _: [_argument(0), Op(JEQ, 0, f"{name} allowed")]


def _mprotect(_: int) -> list[Op | str]:
    # Code that is loaded is mapped, not made of data.
    return [_argument(2), Op(JSET, _PROT_EXEC, None, "mprotect allowed")]


def _clone(_: int) -> list[Op | str]:
    return [
        *(_argument(0), Op(JSET, _CLONE_NEW, "no thread")),
        *(Op(JSET, _CLONE_THREAD, "clone allowed"), "no thread"),
    ]


def _tgkill(pid: int) -> list[Op | str]:
    return [_argument(0), Op(JEQ, pid, "tgkill allowed")]


def _prctl(_: int) -> list[Op | str]:
    return [_argument(0), *(Op(JEQ, option, "prctl allowed") for option in _PRCTLS)]


def _prlimit(_: int) -> list[Op | str]:
    # Only to look: the new limit is a null pointer.
    return [
        *(_argument(2), Op(JEQ, 0, None, "sets a limit"), Op(LD_W_ABS, _ARGUMENTS + 20)),
        *(Op(JEQ, 0, "prlimit64 allowed"), "sets a limit"),
    ]


def _socket(_: int) -> list[Op | str]:
    return [_argument(0), *(Op(JEQ, family, "socket allowed") for family in _FAMILIES)]


def _socketpair(_: int) -> list[Op | str]:
    return [_argument(0), Op(JEQ, 1, "socketpair allowed")]


_CHECKS = {
    "ioctl": _ioctl,
    "mmap": _mmap,
    "fcntl": _fcntl,
    "sched_setscheduler": _own_thread("sched_setscheduler"),
    "sched_setparam": _own_thread("sched_setparam"),
    "mprotect": _mprotect,
    "clone": _clone,
    "tgkill": _tgkill,
    "prctl": _prctl,
    "prlimit64": _prlimit,
    "socket": _socket,
    "socketpair": _socketpair,
}


def install(instructions: Sequence[Instruction], log: bool = False) -> None:
    """Put a filter before the system calls of all threads, for good.

    The process must have no_new_privs.

    Raises:
        OSError: the kernel has no seccomp, or a thread has another filter already.
    """
    code = b"".join(_FILTER.pack(*instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(
        _PROGRAM.pack(len(instructions), ctypes.addressof(buffer)), _PROGRAM.size
    )
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _TSYNC | (_FLAG_LOG if log else 0)
    result = libc.syscall(
        *map(ctypes.c_long, (_SECCOMP, _SET_MODE_FILTER, flags, ctypes.addressof(header)))
    )
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if result > 0:
        raise OSError(errno.EBUSY, f"thread {result} has a filter already")
