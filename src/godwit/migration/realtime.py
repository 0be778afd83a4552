"""The realtime section: a migration's threads go before all others while the guest stands still.

Nor is garbage looked for meanwhile: what Python counts as new includes all of a state.

On a busy host a thread that wakes waits for milliseconds until it runs, and loses its CPU again in
the middle; a migration's downtime has a dozen such moments. So both ends take realtime priority for
the downtime (docs/decisions/0015-realtime.md).
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress

from .times import TIMES, Times

#: A downtime that lasts longer, seconds, is no matter of milliseconds any more.
LONGEST_S = 1.0
#: The policy in the kernel's answer.
_POLICY = ~os.SCHED_RESET_ON_FORK


class RealtimeSection:
    """The calling thread at SCHED_RR, and a paused collector, from begin to end.

    Without permission (sched(7): CAP_SYS_NICE or RLIMIT_RTPRIO, and cgroups), or under a policy of
    the operator's own, priority is left alone and nothing is reported: the downtime is just longer.
    The collector is the whole process's, and pauses in each case.
    """

    def __init__(self, times: Times = TIMES) -> None:
        self._times = times
        self._since: float | None = None
        self._raised = self._collects = False

    def begin(self) -> None:
        """Enter the section: the guest is about to stop, or its state is here.

        Entering twice is harmless.
        """
        if self._since is not None:
            return
        self._since = self._times.now()
        self._collects = gc.isenabled()
        gc.disable()
        with suppress(OSError):
            if os.sched_getscheduler(0) & _POLICY != os.SCHED_OTHER:
                return
            # Threads started meanwhile (vhost's too) are ordinary.
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            self._raised = True

    def expire(self) -> None:
        """End the section if too long, as a peer may have no end of things to send."""
        if self._since is not None and self._times.now() > self._since + LONGEST_S:
            self.end()

    def end(self) -> None:
        """Restore priority and collector, if the section was begun."""
        if self._since is not None:
            self._since = None
            if self._collects:
                gc.enable()
        if self._raised:
            self._raised = False
            with suppress(OSError):
                # The flag stays: to take it back needs a capability that to set it does not.
                policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
                os.sched_setscheduler(0, policy, os.sched_param(0))
