"""The rx backlog of a NIC: frames the guest gets before those that wait in its tap.

When a guest has migrated, the frames that still reached its old host are sent after the guest
(docs/decisions/0013-handover.md). Those frames are older than what arrives at the new tap, so the
tap has to wait until the last of them is there.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable

from godwit.host.net.tap import GONE, HEADER, MAX_FRAME, Tap

#: Frames and bytes that one NIC keeps at the most. The kernel's own queue in a tap is 500 frames by
#: default.
MAX_FRAMES = 8192
MAX_BYTES = 32 << 20
_SHORTEST = HEADER + 14


class RxBacklog:
    """The frames before one tap's own, each with the tap's header. Thread-safe.

    The NIC's lock covers it, and is taken by each method: migrations call :meth:`hold`,
    :meth:`inject`, :meth:`release`, :meth:`take` and :meth:`drain`; whoever serves the guest calls
    :meth:`next` and :meth:`requeue`.

    Attributes:
        lost: whether the tap's interface was deleted: nothing will ever come from there.
        on_change: called under the lock when frames were injected, the hold began or ended, or the
            tap was lost.
        on_lost: called once when the tap was lost, perhaps under the lock.
    """

    def __init__(self, tap: Tap, lock: threading.RLock) -> None:
        self._tap = tap
        self._lock = lock
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._held = False
        #: Fingerprints of group-addressed frames among those injected: the tap may have them too.
        self._groups: Counter[int] = Counter()
        self.lost = False
        self.on_change: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def held(self) -> bool:
        """True while nothing may be taken from the tap."""
        return self._held

    # --- around a migration -----------------------------------------------------------------------
    def hold(self) -> None:
        """Give the guest nothing from the tap until :meth:`release`."""
        with self._lock:
            self._held = True
            self.on_change()

    def inject(self, frames: Iterable[bytes]) -> int:
        """Give the guest these frames before the tap's, and return how many were refused.

        A frame is refused if there are too many (:data:`MAX_FRAMES`, :data:`MAX_BYTES`), or if the
        frame is too short or too long.
        """
        refused = 0
        with self._lock:
            for frame in frames:
                full = len(self._frames) >= MAX_FRAMES or self._bytes + len(frame) > MAX_BYTES
                if full or not _SHORTEST <= len(frame) <= MAX_FRAME:
                    refused += 1
                    continue
                self._append(frame)
                if self._held and frame[HEADER] & 1 and len(self._groups) < MAX_FRAMES:
                    self._groups[_fingerprint(frame)] += 1
            self.on_change()
        return refused

    def release(self) -> int:
        """End the hold: the last frame was injected. Return how many of the tap's were dropped.

        A broadcast that was on its way while the network learned the guest's new place has come to
        both hosts. The tap's copy is dropped.
        """
        dropped = 0
        with self._lock:
            self._held = False
            while self._groups and len(self._frames) < MAX_FRAMES and self._bytes < MAX_BYTES:
                frame = self._read()
                if frame is None:
                    break
                if self._groups.get(_fingerprint(frame), 0) > 0:
                    self._groups[_fingerprint(frame)] -= 1
                    dropped += 1
                else:
                    self._append(frame)
            self._groups.clear()
            self.on_change()
        return dropped

    def take(self, limit: int) -> list[bytes]:
        """Return the frames that wait here and in the tap, at most ``limit``, while paused."""
        taken: list[bytes] = []
        with self._lock:
            while len(taken) < limit:
                frame = self._pop() if self._frames else self._read()
                if frame is None:
                    break
                taken.append(frame)
        return taken

    def drain(self) -> int:
        """Throw away the frames that wait in the tap, while paused, and return how many."""
        with self._lock:
            # What was injected before the drained frames is not in the tap any more.
            self._groups.clear()
            return self._tap.drain()

    def clear(self) -> None:
        """Throw away the frames that wait here: the device was reset, they were for its driver."""
        with self._lock:
            self._frames.clear()
            self._groups.clear()
            self._bytes = 0

    # --- serving the guest ------------------------------------------------------------------------
    def next(self) -> bytes | None:
        """Return the next frame for the guest, or None if none is there or may be taken."""
        with self._lock:
            if self._frames:
                return self._pop()
            return None if self._held else self._read()

    def requeue(self, frame: bytes) -> None:
        """Take back the frame that :meth:`next` gave: the guest had no space for it."""
        with self._lock:
            self._frames.appendleft(frame)
            self._bytes += len(frame)

    def check(self) -> None:
        """Find out whether the tap still has an interface."""
        with self._lock:
            if not self.lost and not self._tap.attached:
                self._lose()

    # --- inside -----------------------------------------------------------------------------------
    def _lose(self) -> None:
        self.lost = True
        try:
            self.on_change()
        finally:
            self.on_lost()

    def _append(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._bytes += len(frame)

    def _pop(self) -> bytes:
        frame = self._frames.popleft()
        self._bytes -= len(frame)
        return frame

    def _read(self) -> bytes | None:
        if self.lost:
            return None
        try:
            return self._tap.receive()
        except OSError as error:
            if error.errno == GONE:
                self._lose()
            return None  # the tap is empty, or down: the same to a guest


def _fingerprint(frame: bytes) -> int:
    """Return a number for a frame without its header: Python's keyed hash, of 64 bits.

    The guest may have taken the frame meanwhile: a copy of each would have no bound.
    """
    return hash(frame[HEADER:])
