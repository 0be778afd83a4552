"""The device's side of a split virtqueue (virtio 1.2, 2.7), every field of the guest's checked.

Indices run free over 16 bits and wrap at 65,536; ring positions are the index modulo the size.
"""

from __future__ import annotations

import threading

import msgspec

from godwit.errors import GuestError
from godwit.hw.memory import GuestMemory
from godwit.spec.saved import U16, U64

from .chain import DESCRIPTOR, INDIRECT, MAX_INDIRECT, NEXT, WRITE, Chain
from .straight import straight

_NO_INTERRUPT = 1  # avail.flags
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29


class QueueState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of a virtqueue, with guest physical addresses."""

    size: U16  # what the guest wrote: no good size until the queue is enabled
    ready: bool
    desc: U64
    avail: U64
    used: U64
    last_avail: U16
    last_used: U16
    vector: U16


# Python has no memory fence; taking a lock is an atomic read-modify-write, which is one on x86.
_fence = threading.Lock()


class Virtqueue:
    """A queue whose public fields the transport sets, until :meth:`enable` freezes them.

    Not thread-safe: the device's lock covers each access.
    """

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        self._memory = memory
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Clear all fields as after a device reset."""
        self.size = self.max_size
        self.ready = False
        self.desc = self.avail = self.used = 0
        self.vector = 0xFFFF
        self.last_avail = self.last_used = 0
        self._signalled: int | None = None
        self._pushed = False
        self._event_idx = self._indirect = False
        self._table: memoryview | None = None

    def enable(self, features: int) -> None:
        """Check the ring's addresses and get ready to serve.

        Raises:
            GuestError: a size, address or alignment the specification forbids.
        """
        size = self.size
        if not 0 < size <= self.max_size or size & size - 1:
            raise GuestError(f"queue size {size} is no power of two up to {self.max_size}")
        for what, address, align in (
            ("descriptor table", self.desc, 16),
            ("avail ring", self.avail, 2),
            ("used ring", self.used, 4),
        ):
            if address % align:
                raise GuestError(f"{what} at {address:#x} is not aligned to {align}")
        self._event_idx = bool(features & F_EVENT_IDX)
        self._indirect = bool(features & F_INDIRECT_DESC)
        extra = 2 if self._event_idx else 0
        table = self._memory.view(self.desc, 16 * size)
        self._avail = self._memory.view(self.avail, 4 + 2 * size + extra).cast("H")
        self._used16 = self._memory.view(self.used, 4 + 8 * size + extra).cast("H")
        self._used32 = self._memory.view(self.used + 4, 8 * size).cast("I")
        self._signalled = None
        self.ready = True
        self._table = table

    @property
    def enabled(self) -> bool:
        """True if :meth:`enable` was called since the last reset."""
        return self._table is not None

    def resync_used(self) -> None:
        """Take the used index from the ring, where another device (vhost) advanced it."""
        self.last_used = self._used16[1]
        self._signalled = None

    def settle(self) -> bool:
        """Take the used index as the position, and return whether nothing is in flight there."""
        self.resync_used()
        self.last_avail = self.last_used
        return self._avail[1] == self.last_used

    def go_on_behind_used(self) -> bool:
        """Go on with the buffer behind the last used one, or return False if that is unknown.

        Whoever served the ring is gone, and kept no record. If the buffers were used in the order
        in which they became available, as far as both rings show, none was taken and left but those
        that follow. Unless some were left long ago, and all others used: both rings would be
        shifted by so many, which is not seen where the buffers repeat.
        """
        self.settle()
        pending = self._avail[1] - self.last_used & 0xFFFF
        if not pending:
            return True
        if pending > self.size:
            return False
        shown = range(self.last_used - self.size + pending, self.last_used)
        return self._shifted_by(0, shown) and not any(
            self._shifted_by(left, shown) for left in range(1, pending + 1)
        )

    def _shifted_by(self, left: int, shown: range) -> bool:
        """Return whether the used buffers are those made available so many positions later."""
        return all(
            self._used32[2 * (at % self.size)] & 0xFFFF == self._avail[2 + (at + left) % self.size]
            for at in shown
        )

    @property
    def pending(self) -> int:
        """The number of buffers that are available and not used, by the rings."""
        return int(self._avail[1]) - int(self._used16[1]) & 0xFFFF

    @property
    def used_index(self) -> int:
        """The used index in the ring, where another device advances it."""
        return int(self._used16[1])

    def pop(self) -> Chain | None:
        """Return the next buffer, or None after asking the driver to notify.

        Raises:
            GuestError: the driver broke the ring's rules.
        """
        pending = self._avail[1] - self.last_avail & 0xFFFF
        if not pending:
            if self._event_idx:
                # avail_event: 'notify me when you put a buffer there'. Without it the second
                # buffer would raise no notification. The driver may have added one meanwhile.
                self._used16[2 + 4 * self.size] = self.last_avail
                self._memory.mark_dirty(self.used + 4 + 8 * self.size, 2)
                with _fence:
                    pending = self._avail[1] - self.last_avail & 0xFFFF
            elif self._used16[0]:
                # vhost, which had the ring before, asked for no notifications (used.flags, 2.7.8).
                self._used16[0] = 0
                self._memory.mark_dirty(self.used, 2)
                with _fence:
                    pending = self._avail[1] - self.last_avail & 0xFFFF
            if not pending:
                return None
        if pending > self.size:
            raise GuestError(
                f"avail index is {pending} beyond the device's in a queue of {self.size}"
            )
        head = self._avail[2 + self.last_avail % self.size]
        chain = self._walk(head)
        self.last_avail = self.last_avail + 1 & 0xFFFF
        return chain

    def again(self, head: int) -> Chain:
        """Return a buffer that was popped before, and not pushed.

        Raises:
            GuestError: the driver broke the ring's rules.
        """
        return self._walk(head)

    def unpop(self, chain: Chain, written: int) -> None:
        """Give the newest popped buffer back, of which ``written`` bytes were written for nothing.

        The pages are marked: they are other than the ones that a migration sent before.
        """
        self._mark(chain, written)
        self.last_avail = self.last_avail - 1 & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """Put ``chain`` into the used ring with ``written`` bytes written."""
        self._mark(chain, written)
        slot = self.last_used % self.size
        self._used32[2 * slot] = chain.head
        self._used32[2 * slot + 1] = written
        self._memory.mark_dirty(self.used + 4 + 8 * slot, 8)
        # x86 keeps the order of stores: the element is seen before the index.
        self.last_used = self.last_used + 1 & 0xFFFF
        self._used16[1] = self.last_used
        self._memory.mark_dirty(self.used + 2, 2)
        self._pushed = True

    def _mark(self, chain: Chain, written: int) -> None:
        if not self._memory.logging:
            return
        for address, length in chain.writable_at:
            if written <= 0:
                break
            self._memory.mark_dirty(address, min(written, length))
            written -= length

    def should_notify(self) -> bool:
        """Return whether the driver wants an interrupt for what was pushed (2.7.10)."""
        if not self._pushed:
            return False
        self._pushed = False
        with _fence:
            if not self._event_idx:
                return not self._avail[0] & _NO_INTERRUPT
            event = self._avail[2 + self.size]
        old, self._signalled = self._signalled, self.last_used
        if old is None:
            return True
        return (self.last_used - event - 1) & 0xFFFF < (self.last_used - old) & 0xFFFF

    def save(self) -> QueueState:
        """Return the state of a queue that nobody serves now."""
        return QueueState(
            self.size,
            self.ready,
            self.desc,
            self.avail,
            self.used,
            self.last_avail,
            self.last_used,
            self.vector,
        )

    def load(self, state: QueueState) -> None:
        """Take over a saved state, which :meth:`enable` checks against RAM."""
        self.reset()
        self.size, self.ready, self.vector = state.size, state.ready, state.vector
        self.desc, self.avail, self.used = state.desc, state.avail, state.used
        self.last_avail, self.last_used = state.last_avail, state.last_used

    def _walk(self, head: int) -> Chain:
        table, size = self._table, self.size
        if table is None:
            raise GuestError("queue served before it was enabled")
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        writable_at: list[tuple[int, int]] = []
        index, seen, indirect, limit = head, 0, False, size
        while True:
            if index >= size:
                raise GuestError(f"descriptor {index} in a table of {size}")
            if seen >= limit:
                raise GuestError(f"descriptor chain from {head} is longer than {limit}")
            seen += 1
            address, length, flags, following = DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & INDIRECT:
                if not self._indirect or indirect or flags & NEXT:
                    raise GuestError(f"indirect descriptor {index} where none is allowed")
                if not length or length % 16:
                    raise GuestError(f"indirect table of {length} bytes")
                table, size = self._memory.view(address, length), length // 16
                if head == index and size <= MAX_INDIRECT:
                    chain = straight(head, table, self._memory)
                    if chain is not None:
                        return chain
                index, seen, indirect, limit = 0, 0, True, min(size, MAX_INDIRECT)
                continue
            view = self._memory.view(address, length)
            if flags & WRITE:
                writable.append(view)
                writable_at.append((address, length))
            elif writable:
                raise GuestError(f"readable descriptor {index} after a writable one")
            else:
                readable.append(view)
            if not flags & NEXT:
                return Chain(head, readable, writable, writable_at)
            index = following
