"""Buffers of the forms that drivers use: read in one go, and given to the kernel as they are."""

from __future__ import annotations

import struct

import pytest

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio import straight as straight_module
from godwit.hw.virtio.chain import MAX_INDIRECT, Chain
from godwit.hw.virtio.straight import StraightChain, straight

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
    assert chain.header(struct.Struct("16s")) == (bodies[0],)
    assert bytes(chain.last()) == (bodies[-1] if count > 1 else b"")
    inner = chain.inner()
    assert (inner.read(), inner.size) == (b"".join(bodies[1:-1]), 16 * max(0, count - 2))
    assert chain.ends == (16, 16 if count > 1 else 0)


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
        pytest.param(14, "<H", 2, id="the first leads elsewhere"),
        pytest.param(12, "<H", _WRITE, id="an end at the first"),
        pytest.param(12, "<H", _NEXT | 8, id="an unknown flag of the first"),
        pytest.param(16 * 7 + 12, "<H", 0, id="the last is read"),
        pytest.param(16 * 7, "<Q", 32 << 20, id="the last outside RAM"),
        pytest.param(0, "<Q", 32 << 20, id="the first outside RAM"),
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
    assert chain.inner().size == 6 * 16
    assert len(b"".join(chain.writable)) == 7 * 16


@pytest.mark.parametrize("first", [0, 1, 7, 8])
@pytest.mark.parametrize("at", range(8))
def test_each_part_is_read_or_written_as_its_flag_says(
    memory: GuestMemory, first: int, at: int
) -> None:
    """A part of the other kind makes another form, and with it another buffer or a walk."""
    table = _table(8, first)
    flags = struct.unpack_from("<H", table, 16 * at + 12)[0] ^ _WRITE
    struct.pack_into("<H", table, 16 * at + 12, flags)
    kinds = [number >= first for number in range(8)]
    kinds[at] = not kinds[at]
    usual = kinds in [[number >= boundary for number in range(8)] for boundary in (0, 1, 7, 8)]
    chain = straight(0, table, memory)
    assert (chain is not None) == usual
    if chain is not None:
        assert chain.first == kinds.count(False)


def test_a_table_seen_before_is_not_taken_for_another(memory: GuestMemory) -> None:
    """What is kept of a table goes by all its bytes, and by where the guest's RAM is."""
    other = GuestMemory(64 << 20)
    one, two = _table(8, 1), _table(8, 1)
    struct.pack_into("<Q", two, 16 * 3, _DATA + 4096)
    first, second = straight(0, one, memory), straight(0, two, memory)
    assert first is not None
    assert second is not None
    assert first.inner().read() != second.inner().read()
    low = memoryview(bytearray(bytes(one)))
    for number in range(8):
        struct.pack_into("<Q", low, 16 * number, number * 16)
    here, there = straight(0, low, memory), straight(0, low, other)
    assert here is not None
    assert there is not None
    memory.write(16, b"here")
    other.write(16, b"there")
    assert (here.inner().read()[:4], there.inner().read()[:5]) == (b"here", b"there")


# --- a guest with RAM on both sides of the hole ---------------------------------------------------
_HIGH = 4 << 30


@pytest.fixture(scope="module")
def large() -> GuestMemory:
    """Address space only: no page of it is touched but a few."""
    memory = GuestMemory(4 << 30)
    for region in memory.regions:
        memory.write(region.start + 0x1000, bytes(range(256)))
    return memory


def _request(places: list[int]) -> memoryview:
    """A disk's read, with a header, data and a status at these places."""
    table = b""
    for number, place in enumerate(places):
        last = number == len(places) - 1
        flags = (_WRITE if number else 0) | (0 if last else _NEXT)
        table += struct.pack("<QIHH", place, 16, flags, number + 1)
    return memoryview(bytearray(table))


@pytest.mark.parametrize("start", [0, _HIGH])
def test_all_parts_are_in_one_region(large: GuestMemory, start: int) -> None:
    places = [start + 0x1000 + 16 * number for number in (3, 0, 7, 5)]
    chain = straight(0, _request(places), large)
    assert chain is not None
    contents = [bytes(range(16 * number, 16 * number + 16)) for number in (3, 0, 7, 5)]
    assert [bytes(part) for part in (*chain.readable, *chain.writable)] == contents
    assert chain.header(struct.Struct("16s")) == (contents[0],)
    assert bytes(chain.last()) == contents[3]
    assert chain.inner().read() == contents[1] + contents[2]


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("start", [0, _HIGH])
@pytest.mark.parametrize(
    "elsewhere",
    [
        *(0x1000, _HIGH + 0x1000),  # the other region, of the two
        *(0xD000_0000, _HIGH - 16, _HIGH - 8, (3 << 30) - 8),  # the hole, and its borders
        *((5 << 30) - 8, 5 << 30, (1 << 64) - 16),  # the end of RAM, and of all addresses
    ],
)
def test_a_part_elsewhere_is_walked(
    large: GuestMemory, at: int, start: int, elsewhere: int
) -> None:
    places = [start + 0x1000 + 16 * number for number in range(4)]
    places[at] = elsewhere
    inside = elsewhere - start == 0x1000
    assert (straight(0, _request(places), large) is not None) == inside


def test_few_tables_are_kept(memory: GuestMemory) -> None:
    for number in range(200):
        assert straight(0, _request([_DATA, _DATA + 16 * number, _DATA]), memory) is not None
    assert len(straight_module._known) <= 64
