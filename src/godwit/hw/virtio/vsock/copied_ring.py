"""A ring for vhost to fill in place of the guest's, by which each written buffer is seen.

vhost-vsock logs the used ring, but not the buffers (drivers/vhost/vsock.c gives
vhost_get_vq_desc no log), so a migration would leave behind what the guest has received and not
read. While a migration logs, this process moves the guest's buffers into a ring of our own, and the
used ones back: the guest's queue marks their pages.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from struct import Struct

from godwit.errors import GuestError
from godwit.host import eventfd
from godwit.host.ioctl import address_of
from godwit.hw.virtio.budget import Budget
from godwit.hw.virtio.chain import DESCRIPTOR, NEXT, WRITE, Chain
from godwit.hw.virtio.queue import Virtqueue

SIZE = 256
_USED = Struct("<II")  # id, len
_AVAIL, _USED_AT, _BYTES = 4096, 8192, 12288

# As in ..queue: an atomic read-modify-write, which Python has no other name for.
_fence = threading.Lock()


class CopiedRing:
    """A ring of :data:`SIZE` descriptors in this process, and the eventfds of vhost's side.

    Attributes:
        kick: notifies vhost of buffers.
        call: is signalled by vhost when buffers were used.
    """

    def __init__(self, queue: Virtqueue) -> None:
        self._queue = queue
        self._map = mmap.mmap(-1, _BYTES)
        self._view = memoryview(self._map)
        self._avail = self._view[_AVAIL : _AVAIL + 6 + 2 * SIZE].cast("H")
        self._used = self._view[_USED_AT : _USED_AT + 6 + 8 * SIZE].cast("H")
        self.kick, self.call = eventfd.make(), eventfd.make()
        self._free = list(range(SIZE))
        #: Buffers that vhost has, in order: each with its descriptors.
        self._lent: deque[tuple[Chain, list[int]]] = deque()
        self._taken = 0

    @property
    def addresses(self) -> tuple[int, int, int]:
        """The addresses of descriptors, used and avail ring in this process."""
        base = address_of(self._view)
        return base, base + _USED_AT, base + _AVAIL

    def fill(self, budget: Budget) -> None:
        """Lend vhost what the guest has put into the queue, as far as there is space.

        Raises:
            GuestError: nothing can be received in a buffer.
        """
        lent = len(self._lent)
        while budget.left:
            chain = self._queue.pop()
            if chain is None:
                break
            budget.spend(chain)
            pieces = len(chain.writable_at)
            if chain.readable or not 0 < pieces <= SIZE:
                raise GuestError(f"a receive buffer of {chain.pieces} pieces, not all to write")
            if pieces > len(self._free):
                self._queue.unpop(chain, 0)
                break
            self._lend(chain)
        if len(self._lent) > lent:
            os.eventfd_write(self.kick, 1)

    def _lend(self, chain: Chain) -> None:
        taken = [self._free.pop() for _ in chain.writable_at]
        for index, following, (address, length) in zip(
            taken, [*taken[1:], 0], chain.writable_at, strict=True
        ):
            flags = WRITE if index == taken[-1] else WRITE | NEXT
            DESCRIPTOR.pack_into(self._view, 16 * index, address, length, flags, following)
        self._lent.append((chain, taken))
        at = self._avail[1]
        self._avail[2 + at % SIZE] = taken[0]
        self._avail[1] = at + 1 & 0xFFFF  # x86 keeps the order of stores

    def take(self) -> None:
        """Give the guest back what vhost has used, which is in order."""
        while True:
            while self._taken != self._used[1]:
                self._take_one()
            self._avail[2 + SIZE] = self._taken  # used_event: signal the next one, too
            with _fence:
                if self._taken == self._used[1]:
                    return

    def _take_one(self) -> None:
        at = _USED_AT + 4 + 8 * (self._taken % SIZE)
        head, length = _USED.unpack_from(self._view, at)
        chain, taken = self._lent.popleft()
        assert taken[0] == head, "vhost-vsock uses buffers in order"
        self._free += taken
        self._queue.push(chain, min(length, chain.writable_size()))
        self._taken = self._taken + 1 & 0xFFFF

    def give_back(self) -> None:
        """Take back what vhost has not used, once vhost serves the ring no more."""
        self.take()
        while self._lent:
            self._queue.unpop(self._lent.pop()[0], 0)

    def close(self) -> None:
        """Give memory and descriptors back, once vhost has another ring."""
        for fd in (self.kick, self.call):
            os.close(fd)
        for view in (self._avail, self._used, self._view):
            view.release()
        self._map.close()
