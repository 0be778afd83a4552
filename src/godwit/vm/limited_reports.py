"""Reports of errors at a rate that no guest can raise.

A driver breaks a rule by two writes and resets the device by one, tens of thousands of times a
second, and each report is an event to every client and a line in a log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: Reports of one source that may come at once, and the seconds after which one more may.
BURST, REFILL_S = 5, 10.0


class LimitedReports:
    """A limit for each source of what ``on_report(source, message, suppressed)`` gets, thread-safe.

    ``suppressed`` is the number of errors that were not reported since the last that was.
    """

    def __init__(
        self, now: Callable[[], float], on_report: Callable[[str, str, int], None]
    ) -> None:
        self._now = now
        self._on_report = on_report
        self._lock = threading.Lock()
        #: Source -> when its bucket is full again, and the errors that were not reported.
        self._buckets: dict[str, tuple[float, int]] = {}

    def add(self, source: str, message: str) -> None:
        """Report an error, or count the error if there were too many."""
        with self._lock:
            now = self._now()
            full_at, suppressed = self._buckets.get(source, (now, 0))
            full_at = max(full_at, now) + REFILL_S
            if full_at - now > BURST * REFILL_S:
                self._buckets[source] = full_at - REFILL_S, suppressed + 1
                return
            self._buckets[source] = full_at, 0
        self._on_report(source, message, suppressed)
