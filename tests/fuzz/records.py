"""An input as a list of accesses: each a record with an operation and its operands."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from hypothesis import strategies as st

_RECORD = Struct("<BBHIQ")
SIZE = _RECORD.size
#: The most records of one input that are played.
MOST = 400
SIZES = (1, 2, 4, 8)

#: Values that devices treat in their own way.
VALUES = (0, 1, 2, 3, 4, 7, 8, 15, 16, 64, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF)
VALUES += (0x10_0000, 0x1F_FFF0, 0x1FF_FFFF, 0x200_0000, 0xE000_0000, 0xFEE0_0000)
VALUES += (1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63), (1 << 64) - 1)


class Record(NamedTuple):
    """One access; what the operands mean is the operation's."""

    op: int
    size: int
    a: int = 0
    b: int = 0
    value: int = 0

    @property
    def width(self) -> int:
        """The bytes of an access."""
        return SIZES[self.size % 4]

    @property
    def port_width(self) -> int:
        """The bytes of an access to a port."""
        return SIZES[self.size % 3]

    def limited(self, width: int) -> int:
        """Return the value as far as ``width`` bytes hold it."""
        return self.value & ((1 << 8 * width) - 1)

    def encode(self) -> bytes:
        """Return the record's bytes."""
        return _RECORD.pack(*self)


def read(data: bytes) -> Iterator[Record]:
    """Yield the records of an input; what is left at its end is no record."""
    whole = len(data) // SIZE * SIZE
    for fields in _RECORD.iter_unpack(data[: min(whole, MOST * SIZE)]):
        yield Record(*fields)


def encode(records: list[Record]) -> bytes:
    """Return the bytes of records."""
    return b"".join(record.encode() for record in records)


def strategy(ops: int, head: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Draw inputs of records with ``ops`` operations behind a head."""
    small, values = st.integers(0, 0x100), st.sampled_from(VALUES)
    record = st.builds(
        Record,
        op=st.integers(0, ops - 1),
        size=st.integers(0, 3),
        a=st.one_of(small, st.integers(0, 0xFFFF)),
        b=st.one_of(small, st.integers(0, 0xFFFF_FFFF), values.map(lambda v: v & 0xFFFF_FFFF)),
        value=st.one_of(values, small, st.integers(0, (1 << 64) - 1)),
    )
    return st.builds(lambda first, rest: first + encode(rest), head, st.lists(record, max_size=60))
