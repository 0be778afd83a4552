"""Frames from a tap to a guest, in turns of the event loop; shared by all that Python moves."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..loop import Loop
from .backend import Accepts
from .tap import HEADER, MAX_FRAME, Tap

#: Frames moved before other work of the loop gets a turn.
BUDGET = 64


class TapReader:
    """Reads while its owner has room. The owner's lock covers it.

    ``deliver(frame)``, header included, returns False when there is no room now: the frame is held,
    and the rest stays in the tap.
    """

    def __init__(
        self, tap: Tap, loop: Loop, accepts: Accepts, deliver: Callable[[bytes], bool]
    ) -> None:
        self._tap = tap
        self._loop = loop
        self._accepts = accepts
        self._deliver = deliver
        self._held: bytes | None = None
        self._watching = False

    @property
    def holds(self) -> bool:
        """Whether a frame waits for room."""
        return self._held is not None

    def start(self, readable: Callable[[], None]) -> None:
        """Have ``readable`` called while the tap has frames; it calls :meth:`turn`."""
        if not self._watching:
            self._watching = True
            self._loop.watch(self._tap.fd, readable)

    def stop(self) -> None:
        """Watch no more; a held frame waits for the next turn, as the tap's do."""
        if self._watching:
            self._watching = False
            self._loop.unwatch(self._tap.fd)

    def turn(self) -> bool:
        """Deliver some of what waits; whether anything was. Raises what ``deliver`` raises."""
        moved = self._held is not None
        if not self.deliver_held():
            return False
        for _ in range(BUDGET):
            try:
                frame = os.read(self._tap.fd, MAX_FRAME)
            except OSError:
                break
            if not self._accepts(memoryview(frame)[HEADER:]):
                continue
            if not self._deliver(frame):
                self._held = frame
                self.stop()
                break
            moved = True
        return moved

    def deliver_held(self) -> bool:
        """Try the held frame again; whether none is held now."""
        if self._held is not None:
            if not self._deliver(self._held):
                self.stop()
                return False
            self._held = None
        return True

    def drain(self) -> int:
        """Throw away what waits in the tap, and what was taken from it; how many frames."""
        held, self._held = self._held, None
        return self._tap.drain() + (held is not None)
