"""Buffers of the forms that drivers use: read in one go, and given to the kernel as they are."""

from __future__ import annotations

import struct

import pytest

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.chain import MAX_INDIRECT, Chain, StraightChain, straight

_NEXT, _WRITE = 1, 2
_DATA = 0x10_0000


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    memory = GuestMemory(32 << 20)
    memory.write(_DATA, bytes(number % 251 for number in range(64 << 10)))
    return memory


def _table(count: int, first: int) -> memoryview:
    """``count`` descriptors, of which the device reads ``first``."""
    table = b""
    for number in range(count):
        flags = (_WRITE if number >= first else 0) | (_NEXT if number < count - 1 else 0)
        # Neither in order nor neighbours, as the pages of a process.
        place = _DATA + (number * 7 % count) * 48
        table += struct.pack("<QIHH", place, 16, flags, number + 1)
    return memoryview(bytearray(table))


@pytest.mark.parametrize(
    ("count", "first"),
    [
        *((1, 0), (1, 1)),
        *((2, 0), (2, 1), (2, 2)),
        *((3, 1), (3, 2), (258, 1), (258, 257), (20, 20), (17, 0)),
        *((MAX_INDIRECT, 1), (MAX_INDIRECT, MAX_INDIRECT)),
    ],
)
def test_the_forms_of_linux_are_read_in_one_go(memory: GuestMemory, count: int, first: int) -> None:
    chain = straight(5, _table(count, first), memory)
    assert chain is not None
    assert (chain.head, chain.first, chain.pieces) == (5, first, count)
    places = [_DATA + (number * 7 % count) * 48 for number in range(count)]
    bodies = [memory.read(place, 16) for place in places]
    assert [bytes(part) for part in chain.readable] == bodies[:first]
    assert [bytes(part) for part in chain.writable] == bodies[first:]
    assert chain.writable_at == [(place, 16) for place in places[first:]]
    assert (chain.readable_size(), chain.size()) == (16 * first, 16 * count)
    for begin, end in ((0, count), (0, first), (first, count), (min(1, count), count)):
        vector = chain.vector(begin, end)
        assert (vector.read(), vector.size) == (b"".join(bodies[begin:end]), 16 * (end - begin))


@pytest.mark.parametrize("first", [2, 3, 17])
def test_other_forms_are_walked(memory: GuestMemory, first: int) -> None:
    assert straight(0, _table(20, first), memory) is None


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [
        pytest.param(16 * 3, "<Q", 32 << 20, id="outside RAM"),
        pytest.param(16 * 3, "<Q", (1 << 64) - 8, id="at the end of all addresses"),
        pytest.param(16 * 3 + 8, "<I", 0xFFFF_FFFF, id="too long"),
        pytest.param(16 * 3 + 12, "<H", _NEXT, id="read after write"),
        pytest.param(16 * 3 + 12, "<H", 4 | _NEXT | _WRITE, id="indirect in a table"),
        pytest.param(16 * 3 + 12, "<H", _WRITE, id="an end in the middle"),
        pytest.param(16 * 7 + 12, "<H", _NEXT | _WRITE, id="no end"),
        pytest.param(16 * 7 + 12, "<H", 8 | _WRITE, id="an unknown flag"),
        pytest.param(16 * 3 + 14, "<H", 3, id="a circle"),
    ],
)
def test_what_breaks_a_rule_or_may_is_walked(
    memory: GuestMemory, at: int, layout: str, value: int
) -> None:
    table = _table(8, 1)
    struct.pack_into(layout, table, at, value)
    assert straight(0, table, memory) is None


def test_a_table_is_read_once(memory: GuestMemory) -> None:
    table = _table(8, 1)
    chain = straight(0, table, memory)
    assert isinstance(chain, Chain)
    assert isinstance(chain, StraightChain)
    table[:] = b"\xff" * len(table)
    assert chain.vector(1, 8).size == 7 * 16
    assert len(b"".join(chain.writable)) == 7 * 16
