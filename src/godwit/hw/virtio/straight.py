"""Buffers of the form that Linux's drivers give them, read in one go (virtio 1.2, 2.7.5.3)."""

from __future__ import annotations

from struct import Struct, pack

from godwit.host.iovec import Vector
from godwit.hw.memory import GuestMemory, Region

from .chain import DESCRIPTOR, MAX_INDIRECT, NEXT, WRITE, Chain

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
#: Flags of the first descriptor, whether the inner ones are written (None: there are none), flags
#: of the last -> how many of the parts are read, from 0 on, or from all of them (-1) down.
_FORMS = {
    (NEXT, True, WRITE): 1,  # a disk's read
    (NEXT, False, WRITE): -2,  # a disk's write
    (NEXT, None, WRITE): 1,  # a disk's flush
    (NEXT, False, 0): -1,  # a frame out
    (NEXT, None, 0): -1,
    (NEXT | WRITE, True, WRITE): 0,  # space for a frame
    (NEXT | WRITE, None, WRITE): 0,
}
#: Tables of which is kept what was found.
_KEPT = 64


def _spans(descriptors: bytes) -> tuple[list[int], list[int]]:
    """Return address and length of each of some descriptors."""
    view = memoryview(descriptors)
    return view.cast("Q")[::2].tolist(), view.cast("I")[2::4].tolist()


class StraightChain(Chain):
    """A buffer of an indirect table whose descriptors follow one another, all in one region.

    Attributes:
        first: the number of parts that the device reads.
        ends: the bytes of the first part and of the last.
    """

    __slots__ = ("_inner", "_places", "_region", "_table", "ends", "first")

    def __init__(
        self,
        head: int,
        region: Region,
        table: bytes,
        inner: Inner,
        first: int,
        ends: tuple[int, int],
        places: tuple[int, int],
    ) -> None:
        self.head = head
        self.first = first
        self.ends = ends
        self._region = region
        self._table = table
        self._inner = inner
        #: Where the first part and the last are in the region.
        self._places = places
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
        view, start = self._region.view, self._region.start
        spans = zip(*_spans(self._table[16 * first : 16 * end]), strict=True)
        return [view[at - start : at - start + length] for at, length in spans]

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
        return sum(self.ends) + self._inner.size

    def header(self, layout: Struct) -> tuple[int, ...]:
        """Return the numbers at the begin of the first part, which has the layout's size."""
        return layout.unpack_from(self._region.view, self._places[0])

    def last(self) -> memoryview:
        """Return the view of the last part."""
        at = self._places[1]
        return self._region.view[at : at + self.ends[1]]

    def inner(self) -> Vector:
        """Return the parts between the first and the last, for the kernel."""
        return self._inner.vector(self._region.delta)


class Inner:
    """The descriptors of a table between the first and the last, all of one kind.

    Attributes:
        descriptors: the bytes of the table.
        writable: the device writes them all, else it reads them all. None: there are none.
        low, high: the lowest guest address, and one that no byte reaches.
        size: bytes in all.
    """

    __slots__ = ("_kept", "descriptors", "high", "low", "size", "writable")

    def __init__(self, descriptors: bytes, writable: bool | None) -> None:
        self.descriptors = descriptors
        self.writable = writable
        addresses, lengths = _spans(descriptors)
        self.low = min(addresses, default=1 << 64)
        self.high = max(addresses, default=0) + max(lengths, default=0)
        self.size = sum(lengths)
        #: A delta, and the parts for it. One object, as several threads ask.
        self._kept: tuple[int | None, Vector] = None, Vector(b"", 0)

    def vector(self, delta: int) -> Vector:
        """Return the parts for the kernel, which are all in the region of this ``delta``.

        A descriptor is a struct iovec, with a guest address, and flags behind its length.
        """
        kept, vector = self._kept
        if kept != delta and self.descriptors:
            size = len(self.descriptors)
            ones = _ONES & (1 << 8 * size) - 1
            moved = (int.from_bytes(self.descriptors, "little") & _PLACES) + delta * ones
            vector = Vector(moved.to_bytes(size, "little"), self.size)
            self._kept = delta, vector
        return vector


_NO_INNER = Inner(b"", None)
# Programs that pass the guest's page cache by have few buffers, and use each again and again. A
# buffer is found by its first descriptor, which is quicker than a hash of all, and then compared.
_known: dict[bytes, Inner] = {}


def _find_inner(table: bytes) -> Inner | None:
    """Return the inner descriptors of a table, or None for another form.

    All are of one kind, and each leads to the one behind it, as in Linux's.
    """
    descriptors = table[16:-16]
    if not descriptors:
        return _NO_INNER
    key = table[16:32]
    known = _known.get(key)
    if known is not None and known.descriptors == descriptors:
        return known
    control = memoryview(descriptors).cast("I")[3::4].tobytes()
    writable = bool(control[0] & WRITE)
    if control != (_WRITABLE if writable else _READABLE)[4 : 4 + len(control)]:
        return None
    if len(_known) >= _KEPT:
        _known.clear()
    _known[key] = found = Inner(descriptors, writable)
    return found


def straight(head: int, table: memoryview, memory: GuestMemory) -> StraightChain | None:
    """Return the buffer of an indirect table, if each descriptor is behind the one before.

    So Linux writes its tables, which are read in one go here: a disk's read, a disk's write, a
    frame out, space for a frame. None for any other form, and for whatever breaks a rule.
    """
    raw = bytes(table)  # once: the driver may write it meanwhile
    count = len(raw) // 16
    at, length, flags, following = DESCRIPTOR.unpack_from(raw, 0)
    if count == 1:
        if flags not in (0, WRITE):
            return None
        inner, first, last, length_last = _NO_INNER, int(not flags), at, 0
    else:
        found = _find_inner(raw)
        last, length_last, flags_last, _ = DESCRIPTOR.unpack_from(raw, len(raw) - 16)
        if found is None or following != 1:
            return None
        inner = found
        form = _FORMS.get((flags, inner.writable, flags_last))
        if form is None:
            return None
        first = form if form >= 0 else count + 1 + form
    # A disk's header and status are of each request, and what is between them mostly is not.
    low = min(at, last, inner.low)
    region = memory.region(low, max(at + length, last + length_last, inner.high))
    if region is None:
        return None
    ends, places = (length, length_last), (at - region.start, last - region.start)
    return StraightChain(head, region, raw, inner, first, ends, places)
