"""Eventfds (eventfd(2)): how they are made and drained everywhere."""

from __future__ import annotations

import os


def make() -> int:
    """Return a new eventfd: non-blocking, closed on exec, at zero."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def drain(fd: int) -> None:
    """Set an eventfd's counter to zero. A counter at zero stays so."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
