"""A buffer of a virtqueue: a chain of descriptors (virtio 1.2, 2.7.5), checked before."""

from __future__ import annotations

from struct import Struct

DESCRIPTOR = Struct("<QIHH")  # addr, len, flags, next
NEXT, WRITE, INDIRECT = 1, 2, 4
#: Descriptors of an indirect table that are followed. The specification allows the queue's size,
#: but Linux puts more there when the queue is short; vhost and writev stop at UIO_MAXIOV: this.
MAX_INDIRECT = 1024


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
