"""The user and the powers of a process, given up for good."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Collection
from contextlib import suppress

from godwit.errors import ConfigError, HostError

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def no_new_privileges() -> None:
    """Have this thread, and all it starts, gain nothing by executing programs."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def find_user(name: str) -> tuple[int, int]:
    """Return the ids of a user by name or number, and of the user's group.

    Raises:
        ConfigError: there is no such user, or the user is root.
    """
    import pwd

    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        uid, gid = entry.pw_uid, entry.pw_gid
    except (KeyError, ValueError, OverflowError):
        if not (name.isascii() and name.isdecimal() and len(name) <= 9):
            raise ConfigError(
                f"--user {name!r}: there is no such user; name one that owns nothing, or a number"
            ) from None
        uid = gid = int(name)
    if uid == 0:
        raise ConfigError("--user 0: that is root; name a user that owns nothing, as 'nobody'")
    return uid, gid


def become(uid: int, gid: int, realtime: int = 1) -> None:
    """Become another user for good, in all threads: root's capabilities are gone with that.

    ``realtime`` is the priority that the threads may still take (sched(7), RLIMIT_RTPRIO): the
    kept feature for which there would otherwise be CAP_SYS_NICE.

    Raises:
        HostError: the kernel refuses.
    """
    try:
        with suppress(OSError, ValueError):  # root of a container may not: without realtime, then
            resource.setrlimit(resource.RLIMIT_RTPRIO, (realtime, realtime))
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except (OSError, ValueError) as error:
        raise HostError(
            f"cannot become user {uid}, group {gid}: {error}; name another by --user (in a "
            "container one that exists there), or give --no-sandbox"
        ) from error
    if 0 in os.getresuid() or 0 in os.getresgid() or os.getgroups():
        raise HostError(f"user {uid}: the process still has root's ids")
    # Other processes of the user, and core files, shall not get the guest's memory.
    _prctl(_PR_SET_DUMPABLE, 0)


def inherited() -> dict[int, tuple[int, int]]:
    """Return the descriptors beyond the standard ones, each with its device and inode."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2:
            try:
                status = os.fstat(fd)
            except OSError:
                continue  # the listing's own
            found[fd] = status.st_dev, status.st_ino
    return found


def close_inherited(before: dict[int, tuple[int, int]], keep: Collection[int] = ()) -> None:
    """Close the descriptors which are still the same files."""
    for fd, identity in before.items():
        if fd in keep:
            continue
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == identity:
                os.close(fd)
        except OSError:
            pass  # closed meanwhile


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) < 0:
        error = ctypes.get_errno()
        raise HostError(f"prctl {option}: {os.strerror(error)}")
