"""A buffer of a virtqueue: a chain of descriptors (virtio 1.2, 2.7.5), checked before."""

from __future__ import annotations

from functools import lru_cache
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
    """

    __slots__ = ("_delta", "_memory", "_size", "_table", "first")

    def __init__(
        self, head: int, memory: GuestMemory, table: bytes, first: int, size: int, delta: int
    ) -> None:
        self.head = head
        self.first = first
        self._memory = memory
        self._table = table
        self._size = size
        #: Host address of a byte, less its guest address.
        self._delta = delta
        self._readable = self._writable = self._writable_at = None

    @property
    def readable(self) -> list[memoryview]:
        """The views of the parts that the device reads."""
        if self._readable is None:
            self._readable = self._views(0, self.first)
        return self._readable

    @property
    def writable(self) -> list[memoryview]:
        """The views of the parts that the device writes."""
        if self._writable is None:
            self._writable = self._views(self.first, self.pieces)
        return self._writable

    def _views(self, first: int, end: int) -> list[memoryview]:
        return self._memory.spans(*_spans(self._table[16 * first : 16 * end]))

    @property
    def writable_at(self) -> list[tuple[int, int]]:
        """Guest address and bytes of each part that the device writes."""
        return list(zip(*_spans(self._table[16 * self.first :]), strict=True))

    @property
    def pieces(self) -> int:
        """The number of parts, readable and writable."""
        return len(self._table) // 16

    def readable_size(self) -> int:
        """Return the number of bytes the device may read."""
        return sum(_spans(self._table[: 16 * self.first])[1])

    def writable_size(self) -> int:
        """Return the number of bytes the device may write."""
        return sum(_spans(self._table[16 * self.first :])[1])

    def size(self) -> int:
        """Return the number of bytes in all."""
        return self._size

    def length(self, index: int) -> int:
        """Return the bytes of one part, by its number from 0."""
        length: int = DESCRIPTOR.unpack_from(self._table, 16 * index)[1]
        return length

    def part(self, index: int) -> memoryview:
        """Return the view of one part, by its number from 0."""
        address, length, _, _ = DESCRIPTOR.unpack_from(self._table, 16 * index)
        return self._memory.view(address, length)

    def vector(self, first: int, end: int) -> Vector:
        """Return the parts from ``first`` up to but not ``end``, for the kernel."""
        if first == end:
            return Vector(b"", 0)
        descriptors = self._table[16 * first : 16 * end]
        return Vector(_iovecs(descriptors, self._delta), _measured(descriptors)[2])


def straight(head: int, table: memoryview, memory: GuestMemory) -> StraightChain | None:
    """Return the buffer of an indirect table, if each descriptor is behind the one before.

    So Linux writes its tables, which are read in one go here. None for any other form, and for
    whatever breaks a rule.
    """
    raw = bytes(table)  # once: the driver may write it meanwhile
    first = _first_writable(memoryview(raw).cast("I")[3::4].tobytes())
    if first is None:
        return None
    # A disk's header and status are of each request, and what is between them mostly is not.
    low, high, size = _measured(raw[16:-16]) if len(raw) > 32 else (1 << 64, 0, 0)
    for at in (0, len(raw) - 16)[: len(raw) // 16]:
        address, length, _, _ = DESCRIPTOR.unpack_from(raw, at)
        low, high, size = min(low, address), max(high, address + length), size + length
    delta = memory.delta(low, high)
    return None if delta is None else StraightChain(head, memory, raw, first, size, delta)


def _spans(descriptors: bytes) -> tuple[list[int], list[int]]:
    """Return address and length of each of some descriptors."""
    view = memoryview(descriptors)
    return view.cast("Q")[::2].tolist(), view.cast("I")[2::4].tolist()


# Programs that pass the guest's page cache by have few buffers, and use each again and again.
@lru_cache(maxsize=32)
def _measured(descriptors: bytes) -> tuple[int, int, int]:
    """Return the lowest address, one that no byte reaches, and the bytes in all."""
    addresses, lengths = _spans(descriptors)
    return min(addresses), max(addresses) + max(lengths), sum(lengths)


@lru_cache(maxsize=32)
def _iovecs(descriptors: bytes, delta: int) -> bytes:
    """Return the same as an array of struct iovec, with addresses of this process.

    A descriptor is a struct iovec, with a guest address, and flags behind its length.
    """
    size = len(descriptors)
    ones = _ONES & (1 << 8 * size) - 1
    moved = (int.from_bytes(descriptors, "little") & _PLACES) + delta * ones
    return moved.to_bytes(size, "little")


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
