"""The sandbox of a process that a guest may take over: system calls, files, privileges."""

from __future__ import annotations

import errno
import os

_entered = False
#: The process's page map, opened while the process could; None: opened when it is needed.
pagemap: int | None = None


def entered() -> None:
    """Note that this process is in its sandbox."""
    global _entered
    _entered = True


def keep_pagemap() -> None:
    """Open the process's page map for good: of another user it is root's."""
    global pagemap
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def hint(error: OSError) -> str:
    """Return the rest of a message about a refused path: the remedy, in a sandbox, or nothing."""
    if not _entered or error.errno not in (errno.EACCES, errno.EPERM):
        return ""
    return (
        f" (the VM is in its sandbox, as user {os.geteuid()}: start it with --allow-path for that "
        "folder, which this user has to be able to use)"
    )
