"""The two threads of a move go before all others of their hosts while the guest stands still.

Nor is garbage looked for meanwhile: what Python counts as new includes all of a state.

On a busy host a thread that wakes waits for milliseconds until it runs, and loses its CPU again in
the middle; a move's stop has a dozen such moments. So both ends take real-time priority for it. See
docs/decisions/0015-urgency.md.
"""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress

#: A stop that lasts longer, seconds, is no matter of milliseconds any more.
LONGEST_S = 1.0
#: What of the kernel's answer is the policy.
_POLICY = ~os.SCHED_RESET_ON_FORK


class Urgency:
    """Of the thread that calls. Where the process may not (sched(7): CAP_SYS_NICE or RLIMIT_RTPRIO,
    and cgroups), its priority stays, and nobody is told: it only takes longer. So it does where the
    operator gave the process a policy of its own. The collector is the whole process's, and pauses
    in each case."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._first = self._collects = False

    def begin(self) -> None:
        """The guest is about to stop, or its state is here; harmless when it was begun."""
        if self._since is not None:
            return
        self._since = time.monotonic()
        self._collects = gc.isenabled()
        gc.disable()
        with suppress(OSError):
            if os.sched_getscheduler(0) & _POLICY != os.SCHED_OTHER:
                return
            # What it starts meanwhile (threads, vhost's too) is ordinary.
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            self._first = True

    def look(self) -> None:
        """End it if it has lasted too long: a peer may have no end of things to send."""
        if self._since is not None and time.monotonic() > self._since + LONGEST_S:
            self.end()

    def end(self) -> None:
        """It runs, somewhere; harmless when it was not begun."""
        if self._since is not None:
            self._since = None
            if self._collects:
                gc.enable()
        if self._first:
            self._first = False
            with suppress(OSError):
                # The flag stays: to take it back needs a capability that to set it does not.
                policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
                os.sched_setscheduler(0, policy, os.sched_param(0))
