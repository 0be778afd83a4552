"""The sandbox of a process that a guest may take over: system calls, files, privileges."""

from __future__ import annotations

import errno
import os

_entered = False


def entered() -> None:
    """Note that this process is in its sandbox."""
    global _entered
    _entered = True


def hint(error: OSError) -> str:
    """Return the rest of a message about a refused path: the remedy, in a sandbox, or nothing."""
    if not _entered or error.errno not in (errno.EACCES, errno.EPERM):
        return ""
    return (
        f" (the VM is in its sandbox, as user {os.geteuid()}: start it with --allow-path for that "
        "folder, which this user has to be able to use)"
    )
