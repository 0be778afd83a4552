"""The files that a process can reach (Documentation/userspace-api/landlock.rst).

A thread's rules are those of the threads it starts, but not of those it started before: so the
process takes them on before its first thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH = 1
_SCOPE_SIGNAL = 1 << 1  # LANDLOCK_SCOPE_SIGNAL
_RULE = Struct("=Qi")  # struct landlock_path_beneath_attr
_O_PATH = os.O_PATH | os.O_CLOEXEC

# linux/landlock.h, LANDLOCK_ACCESS_FS_*
_EXECUTE, _WRITE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_FILE, _MAKE_REG, _MAKE_SOCK = 1 << 5, 1 << 8, 1 << 9
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
#: What a version of the kernel's interface can restrict: versions 1, 2 (REFER), 3, 4 (the same), 5.
_HANDLED = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
#: Rights that a rule for a file, not a folder, may have.
_OF_FILES = _EXECUTE | _WRITE | _READ_FILE | _TRUNCATE | _IOCTL

#: Read files and folders; load code from them.
READ = _READ_FILE | _READ_DIR | _EXECUTE
#: Read and write a disk image, which may be a block device.
IMAGE = _READ_FILE | _WRITE | _IOCTL
#: Use a device.
DEVICE = _READ_FILE | _WRITE | _IOCTL
#: Make sockets in a folder. Not remove: the folder may be anybody's home.
SOCKETS = _MAKE_SOCK | _READ_DIR
#: Make, read, replace and remove files and sockets in a folder.
WORK = SOCKETS | _REMOVE_FILE | _READ_FILE | _WRITE | _MAKE_REG | _TRUNCATE


class Rule(NamedTuple):
    """A file or folder, and what is allowed there and below. One that is absent is left out."""

    path: str
    access: int


def version() -> int:
    """Return the version of the kernel's interface, or 0 without Landlock."""
    try:
        return _call(_CREATE, 0, 0, _VERSION)
    except OSError:
        return 0


def restrict(rules: Iterable[Rule]) -> None:
    """Leave this thread, and all it starts, nothing but these files, for good.

    The thread must have no_new_privs.

    Raises:
        OSError: the kernel refuses.
    """
    known = version()
    handled = _HANDLED[min(known, len(_HANDLED) - 1)]
    attribute = handled.to_bytes(8, "little")
    if known >= 6:  # no ports, and signals to this process's own threads alone
        attribute += bytes(8) + _SCOPE_SIGNAL.to_bytes(8, "little")
    buffer = ctypes.create_string_buffer(attribute, len(attribute))
    ruleset = _call(_CREATE, ctypes.addressof(buffer), len(attribute), 0)
    try:
        for rule in rules:
            _add(ruleset, rule, handled)
        _call(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _add(ruleset: int, rule: Rule, handled: int) -> None:
    try:
        fd = os.open(rule.path, _O_PATH)
    except (OSError, ValueError):
        return  # then nobody reaches it
    try:
        access = rule.access & handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _OF_FILES
        if access:
            body = ctypes.create_string_buffer(_RULE.pack(access, fd), _RULE.size)
            try:
                _call(_ADD, ruleset, _PATH_BENEATH, ctypes.addressof(body), 0)
            except OSError as error:
                # A pipe or a memfd, as /dev/fd/63: no file of a tree, and reached without a rule.
                if error.errno != errno.EBADFD:
                    raise
    finally:
        os.close(fd)


def _call(number: int, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(*map(ctypes.c_long, (number, *arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
