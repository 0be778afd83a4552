"""A buffer of a virtqueue: a chain of descriptors (virtio 1.2, 2.7.5), checked before."""

from __future__ import annotations

from struct import Struct, pack

from godwit.host.iovec import Vector
from godwit.hw.memory import GuestMemory

DESCRIPTOR = Struct("<QIHH")  # addr, len, flags, next
NEXT, WRITE, INDIRECT = 1, 2, 4
#: Descriptors of an indirect table that are followed. The specification allows the queue's size,
#: but Linux puts more there when the queue is short; vhost and writev stop at UIO_MAXIOV: this.
MAX_INDIRECT = 1024

# A table of descriptors is read as one number, and so an operation on the number is one on all of
# them: Python's cost is by the operation, and a request of 1 MB has some 250 descriptors.
#: In each descriptor: address and length.
_PLACES = int.from_bytes(b"\xff" * 12 + b"\0" * 4, "little") * sum(
    1 << 128 * number for number in range(MAX_INDIRECT)
)
#: In each descriptor: 1.
_ONES = sum(1 << 128 * number for number in range(MAX_INDIRECT))
#: Flags and following of descriptors of which each leads to the one behind it.
_READABLE = b"".join(pack("<HH", NEXT, number + 1) for number in range(MAX_INDIRECT))
_WRITABLE = b"".join(pack("<HH", NEXT | WRITE, number + 1) for number in range(MAX_INDIRECT))


class Chain:
    """One buffer: the views of its parts, the device's to read and the device's to write.

    Attributes:
        head: the buffer's first descriptor, by which the driver knows the buffer.
        readable, writable: the parts.
        writable_at: (guest address, bytes) of each writable part.
    """

    __slots__ = ("_readable", "_writable", "_writable_at", "head")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        writable_at: list[tuple[int, int]],
    ) -> None:
        self.head = head
        self._readable: list[memoryview] | None = readable
        self._writable: list[memoryview] | None = writable
        self._writable_at: list[tuple[int, int]] | None = writable_at

    @property
    def readable(self) -> list[memoryview]:
        """The views of the parts that the device reads."""
        assert self._readable is not None
        return self._readable

    @property
    def writable(self) -> list[memoryview]:
        """The views of the parts that the device writes."""
        assert self._writable is not None
        return self._writable

    @property
    def writable_at(self) -> list[tuple[int, int]]:
        """Guest address and bytes of each part that the device writes."""
        assert self._writable_at is not None
        return self._writable_at

    def read(self, limit: int) -> bytes:
        """Return the readable bytes, at most ``limit``."""
        out = bytearray()
        for part in self.readable:
            out += part[: limit - len(out)]
            if len(out) >= limit:
                break
        return bytes(out)

    @property
    def pieces(self) -> int:
        """The number of parts, readable and writable."""
        return len(self.readable) + len(self.writable)

    def readable_size(self) -> int:
        """Return the number of bytes the device may read."""
        return sum(map(len, self.readable))

    def writable_size(self) -> int:
        """Return the number of bytes the device may write."""
        return sum(map(len, self.writable))

    def size(self) -> int:
        """Return the number of bytes in all."""
        return self.readable_size() + self.writable_size()


class StraightChain(Chain):
    """A buffer of an indirect table whose descriptors follow one another, all in one region.

    Attributes:
        first: the number of parts that the device reads.
        lengths: bytes of each part.
    """

    __slots__ = ("_addresses", "_delta", "_memory", "_size", "_table", "first", "lengths")

    def __init__(
        self,
        head: int,
        memory: GuestMemory,
        table: bytes,
        first: int,
        lengths: list[int],
        addresses: list[int],
        delta: int,
    ) -> None:
        self.head = head
        self.first = first
        self.lengths = lengths
        self._size = sum(lengths)
        self._memory = memory
        self._table = table
        self._addresses = addresses
        #: Host address of a byte, less its guest address.
        self._delta = delta
        self._readable = self._writable = self._writable_at = None

    @property
    def readable(self) -> list[memoryview]:
        """The views of the parts that the device reads."""
        if self._readable is None:
            first = self.first
            self._readable = self._memory.spans(self._addresses[:first], self.lengths[:first])
        return self._readable

    @property
    def writable(self) -> list[memoryview]:
        """The views of the parts that the device writes."""
        if self._writable is None:
            first = self.first
            self._writable = self._memory.spans(self._addresses[first:], self.lengths[first:])
        return self._writable

    @property
    def writable_at(self) -> list[tuple[int, int]]:
        """Guest address and bytes of each part that the device writes."""
        first = self.first
        return list(zip(self._addresses[first:], self.lengths[first:], strict=True))

    @property
    def pieces(self) -> int:
        """The number of parts, readable and writable."""
        return len(self.lengths)

    def readable_size(self) -> int:
        """Return the number of bytes the device may read."""
        return sum(self.lengths[: self.first])

    def writable_size(self) -> int:
        """Return the number of bytes the device may write."""
        return sum(self.lengths[self.first :])

    def size(self) -> int:
        """Return the number of bytes in all."""
        return self._size

    def part(self, index: int) -> memoryview:
        """Return the view of one part, by its number from 0."""
        return self._memory.view(self._addresses[index], self.lengths[index])

    def vector(self, first: int, end: int) -> Vector:
        """Return the parts from ``first`` up to but not ``end``, for the kernel.

        A descriptor is a struct iovec, with a guest address, and flags behind its length.
        """
        if first == end:
            return Vector(b"", 0)
        size = 16 * (end - first)
        descriptors = int.from_bytes(self._table[16 * first : 16 * end], "little")
        ones = _ONES & (1 << 8 * size) - 1
        iovecs = (descriptors & _PLACES) + self._delta * ones
        others = sum(self.lengths[:first]) + sum(self.lengths[end:])
        return Vector(iovecs.to_bytes(size, "little"), self._size - others)


def straight(head: int, table: memoryview, memory: GuestMemory) -> StraightChain | None:
    """Return the buffer of an indirect table, if each descriptor is behind the one before.

    So Linux writes its tables, which are read in one go here. None for any other form, and for
    whatever breaks a rule.
    """
    raw = bytes(table)  # once: the driver may write it meanwhile
    words = memoryview(raw).cast("I")
    first = _first_writable(words[3::4].tobytes())
    if first is None:
        return None
    lengths: list[int] = words[2::4].tolist()
    addresses: list[int] = memoryview(raw).cast("Q")[::2].tolist()
    delta = memory.delta(addresses, max(lengths))
    if delta is None:
        return None
    return StraightChain(head, memory, raw, first, lengths, addresses, delta)


def _first_writable(control: bytes) -> int | None:
    """Return how many of the descriptors are to be read, by the flags and following of each.

    The forms of Linux's drivers: a disk's read, a disk's write, a frame out, space for a frame.
    """
    count = len(control) // 4
    end = 4 * (count - 1)
    last = control[end] | control[end + 1] << 8
    if last not in (0, WRITE):
        return None
    for first in (1, count - 1, 0) if last else (count,):
        if first + bool(last) > count:
            continue
        if control[:end] == _READABLE[: min(4 * first, end)] + _WRITABLE[4 * first : end]:
            return first
    return None
