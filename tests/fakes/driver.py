"""A guest's driver of a split virtqueue (virtio 1.2, 2.7), in real guest memory.

The driver plays by the rules, and where a test wants to break a rule, every field can be stored by
hand. Indices wrap at 65,536 as a guest's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.queue import Virtqueue

NEXT, WRITE, INDIRECT = 1, 2, 4
_DESC = Struct("<QIHH")
_USED = Struct("<II")


def read_u16(memory: GuestMemory, address: int) -> int:
    """Return a little-endian u16, read in one access, as a guest's driver does."""
    return int(memory.view(address, 2).cast("H")[0])


def write_u16(memory: GuestMemory, address: int, value: int) -> None:
    """Store a little-endian u16 in one access (``struct.pack_into`` would show a zero first)."""
    memory.view(address, 2).cast("H")[0] = value
    memory.mark_dirty(address, 2)


class Part(NamedTuple):
    """One descriptor: address, length, and whether the device writes there."""

    address: int
    length: int
    write: bool = False


class Driver:
    """The driver of one queue, with rings from guest address ``base`` on.

    Buffers are placed from :attr:`space` on, one after the other, and from the beginning again when
    ``capacity`` bytes are full, as a guest reuses its memory.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        base: int = 0x10000,
        *,
        event_idx: bool = False,
        capacity: int = 1 << 20,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) // 4 * 4
        self.space = (self.used + 6 + 8 * size + 0xFFF) // 0x1000 * 0x1000
        self._capacity = capacity
        self._next = self.space
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self.added = 0  # free-running, not wrapped: the rings show the value modulo 65,536
        self.taken = 0
        self._kicked = 0
        memory.write(base, bytes(self.space - base))

    def set_up(self, queue: Virtqueue, features: int | None = None) -> None:
        """Set the addresses of a queue's rings, and enable the queue if ``features`` are given."""
        queue.size = self.size
        queue.desc, queue.avail, queue.used = self.desc, self.avail, self.used
        if features is not None:
            queue.enable(features)

    # --- the guest's memory -----------------------------------------------------------------------
    def place(self, data: bytes | int) -> int:
        """Place a buffer with ``data``, or so many zero bytes, and return its guest address."""
        content = bytes(data) if isinstance(data, int) else data
        if self._next + len(content) > self.space + self._capacity:
            self._next = self.space
        at = self._next
        self.memory.write(at, content)
        self._next += max(16, -(-len(content) // 16) * 16)
        return at

    def set_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Store descriptor ``index``, valid or not."""
        self.memory.write(self.desc + 16 * index, _DESC.pack(address, length, flags, following))

    def set_flags(self, flags: int) -> None:
        """Store ``avail.flags``, where 1 asks for no interrupts."""
        write_u16(self.memory, self.avail, flags)

    def set_used_event(self, index: int) -> None:
        """Ask for an interrupt when the used index passes ``index`` (EVENT_IDX)."""
        write_u16(self.memory, self.avail + 4 + 2 * self.size, index & 0xFFFF)

    def avail_event(self) -> int:
        """Return the index whose addition notifies the device (EVENT_IDX)."""
        return read_u16(self.memory, self.used + 4 + 8 * self.size)

    def avail_index(self) -> int:
        """The available index, as the ring shows it."""
        return read_u16(self.memory, self.avail + 2)

    def used_index(self) -> int:
        """The used index, as the ring shows it."""
        return read_u16(self.memory, self.used + 2)

    # --- adding -----------------------------------------------------------------------------------
    def publish(self, head: int) -> None:
        """Make ``head`` available, whatever it is."""
        write_u16(self.memory, self.avail + 4 + 2 * (self.added % self.size), head)
        self.added += 1
        write_u16(self.memory, self.avail + 2, self.added & 0xFFFF)

    def add(self, parts: Sequence[Part], *, indirect: bool = False) -> int:
        """Make a buffer of ``parts`` available, and return its head."""
        if indirect:
            table = b"".join(
                _DESC.pack(
                    part.address,
                    part.length,
                    (WRITE if part.write else 0) | (NEXT if i + 1 < len(parts) else 0),
                    i + 1 if i + 1 < len(parts) else 0,
                )
                for i, part in enumerate(parts)
            )
            head = self._free.pop(0)
            self.set_descriptor(head, self.place(table), len(table), INDIRECT)
            self._chains[head] = [head]
        else:
            taken = [self._free.pop(0) for _ in parts]
            for part, index, following in zip(parts, taken, [*taken[1:], None], strict=True):
                flags = (WRITE if part.write else 0) | (NEXT if following is not None else 0)
                self.set_descriptor(index, part.address, part.length, flags, following or 0)
            head = taken[0]
            self._chains[head] = taken
        self.publish(head)
        return head

    def add_out(self, *data: bytes, indirect: bool = False) -> int:
        """Add a buffer for the device to read, in pieces of ``data``, and return its head."""
        parts = [Part(self.place(piece), len(piece)) for piece in data]
        return self.add(parts, indirect=indirect)

    def add_in(self, *lengths: int, indirect: bool = False) -> list[Part]:
        """Add a buffer for the device to write, and return its parts, one for each length."""
        parts = [Part(self.place(length), length, True) for length in lengths]
        self.add(parts, indirect=indirect)
        return parts

    def must_kick(self) -> bool:
        """Return whether additions since the last call must be notified to the device (2.7.10).

        Without EVENT_IDX, bit 0 of ``used.flags`` declines notifications.
        """
        old, self._kicked = self._kicked, self.added
        if not self.event_idx:
            return not read_u16(self.memory, self.used) & 1
        return (self.added - self.avail_event() - 1) & 0xFFFF < (self.added - old) & 0xFFFF

    def repeat_head(self) -> None:
        """Have the head that was freed last used next, as Linux has."""
        self._free.insert(0, self._free.pop())
        self._free.insert(0, self._free.pop())

    # --- taking back ------------------------------------------------------------------------------
    def take(self) -> tuple[int, int] | None:
        """Take the next used (head, bytes written), or None, and free its descriptors."""
        if self.used_index() == self.taken & 0xFFFF:
            return None
        at = self.used + 4 + 8 * (self.taken % self.size)
        head, length = _USED.unpack(self.memory.read(at, 8))
        self.taken += 1
        if self.event_idx:
            self.set_used_event(self.taken)
        self._free += self._chains.pop(head, [])
        return head, length

    def take_all(self) -> list[tuple[int, int]]:
        """Take all used (head, bytes written)."""
        taken = []
        while (one := self.take()) is not None:
            taken.append(one)
        return taken
