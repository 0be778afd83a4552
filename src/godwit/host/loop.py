"""The one event loop: file descriptors, timers, and calls from other threads.

asyncio would do the same, but costs a third of a second of start-up on a slow host (asyncio imports
ssl, and more), and nothing here awaits. See docs/decisions/0003-own-loop.md.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

#: Queued calls that are made between two looks at the descriptors.
_CALLS = 64


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Cancel the call, unless the call was made already."""


class Clock(Protocol):
    """Time and timers, an argument so that tests never wait."""

    def now(self) -> float:
        """Return the monotonic time in seconds."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` in the loop's thread after ``delay`` seconds."""


class _Timer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SoonCall:
    """A call in a loop's thread, made once for all earlier requests, from any thread."""

    def __init__(self, loop: Loop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._due = False

    def request(self) -> None:
        """Have the call made soon."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._make)

    def _make(self) -> None:
        self._due = False  # first: a request from now on asks for another call
        self._callback()


class Loop:
    """A :class:`Clock` that runs callbacks in the thread that calls :meth:`run`.

    ``call_soon`` and ``call_later`` may be called from any thread; ``watch`` and ``unwatch`` too.
    What a callback raises goes to ``on_error``, and the loop goes on.
    """

    def __init__(self, on_error: Callable[[BaseException], None] | None = None) -> None:
        self._epoll = select.epoll()
        # Not by .eventfd: one module less on the way to a running guest.
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, tuple[Callable[[], None] | None, Callable[[], None] | None]] = {}
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, _Timer]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._stopping = False
        self._on_error = on_error

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return time.monotonic()

    def watch(
        self,
        fd: int,
        readable: Callable[[], None] | None = None,
        writable: Callable[[], None] | None = None,
        *,
        hung_up: Callable[[], None] | None = None,
    ) -> None:
        """Call back while ``fd`` is readable or writable, and forget earlier callbacks of ``fd``.

        ``hung_up`` alone is called once its peer is gone, whatever else there is to be read.

        Raises:
            PermissionError: ``fd`` is a regular file, which epoll does not take.
        """
        mask = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0)
        with self._lock:
            if fd in self._watched:
                self._epoll.modify(fd, mask)
            else:
                self._epoll.register(fd, mask)
            self._watched[fd] = (readable or hung_up, writable)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``, if it is watched.

        Has to be called before ``fd`` is closed.
        """
        with self._lock:
            if self._watched.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the loop's thread, soon and in order."""
        self._soon.append(callback)
        os.eventfd_write(self._wake, 1)

    def call_later(self, delay: float, callback: Callable[[], None]) -> _Timer:
        """Call ``callback`` in the loop's thread after ``delay`` seconds."""
        timer = _Timer(callback)
        with self._lock:
            heapq.heappush(self._timers, (self.now() + delay, next(self._order), timer))
        os.eventfd_write(self._wake, 1)
        return timer

    def stop(self) -> None:
        """Make :meth:`run` return after the callbacks under way."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Make calls as they fall due until :meth:`stop`."""
        while not self._stopping:
            self.run_once(None)

    def run_once(self, timeout: float | None) -> None:
        """Wait for at most ``timeout`` seconds (None: no limit) and make the calls that are due."""
        with self._lock:
            if self._timers:
                due = max(0.0, self._timers[0][0] - self.now())
                timeout = due if timeout is None else min(timeout, due)
        for fd, events in self._epoll.poll(0 if self._soon else timeout):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                continue
            readable, writable = self._watched.get(fd, (None, None))
            if readable and events & ~select.EPOLLOUT:
                self._call(readable)
            if writable and events & ~select.EPOLLIN and fd in self._watched:
                self._call(writable)
        # A bound: a guest may cause calls as quickly as they are made, and the others wait.
        for _ in range(min(len(self._soon), _CALLS)):
            self._call(self._soon.popleft())
        for _ in range(len(self._timers)):  # what a timer sets anew is for the next turn
            with self._lock:
                if not self._timers or self._timers[0][0] > self.now():
                    break
                timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback:
                self._call(callback)

    def close(self) -> None:
        """Close the epoll and wake-up descriptors."""
        self._epoll.close()
        os.close(self._wake)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(error)
