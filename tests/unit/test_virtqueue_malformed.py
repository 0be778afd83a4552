"""Rings and chains that break the rules: GuestError, each time, and nothing else."""

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.errors import GuestError
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue
from tests.fakes.driver import INDIRECT, NEXT, WRITE, Driver, write_u16

SIZE = 8
RAM = 32 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM)
    yield memory
    memory.close()


def _pair(memory: GuestMemory, features: int = F_INDIRECT_DESC) -> tuple[Driver, Virtqueue]:
    driver = Driver(memory, SIZE)
    queue = Virtqueue(memory, 256)
    driver.set_up(queue, features)
    return driver, queue


def _table(*descriptors: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<QIHH", *one) for one in descriptors)


def _head_out_of_range(driver: Driver) -> None:
    driver.publish(SIZE)


def _next_out_of_range(driver: Driver) -> None:
    driver.set_descriptor(0, 0x1000, 4, NEXT, SIZE)
    driver.publish(0)


def _loop(driver: Driver) -> None:
    driver.set_descriptor(0, 0x1000, 4, NEXT, 1)
    driver.set_descriptor(1, 0x1000, 4, NEXT, 0)
    driver.publish(0)


def _itself(driver: Driver) -> None:
    driver.set_descriptor(3, 0x1000, 4, NEXT, 3)
    driver.publish(3)


def _indirect_loop(driver: Driver) -> None:
    table = driver.place(_table((0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)))
    driver.set_descriptor(0, table, 32, INDIRECT)
    driver.publish(0)


def _indirect_too_long(driver: Driver) -> None:
    parts = [(0x1000, 1, NEXT, i + 1) for i in range(1024)] + [(0x1000, 1, 0, 0)]
    driver.set_descriptor(0, driver.place(_table(*parts)), 16 * len(parts), INDIRECT)
    driver.publish(0)


def _indirect_next_out_of_range(driver: Driver) -> None:
    table = driver.place(_table((0x1000, 1, NEXT, 1)))
    driver.set_descriptor(0, table, 16, INDIRECT)
    driver.publish(0)


def _nested(driver: Driver) -> None:
    inner = driver.place(_table((0x1000, 1, 0, 0)))
    table = driver.place(_table((inner, 16, INDIRECT, 0)))
    driver.set_descriptor(0, table, 16, INDIRECT)
    driver.publish(0)


def _indirect_with_next(driver: Driver) -> None:
    table = driver.place(_table((0x1000, 1, 0, 0)))
    driver.set_descriptor(0, table, 16, INDIRECT | NEXT, 1)
    driver.set_descriptor(1, 0x1000, 4)
    driver.publish(0)


def _indirect_of(length: int) -> Callable[[Driver], None]:
    def make(driver: Driver) -> None:
        driver.set_descriptor(0, driver.place(64), length, INDIRECT)
        driver.publish(0)

    return make


def _indirect_at(address: int) -> Callable[[Driver], None]:
    def make(driver: Driver) -> None:
        driver.set_descriptor(0, address, 16, INDIRECT)
        driver.publish(0)

    return make


def _readable_last(driver: Driver) -> None:
    driver.set_descriptor(0, 0x1000, 4, WRITE | NEXT, 1)
    driver.set_descriptor(1, 0x1000, 4)
    driver.publish(0)


def _buffer(address: int, length: int) -> Callable[[Driver], None]:
    def make(driver: Driver) -> None:
        driver.set_descriptor(0, address, length)
        driver.publish(0)

    return make


def _too_far_ahead(driver: Driver) -> None:
    driver.added = SIZE
    driver.publish(0)


def _behind(driver: Driver) -> None:
    write_u16(driver.memory, driver.avail + 2, 0xFFFF)


MALFORMED = {
    "head out of range": _head_out_of_range,
    "next out of range": _next_out_of_range,
    "two in a circle": _loop,
    "one in a circle": _itself,
    "circle in an indirect table": _indirect_loop,
    "indirect chain of 1,025": _indirect_too_long,
    "indirect next out of range": _indirect_next_out_of_range,
    "nested indirect": _nested,
    "indirect with next": _indirect_with_next,
    "indirect of 0": _indirect_of(0),
    "indirect of 8": _indirect_of(8),
    "indirect of 24": _indirect_of(24),
    "indirect of 4 GiB": _indirect_of(0xFFFFFFF0),
    "indirect outside RAM": _indirect_at(RAM),
    "indirect wraps": _indirect_at((1 << 64) - 8),
    "readable after writable": _readable_last,
    "buffer outside RAM": _buffer(RAM, 1),
    "buffer over the end of RAM": _buffer(RAM - 4, 5),
    "buffer wraps 2^64": _buffer((1 << 64) - 4, 16),
    "buffer at the top": _buffer((1 << 64) - 1, 1),
    "empty buffer outside RAM": _buffer(1 << 40, 0),
    "avail index too far ahead": _too_far_ahead,
    "avail index behind": _behind,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_chain_is_the_guests_error(memory: GuestMemory, name: str) -> None:
    driver, queue = _pair(memory)
    MALFORMED[name](driver)
    with pytest.raises(GuestError):
        queue.pop()


def test_indirect_must_be_negotiated(memory: GuestMemory) -> None:
    driver, queue = _pair(memory, features=0)
    driver.add_out(b"x", indirect=True)
    with pytest.raises(GuestError, match="indirect"):
        queue.pop()


def test_what_only_looks_malformed_works(memory: GuestMemory) -> None:
    driver, queue = _pair(memory)
    # Direct descriptors may come before the indirect one, whose WRITE flag means nothing (2.7.5.3).
    data = driver.place(b"in the table")
    table = driver.place(_table((data, 12, 0, 0)))
    driver.set_descriptor(0, driver.place(b"first "), 6, NEXT, 1)
    driver.set_descriptor(1, table, 16, INDIRECT | WRITE)
    driver.publish(0)
    chain = queue.pop()
    assert chain is not None
    assert chain.read(99) == b"first in the table"
    # An indirect table longer than the ring: Linux does that with short rings.
    parts = [(data, 1, NEXT, i + 1) for i in range(3 * SIZE)] + [(data, 1, 0, 0)]
    driver.set_descriptor(0, driver.place(_table(*parts)), 16 * len(parts), INDIRECT)
    driver.publish(0)
    chain = queue.pop()
    assert chain is not None
    assert chain.readable_size() == len(parts)
    # The last byte of RAM.
    driver.set_descriptor(0, RAM - 1, 1, WRITE)
    driver.publish(0)
    chain = queue.pop()
    assert chain is not None
    assert chain.writable_size() == 1


@pytest.mark.parametrize("size", [0, 3, 7, 255, 512, 65_535])
def test_sizes_that_are_no_sizes(memory: GuestMemory, size: int) -> None:
    queue = Virtqueue(memory, 256)
    queue.desc, queue.avail, queue.used = 0x1000, 0x2000, 0x3000
    queue.size = size
    with pytest.raises(GuestError, match=f"size {size}"):
        queue.enable(0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("desc", 0x1008),
        ("avail", 0x2001),
        ("used", 0x3002),
        ("desc", RAM),
        ("desc", RAM - 16 * SIZE + 16),
        ("avail", RAM - 4),
        ("used", RAM - 8 * SIZE),
        ("desc", (1 << 64) - 16),
        ("avail", (1 << 64) - 2),
        ("used", 1 << 63),
    ],
)
def test_rings_that_are_no_rings(memory: GuestMemory, field: str, value: int) -> None:
    queue = Virtqueue(memory, 256)
    queue.size = SIZE
    queue.desc, queue.avail, queue.used = 0x1000, 0x2000, 0x3000
    setattr(queue, field, value)
    with pytest.raises(GuestError):
        queue.enable(F_EVENT_IDX)


def test_rings_up_to_the_last_byte_of_ram_are_rings(memory: GuestMemory) -> None:
    queue = Virtqueue(memory, 256)
    queue.size = SIZE
    queue.desc, queue.avail, queue.used = RAM - 16 * SIZE, 0x2000, 0x3000
    queue.enable(F_EVENT_IDX)
    queue.reset()
    queue.size = SIZE
    # Without EVENT_IDX the ring is two bytes shorter, and those may be missing.
    queue.desc, queue.avail, queue.used = 0x1000, 0x2000, RAM - 4 - 8 * SIZE
    queue.enable(0)
    assert queue.pop() is None


_descriptors = st.lists(
    st.tuples(
        st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, RAM + 64)),
        st.one_of(st.integers(0, (1 << 32) - 1), st.integers(0, 64).map(lambda n: 16 * n)),
        st.integers(0, 7),
        st.integers(0, SIZE + 1),
    ),
    min_size=SIZE,
    max_size=SIZE,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    table=_descriptors,
    inner=_descriptors,
    avail=st.lists(st.integers(0, SIZE + 1), min_size=SIZE, max_size=SIZE),
    index=st.one_of(st.integers(0, SIZE), st.integers(0, 65_535)),
    garbage=st.binary(max_size=64),
    features=st.sampled_from([0, F_EVENT_IDX, F_INDIRECT_DESC, F_EVENT_IDX | F_INDIRECT_DESC]),
)
def test_garbage_in_the_rings_is_a_guest_error_or_a_chain_in_ram(
    memory: GuestMemory,
    table: list[tuple[int, int, int, int]],
    inner: list[tuple[int, int, int, int]],
    avail: list[int],
    index: int,
    garbage: bytes,
    features: int,
) -> None:
    driver, queue = _pair(memory, features)
    place = driver.place(_table(*inner) + garbage)
    outer = [(place if flags & INDIRECT else at, n, flags, to) for at, n, flags, to in table]
    memory.write(driver.desc, _table(*outer))
    memory.write(driver.avail + 4, struct.pack(f"<{SIZE}H", *avail))
    write_u16(memory, driver.avail + 2, index)
    try:
        for _ in range(SIZE + 1):
            chain = queue.pop()
            if chain is None:
                break
            assert chain.head < SIZE
            assert all(at + length <= RAM for at, length in chain.writable_at)
            assert len(chain.read(100)) == min(100, chain.readable_size())
            queue.push(chain, min(100, chain.writable_size()))
            queue.should_notify()
    except GuestError:
        pass
