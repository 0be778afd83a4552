"""A lease on a file: nobody writes or truncates the file without notice (fcntl(2), F_SETLEASE).

Whoever opens the file for writing, or truncates it, waits until the lease is given up, for
/proc/sys/fs/lease-break-time seconds (45) at the most, and the holder gets SIGIO.
"""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable


def take(fd: int, on_break: Callable[[], None]) -> None:
    """Take a lease on an open file, in the main thread, which calls ``on_break`` at a SIGIO.

    Raises:
        OSError: another user's file (EACCES), one open for writing (EAGAIN), or a file
            system without leases (EINVAL).
    """
    signal.signal(signal.SIGIO, lambda number, frame: on_break())
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
