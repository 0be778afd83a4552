"""Frames from a tap to a guest, in turns of the event loop; shared by all that Python moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from godwit.host.loop import Loop
from godwit.host.net.tap import HEADER, Tap
from godwit.hw.virtio.net.backend import Accepts

from .rx_backlog import Ahead

#: Frames moved before other work of the loop gets a turn.
BUDGET = 64


class TapReader:
    """Reads while its owner has room. The owner's lock covers it.

    ``deliver(frame)``, header included, returns False when there is no room now: the frame is kept,
    and the rest stays in the tap.
    """

    def __init__(
        self, tap: Tap, loop: Loop, accepts: Accepts, deliver: Callable[[bytes], bool]
    ) -> None:
        self._tap = tap
        self._loop = loop
        self._accepts = accepts
        self._deliver = deliver
        self._ahead = Ahead(tap)
        self._readable: Callable[[], None] | None = None
        self._watching = False

    @property
    def holds(self) -> bool:
        """Whether a frame waits that is no event of the tap's."""
        return bool(self._ahead.frames)

    def start(self, readable: Callable[[], None]) -> None:
        """Have ``readable`` called while there are frames; it calls :meth:`turn`."""
        self._readable = readable
        self._update()

    def stop(self) -> None:
        """Watch no more; what was read already waits for the next turn, as the tap's do."""
        self._readable = None
        self._update()

    def turn(self) -> bool:
        """Deliver some of what waits; whether anything was. Raises what ``deliver`` raises."""
        moved = False
        for _ in range(BUDGET):
            frame = self._ahead.next()
            if frame is None:
                break
            if not self._accepts(memoryview(frame)[HEADER:]):
                continue
            if not self._deliver(frame):
                self._ahead.give_back(frame)
                self.stop()
                break
            moved = True
        else:
            self._go_on()
        return moved

    # --- around a move: see godwit.hw.nic.nic.Nic -------------------------------------------------
    def hold(self) -> None:
        """Take nothing from the tap."""
        self._ahead.hold()
        self._update()

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """These come before the tap's; how many were not kept."""
        refused = self._ahead.put(frames)
        self._go_on()
        return refused

    def release(self) -> int:
        """The tap's turn; how many of its frames were dropped."""
        dropped = self._ahead.release()
        self._update()
        self._go_on()
        return dropped

    def take(self, limit: int) -> list[bytes]:
        """What waits, at most so many frames."""
        return self._ahead.take(limit)

    def drain(self) -> int:
        """Throw away what waits in the tap; how many frames."""
        return self._ahead.drain()

    def clear(self) -> None:
        """What goes ahead was for the last driver."""
        self._ahead.clear()

    def _go_on(self) -> None:
        if self._readable is not None and self.holds:
            self._loop.call_soon(self._readable)

    def _update(self) -> None:
        readable = None if self._ahead.held else self._readable
        if readable is not None and not self._watching:
            self._loop.watch(self._tap.fd, readable)
        elif readable is None and self._watching:
            self._loop.unwatch(self._tap.fd)
        self._watching = readable is not None
