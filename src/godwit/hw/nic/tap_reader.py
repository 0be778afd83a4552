"""Frames from a tap to a guest, in turns of the event loop, for all devices served by Python."""

from __future__ import annotations

from collections.abc import Callable

from godwit.host.loop import Loop, SoonCall
from godwit.host.net.tap import HEADER, Tap

from .rx_backlog import RxBacklog

#: Frames, and bytes of frames, delivered before other work of the loop gets a turn.
BUDGET, BUDGET_BYTES = 64, 512 << 10

#: Returns whether a frame (without the tap's header) is for the guest.
Accepts = Callable[[memoryview], bool]


class TapReader:
    """A reader of a tap, active while its owner has space, and covered by the owner's lock.

    ``deliver(frame)``, header included, returns False when there is no space now: the frame is
    kept, and the rest stays in the tap.
    """

    def __init__(
        self,
        tap: Tap,
        backlog: RxBacklog,
        loop: Loop,
        accepts: Accepts,
        deliver: Callable[[bytes], bool],
    ) -> None:
        self._tap = tap
        self._backlog = backlog
        self._loop = loop
        self._accepts = accepts
        self._deliver = deliver
        self._readable: Callable[[], None] | None = None
        self._watching = False
        self._soon = SoonCall(loop, self._turn_again)
        backlog.on_change = self._changed

    @property
    def waiting(self) -> bool:
        """True while a frame waits that is no event of the tap's."""
        return bool(self._backlog)

    def start(self, readable: Callable[[], None]) -> None:
        """Have ``readable``, which calls :meth:`turn`, called while there are frames."""
        self._readable = readable
        self._changed()

    def stop(self) -> None:
        """Watch the tap no more.

        Frames read already wait for the next turn, as the tap's frames do.
        """
        self._readable = None
        self._update()

    def turn(self) -> bool:
        """Deliver some of the waiting frames, and return whether any was.

        Raises as ``deliver`` does.
        """
        delivered = False
        frames = size = 0
        while frames < BUDGET and size < BUDGET_BYTES:
            frame = self._backlog.next()
            if frame is None:
                break
            frames += 1
            size += len(frame)
            if not self._accepts(memoryview(frame)[HEADER:]):
                continue
            if not self._deliver(frame):
                self._backlog.requeue(frame)
                self.stop()
                break
            delivered = True
        else:
            self._go_on()
        return delivered

    def _changed(self) -> None:
        self._update()
        self._go_on()

    def _go_on(self) -> None:
        if self._readable is not None and self.waiting:
            self._soon.request()  # its readiness is no event of the tap's

    def _turn_again(self) -> None:
        readable = self._readable  # once: a vCPU that resets the device clears it meanwhile
        if readable is not None:
            readable()

    def _update(self) -> None:
        # A tap that is gone is readable for ever, and has nothing to read.
        idle = self._backlog.held or self._backlog.lost
        readable = None if idle else self._readable
        if readable is not None and not self._watching:
            self._loop.watch(self._tap.fd, readable)
        elif readable is None and self._watching:
            self._loop.unwatch(self._tap.fd)
        self._watching = readable is not None
