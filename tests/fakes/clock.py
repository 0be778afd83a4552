"""A clock that stands still until a test advances it."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable


class FakeTimer:
    """A call that is due at ``due`` (seconds of the fake clock)."""

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self._callback: Callable[[], None] | None = callback

    @property
    def pending(self) -> bool:
        """Return whether the call is still to come."""
        return self._callback is not None

    def cancel(self) -> None:
        """Forget the call, without effect on a call already made."""
        self._callback = None

    def fire(self) -> None:
        """Make the call that is due, once."""
        callback, self._callback = self._callback, None
        if callback:
            callback()


class FakeClock:
    """A :class:`godwit.host.loop.Clock` driven by hand.

    Any thread may call ``call_later``.
    """

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._order = itertools.count()
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._lock = threading.Lock()

    def now(self) -> float:
        """Return the fake time, seconds."""
        return self._now

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        """Have ``callback`` called by the :meth:`advance` that passes ``delay`` seconds."""
        timer = FakeTimer(self._now + delay, callback)
        with self._lock:
            heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    @property
    def pending(self) -> list[float]:
        """Return the seconds from now at which calls are due, soonest first."""
        with self._lock:
            return [due - self._now for due, _, timer in sorted(self._timers) if timer.pending]

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and make each call at its time and in order.

        Calls that a callback schedules within the same stretch are made, too.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time goes forward only, not by {seconds} s")
        end = self._now + seconds
        while True:
            with self._lock:
                # Sums of small delays differ from one large delay in the last bits only.
                if not self._timers or self._timers[0][0] > end + 1e-9:
                    break
                due, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, due)
            timer.fire()
        self._now = max(self._now, end)
