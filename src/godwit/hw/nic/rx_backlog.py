"""Frames that a guest gets before those that wait in its tap.

When a guest has moved, the frames that still reached its old host are sent after it. They are older
than what arrives at its new tap, so the tap has to wait until the last of them is there.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable

from godwit.host.net.tap import HEADER, MAX_FRAME, Tap

#: What is kept for one NIC, at the most. The kernel's own queue in a tap is 500 frames by default.
MAX_FRAMES = 8192
MAX_BYTES = 32 << 20
_SHORTEST = HEADER + 14


class Ahead:
    """Of one tap. The owner's lock covers it.

    Attributes:
        frames: what goes ahead, in order, the tap's header before each.
        held: nothing is to be taken from the tap.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self.frames: deque[bytes] = deque()
        self.held = False
        self._bytes = 0
        #: Group-addressed frames among those put here: the tap may have them too.
        self._groups: Counter[bytes] = Counter()

    def hold(self) -> None:
        """Take nothing from the tap until :meth:`release`."""
        self.held = True

    def put(self, frames: Iterable[bytes]) -> int:
        """Frames of the other host's; how many were not kept, for want of room or sense."""
        refused = 0
        for frame in frames:
            full = len(self.frames) >= MAX_FRAMES or self._bytes + len(frame) > MAX_BYTES
            if full or not _SHORTEST <= len(frame) <= MAX_FRAME:
                refused += 1
                continue
            self.frames.append(frame)
            self._bytes += len(frame)
            if self.held and frame[HEADER] & 1:
                self._groups[frame[HEADER:]] += 1
        return refused

    def release(self) -> int:
        """The last of them was put here: the tap's are due. How many of those were there twice.

        A broadcast that was on its way while the network learned the guest's new place has come to
        both hosts. The tap's copy is dropped.
        """
        dropped = 0
        self.held = False
        while self._groups and len(self.frames) < MAX_FRAMES and self._bytes < MAX_BYTES:
            frame = self._read()
            if frame is None:
                break
            if self._groups.get(frame[HEADER:], 0) > 0:
                self._groups[frame[HEADER:]] -= 1
                dropped += 1
            else:
                self._append(frame)
        self._groups.clear()
        return dropped

    def next(self) -> bytes | None:
        """The next frame for the guest; None: there is none, or none may be taken."""
        if self.frames:
            return self._pop()
        return None if self.held else self._read()

    def give_back(self, frame: bytes) -> None:
        """There was no room for what :meth:`next` gave: it is the next again."""
        self.frames.appendleft(frame)
        self._bytes += len(frame)

    def take(self, limit: int) -> list[bytes]:
        """What waits here and in the tap, at most so many frames; nobody is served meanwhile."""
        taken: list[bytes] = []
        while len(taken) < limit:
            frame = self._pop() if self.frames else self._read()
            if frame is None:
                break
            taken.append(frame)
        return taken

    def drain(self) -> int:
        """Throw away what waits in the tap; how many frames. What came here before it is not there
        any more."""
        self._groups.clear()
        return self._tap.drain()

    def clear(self) -> None:
        """The device was reset: what waits here was for its last driver."""
        self.frames.clear()
        self._groups.clear()
        self._bytes = 0

    def _append(self, frame: bytes) -> None:
        self.frames.append(frame)
        self._bytes += len(frame)

    def _pop(self) -> bytes:
        frame = self.frames.popleft()
        self._bytes -= len(frame)
        return frame

    def _read(self) -> bytes | None:
        try:
            return os.read(self._tap.fd, MAX_FRAME)
        except OSError:
            return None  # it is empty; or down, or gone: the same to a guest
