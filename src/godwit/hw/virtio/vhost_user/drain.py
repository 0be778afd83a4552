"""The wait for requests that a back end took, once the rings were taken back."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence

from godwit.errors import GuestError
from godwit.host import eventfd
from godwit.hw.virtio.queue import Virtqueue

#: How often the used rings are looked at, seconds.
_LOOK_S = 0.02
#: How long requests may take at a reset until the back end is given up, seconds.
_DRAIN_S = 20.0


class Drain:
    """The rings whose used index has not come to the back end's position yet.

    Attributes:
        call: an eventfd for the back end to signal meanwhile.
    """

    def __init__(self, queues: Sequence[Virtqueue]) -> None:
        self.call = eventfd.make()
        self._queues = queues
        self._positions: dict[int, int] = {}
        self._until = 0.0
        #: Used indices at which an earlier wait was given up, and this one, by queue.
        self._stuck_before: dict[int, int] = {}
        self._stuck: dict[int, int] = {}

    @property
    def pending(self) -> bool:
        """True while requests are waited for."""
        return bool(self._positions)

    def begin(self) -> None:
        """Begin another wait, for rings to be named."""
        self._until = time.monotonic() + _DRAIN_S
        self._stuck_before, self._stuck = self._stuck, {}

    def wait_for(self, index: int, position: int) -> None:
        """Have a ring waited for until the used index is at a position."""
        self._positions[index] = position

    def forget(self) -> None:
        """Forget the rings, and wait for nothing more."""
        self._positions.clear()

    def look(self) -> None:
        """Look at the used rings for what was finished.

        Raises:
            GuestError: a used index is where no back end can have come from.
        """
        for index, position in list(self._positions.items()):
            queue = self._queues[index]
            left = position - queue.used_index & 0xFFFF
            if left and left <= queue.size:
                continue
            queue.resync_used()
            del self._positions[index]
            if left:
                raise GuestError(f"queue {index}: used index {queue.used_index}, not {position}")

    def sleep(self, timeout: float) -> None:
        """Wait for a signal of the back end, or until another look is due."""
        # A back end may have closed the eventfd with the ring: so a look from time to time.
        called = select.poll()
        called.register(self.call, select.POLLIN)
        called.poll(1000 * min(timeout, _LOOK_S))
        eventfd.drain(self.call)

    def is_hopeless(self) -> bool:
        """Return whether nothing was finished since an earlier wait, or all takes too long.

        A driver is waiting for the end of a reset, and a guest could write the used index and
        never be paused.
        """
        self._stuck = {index: self._queues[index].used_index for index in self._positions}
        return self._stuck == self._stuck_before or time.monotonic() >= self._until

    def close(self) -> None:
        """Give the eventfd back, unless given back already."""
        if self.call >= 0:
            os.close(self.call)
            self.call = -1
