"""The threads that serve a disk: one at a time waits for requests, and several do them.

The thread that has the turn waits for requests and takes them. What needs no disk (the host has it
cached) it does at once, and keeps the turn: no other thread is woken for that. What may wait for a
disk it does after it has passed the turn on, so that other requests are served meanwhile.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence

from godwit.host import eventfd

from .request import Doer, Done, Failed, Request

#: Threads of a disk at the most, so that so many requests may wait for it at once.
MOST = 16


class Workers:
    """Threads that do the requests which ``take()`` returns, and report each to ``finish``.

    ``take(at_most_one)`` is called with ``lock`` held while started; so is ``finish(ends)``, at any
    time. ``direct``: each request waits for a disk.
    """

    def __init__(
        self,
        name: str,
        lock: threading.RLock,
        doer: Doer,
        take: Callable[[bool], list[Request]],
        finish: Callable[[Sequence[Done | Failed]], None],
        direct: bool,
    ) -> None:
        self._name = name
        self._lock = lock
        self._doer = doer
        self._take = take
        self._finish = finish
        self._direct = direct
        self._changed = threading.Condition(lock)
        self._turn = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._wake = eventfd.make()
        self._closing = False
        self._started = False
        #: What notifies of requests, and what the waiting thread looks at now.
        self._kicks: tuple[int, ...] = ()
        self._watched: tuple[int, ...] = ()
        #: Who waits for them, and of which eventfds beside ``_wake``; of the thread with the turn.
        self._poll = select.poll()
        self._polled: tuple[int, ...] | None = None
        #: Taken, and not yet begun; taken, and not finished; threads that do requests.
        self._left: deque[Request] = deque()
        self._in_flight = 0
        self._busy = 0

    # --- life, with the lock held -----------------------------------------------------------------
    def start(self, kicks: Sequence[int]) -> None:
        """Take requests, of which these eventfds notify."""
        self._kicks = tuple(kicks)
        self._started = True
        if not self._threads:
            self._add_thread()
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Take no more requests from now on. Requests in flight are finished."""
        self._started = False
        self._kicks = ()
        os.eventfd_write(self._wake, 1)

    def stopped(self, timeout: float) -> bool:
        """Wait until no request is in flight, and return whether so. The lock is given away."""
        with self._lock:
            return self._changed.wait_for(self._quiet, timeout)

    def _quiet(self) -> bool:
        return not self._in_flight and not self._watched

    def close(self) -> bool:
        """End the threads, without the lock, and return whether all have ended."""
        self._closing = True
        if self._wake < 0:
            return True
        for thread in self._threads:
            os.eventfd_write(self._wake, 1)
            thread.join(5.0)
        ended = not any(thread.is_alive() for thread in self._threads)
        if ended:
            wake, self._wake = self._wake, -1
            os.close(wake)
        return ended

    # --- a thread ---------------------------------------------------------------------------------
    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _main(self) -> None:
        while True:
            self._turn.acquire()
            requests = self._await_requests()
            if not requests:
                self._turn.release()
                return
            self._serve(requests)

    def _await_requests(self) -> list[Request]:
        """Return the next requests, or none at the close. By the thread that has the turn."""
        while not self._closing:
            with self._lock:
                requests = self._next()
                if requests:
                    self._busy += 1
                    return requests
                watched = self._watched = self._kicks
                if not watched:
                    self._changed.notify_all()
            if self._polled != watched:
                self._poll, self._polled = select.poll(), watched
                for fd in (self._wake, *watched):
                    self._poll.register(fd, select.POLLIN)
            for ready, _ in self._poll.poll():
                eventfd.drain(ready)
        return []

    def _next(self) -> list[Request]:
        if self._left:
            return [self._left.popleft()]
        if not self._started:
            return []
        requests = self._take(self._direct)
        self._in_flight += len(requests)
        return requests

    def _serve(self, requests: list[Request]) -> None:
        """Do requests, giving the turn away before the first with a wait for a disk."""
        ends: list[Done | Failed] = []
        slow: Request | None = None
        for index, request in enumerate(requests):
            end = self._doer.quick(request)
            if end is None:
                slow = request
                with self._lock:
                    self._left.extendleft(reversed(requests[index + 1 :]))
                    self._report(ends)
                break
            ends.append(end)
        if slow is None:
            with self._lock:
                self._report(ends)
                self._busy -= 1
            self._turn.release()
            return
        self._pass_on()
        end = self._doer.do(slow)
        with self._lock:
            self._report([end])
            self._busy -= 1

    def _pass_on(self) -> None:
        """Give the turn to another thread, which is made if all are busy."""
        with self._lock:
            if self._busy == len(self._threads) < MOST and not self._closing:
                self._add_thread()
        self._turn.release()

    def _report(self, ends: Sequence[Done | Failed]) -> None:
        if ends:
            self._in_flight -= len(ends)
            self._finish(ends)
            if not self._in_flight:
                self._changed.notify_all()
