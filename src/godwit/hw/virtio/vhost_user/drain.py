"""The wait for requests that a back end has taken, or will take, before rings are taken back.

By the protocol a back end gives a ring back at once (GET_VRING_BASE), and may finish requests
later. QEMU's (libvhost-user) loses these requests then: it has closed the ring's eventfd, and gives
up when it wants to signal there. So nothing may be in flight by then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from godwit.errors import GuestError
from godwit.hw.virtio.queue import Virtqueue

#: How often the rings are looked at, seconds.
_LOOK_S = 0.001
#: How long requests may take at a reset until the back end is given up, seconds.
_DRAIN_S = 20.0


class Drain:
    """The rings whose requests are waited for: all that are available, as nobody adds more."""

    def __init__(self, queues: Sequence[Virtqueue]) -> None:
        self._all = queues
        self._queues: dict[int, Virtqueue] = {}
        self._until = 0.0
        #: Used indices at which an earlier wait was given up, and this one, by queue.
        self._stuck_before: dict[int, int] = {}
        self._stuck: dict[int, int] = {}

    @property
    def waiting(self) -> bool:
        """True from :meth:`begin` to :meth:`end`."""
        return bool(self._queues)

    def begin(self, indexes: Iterable[int]) -> None:
        """Begin to wait for these rings."""
        self._queues = {index: self._all[index] for index in indexes}
        self._until = time.monotonic() + _DRAIN_S
        self._stuck_before, self._stuck = self._stuck, {}

    def is_over(self) -> bool:
        """Return whether all is done, or a guest wrote an index by which nothing can be told."""
        return not any(0 < queue.pending <= queue.size for queue in self._queues.values())

    def check(self, positions: Iterable[tuple[int, int]]) -> None:
        """Check the used rings against positions, by queue, at which nothing is in flight.

        Raises:
            GuestError: a used index is not there.
        """
        for index, position in positions:
            used = self._all[index].used_index
            if used != position:
                raise GuestError(f"queue {index}: used index {used}, not {position}")

    def end(self) -> None:
        """Wait for nothing more, for now."""
        self._queues = {}

    def sleep(self, timeout: float) -> None:
        """Wait until another look is due."""
        # Not for the eventfd of the guest's interrupt: a driver may want none.
        time.sleep(min(timeout, _LOOK_S))

    def is_hopeless(self) -> bool:
        """Return whether nothing was finished since an earlier wait, or all takes too long.

        A driver is waiting for the end of a reset, and a guest could write the used index and
        never be paused.
        """
        self._stuck = {index: queue.used_index for index, queue in self._queues.items()}
        return self._stuck == self._stuck_before or time.monotonic() >= self._until
