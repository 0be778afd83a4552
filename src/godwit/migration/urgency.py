"""The two threads of a move go before all others of their hosts while the guest stands still.

On a busy host a thread that wakes waits for milliseconds until it runs, and loses its CPU again in
the middle; a move's stop has a dozen such moments. So both ends take real-time priority for it. See
docs/decisions/0015-urgency.md.
"""

from __future__ import annotations

import os
from contextlib import suppress


class Urgency:
    """Of the thread that calls. Where the process may not (sched(7): CAP_SYS_NICE, or a cgroup
    without real-time share), nothing changes, and nobody is told: it only takes longer."""

    def __init__(self) -> None:
        self._on = False

    def begin(self) -> None:
        """The guest is about to stop, or its state is here."""
        with suppress(OSError):
            # What it starts meanwhile (threads, vhost's too) is ordinary.
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            self._on = True

    def end(self) -> None:
        """It runs, somewhere; harmless when it was not begun."""
        if self._on:
            self._on = False
            with suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
