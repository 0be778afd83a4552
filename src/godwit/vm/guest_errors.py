"""The reports of guest errors, at a rate that no guest can raise.

A driver breaks a rule by two writes and resets the device by one, tens of thousands of times a
second, and each report is an event to every client and a line in a log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: Reports of one device that may come at once, and the seconds after which one more may.
BURST, REFILL_S = 5, 10.0


class GuestErrors:
    """A limit for each device of what ``on_error(device, message, suppressed)`` gets, thread-safe.

    ``suppressed`` is the number of errors that were not reported since the last that was.
    """

    def __init__(self, now: Callable[[], float], on_error: Callable[[str, str, int], None]) -> None:
        self._now = now
        self._on_error = on_error
        self._lock = threading.Lock()
        #: Device -> when its bucket is full again, and the errors that were not reported.
        self._buckets: dict[str, tuple[float, int]] = {}

    def add(self, device: str, message: str) -> None:
        """Report a guest error, or count the error if there were too many."""
        with self._lock:
            now = self._now()
            full_at, suppressed = self._buckets.get(device, (now, 0))
            full_at = max(full_at, now) + REFILL_S
            if full_at - now > BURST * REFILL_S:
                self._buckets[device] = full_at - REFILL_S, suppressed + 1
                return
            self._buckets[device] = full_at, 0
        self._on_error(device, message, suppressed)
