"""The device's side of a split virtqueue, against a driver that keeps the rules."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.errors import GuestError
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio import queue as queue_module
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue
from godwit.hw.virtio.straight import StraightChain
from tests.fakes.driver import Driver, Part, write_u16

SIZE = 8


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(32 << 20)
    yield memory
    memory.close()


def _pair(memory: GuestMemory, features: int = 0, size: int = SIZE) -> tuple[Driver, Virtqueue]:
    driver = Driver(memory, size, event_idx=bool(features & F_EVENT_IDX))
    queue = Virtqueue(memory, 1024)
    driver.set_up(queue, features)
    return driver, queue


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_EVENT_IDX | F_INDIRECT_DESC])
def test_70000_buffers_go_through_a_small_queue(memory: GuestMemory, features: int) -> None:
    driver, queue = _pair(memory, features, size=4)
    payload = Part(driver.place(b"payload!"), 8)
    answer = Part(driver.place(4), 4, True)
    kicks = interrupts = 0
    for number in range(70_000):
        head = driver.add([payload, answer], indirect=bool(features & F_INDIRECT_DESC))
        kicks += driver.must_kick()
        chain = queue.pop()
        assert chain is not None
        chain.writable[0][:] = number.to_bytes(4, "little")
        queue.push(chain, 4)
        assert queue.pop() is None
        interrupts += queue.should_notify()
        assert driver.take() == (head, 4)
        assert memory.read(answer.address, 4) == number.to_bytes(4, "little")
    # The driver asked for, and got, one interrupt and gave one notification a buffer.
    assert kicks == interrupts == 70_000
    assert driver.used_index() == queue.last_avail == queue.last_used == 70_000 - 65_536


def test_an_empty_queue_has_no_buffer(memory: GuestMemory) -> None:
    _, queue = _pair(memory)
    assert queue.pop() is None


def test_a_chain_shows_its_parts_in_order(memory: GuestMemory) -> None:
    driver, queue = _pair(memory)
    parts = [
        Part(driver.place(b"abc"), 3),
        Part(driver.place(b""), 0),
        Part(driver.place(b"defg"), 4),
        Part(driver.place(5), 5, True),
        Part(driver.place(6), 6, True),
    ]
    head = driver.add(parts)
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, chain.read(100), chain.read(4)) == (head, b"abcdefg", b"abcd")
    assert (chain.readable_size(), chain.writable_size()) == (7, 11)
    assert chain.writable_at == [(parts[3].address, 5), (parts[4].address, 6)]


def test_buffers_may_be_given_back_and_come_again(memory: GuestMemory) -> None:
    driver, queue = _pair(memory)
    heads = [driver.add_out(b"x"), driver.add_out(b"y")]
    for _ in range(3):
        first, second = queue.pop(), queue.pop()
        assert first is not None
        assert second is not None
        assert [first.head, second.head] == heads
        queue.unpop(second, 0)
        queue.unpop(first, 0)


def test_what_was_written_into_buffers_that_are_given_back_is_marked(memory: GuestMemory) -> None:
    """A frame that does not fit leaves bytes in the guest's RAM, which the dirty log lacked."""
    driver, queue = _pair(memory)
    (part,) = driver.add_in(3 * 4096)
    memory.start_log()
    chain = queue.pop()
    assert chain is not None
    queue.unpop(chain, 4097)
    first = part.address // 4096
    assert memory.take_log() == {first, first + 1}
    memory.stop_log()


def test_a_full_ring_is_taken_whole(memory: GuestMemory) -> None:
    driver, queue = _pair(memory)
    heads = [driver.add_out(b"x") for _ in range(SIZE)]
    chains = [queue.pop() for _ in range(SIZE)]
    assert [chain and chain.head for chain in chains] == heads
    for chain in reversed(chains):  # buffers may be used in another order
        assert chain is not None
        queue.push(chain, 0)
    assert [head for head, _ in driver.take_all()] == heads[::-1]


# --- suppression (2.7.7, 2.7.10) ------------------------------------------------------------------
def test_without_event_idx_the_flag_decides(memory: GuestMemory) -> None:
    driver, queue = _pair(memory)
    for flags, wanted in ((0, True), (1, False), (0, True)):
        driver.set_flags(flags)
        driver.add_out(b"x")
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        assert queue.should_notify() is wanted


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_nothing_new_is_no_reason_for_an_interrupt(memory: GuestMemory, features: int) -> None:
    driver, queue = _pair(memory, features)
    assert not queue.should_notify()
    driver.add_out(b"x")
    chain = queue.pop()
    assert chain is not None
    assert not queue.should_notify()
    queue.push(chain, 0)
    assert queue.should_notify()
    assert not queue.should_notify()


@pytest.mark.parametrize("start", [0, 65_533])
def test_used_event_names_the_buffer_that_interrupts(memory: GuestMemory, start: int) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    _go_to(driver, queue, start)
    driver.set_used_event(start + 3)  # when the fourth of these is used
    said = []
    for _ in range(6):
        driver.add_out(b"x")
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        said.append(queue.should_notify())
    # The first decision after a start has nothing to compare with, and is generous.
    assert said[1:] == [False, False, True, False, False]


def test_used_event_passed_within_a_batch_interrupts(memory: GuestMemory) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    _use(driver, queue, 1)
    queue.should_notify()
    driver.set_used_event(3)
    _use(driver, queue, 5)
    assert queue.should_notify()
    driver.set_used_event(3)
    _use(driver, queue, 1)
    assert not queue.should_notify()


def test_avail_event_asks_for_the_next_buffer_only_when_the_ring_is_empty(
    memory: GuestMemory,
) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    assert queue.pop() is None
    assert driver.avail_event() == 0
    driver.add_out(b"x")
    assert driver.must_kick()
    driver.add_out(b"y")
    assert not driver.must_kick()  # the device is at work, it will see it
    for number in (1, 2):
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        assert driver.avail_event() == 0, number
    assert queue.pop() is None
    assert driver.avail_event() == 2
    driver.add_out(b"z")
    assert driver.must_kick()


def test_a_ring_that_vhost_left_asks_for_notifications_again(memory: GuestMemory) -> None:
    """Without EVENT_IDX vhost sets VRING_USED_F_NO_NOTIFY while it polls, and leaves it so."""
    driver, queue = _pair(memory, 0)
    write_u16(memory, driver.used, 1)
    driver.add_out(b"x")
    assert not driver.must_kick()
    assert queue.pop() is not None
    assert queue.pop() is None
    driver.add_out(b"y")
    assert driver.must_kick()


def test_event_idx_ignores_the_flag(memory: GuestMemory) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    driver.set_flags(1)
    _use(driver, queue, 1)
    assert queue.should_notify()


# --- saved state ----------------------------------------------------------------------------------
@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_a_queue_goes_on_where_it_was_saved(memory: GuestMemory, features: int) -> None:
    driver, queue = _pair(memory, features)
    _go_to(driver, queue, 65_534)
    queue.vector = 3
    heads = [driver.add_out(b"1"), driver.add_out(b"2"), driver.add_out(b"3")]
    chain = queue.pop()
    assert chain is not None
    queue.push(chain, 0)
    other = Virtqueue(memory, 1024)
    other.load(queue.save())
    assert other.save() == queue.save()
    assert not other.enabled
    other.enable(features)
    assert other.vector == 3
    for _ in range(2):
        chain = other.pop()
        assert chain is not None
        other.push(chain, 0)
    assert other.should_notify()
    assert [head for head, _ in driver.take_all()] == heads
    assert other.last_used == 1


def test_another_device_may_have_moved_the_used_index(memory: GuestMemory) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    write_u16(memory, driver.used + 2, 777)
    queue.last_avail = 777
    queue.resync_used()
    assert queue.last_used == 777


def test_a_reset_forgets_all(memory: GuestMemory) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    _go_to(driver, queue, 5)
    queue.reset()
    assert not queue.enabled
    assert not queue.ready
    assert queue.save() == Virtqueue(memory, 1024).save()


def test_what_is_written_is_marked_for_the_migration(memory: GuestMemory) -> None:
    driver, queue = _pair(memory, F_EVENT_IDX)
    driver.add_out(b"q")
    parts = driver.add_in(0x1800, 0x1800)
    first, second = queue.pop(), queue.pop()
    assert first is not None
    assert second is not None
    memory.start_log()
    queue.push(first, 0)
    assert memory.take_log() == {driver.used // 4096}
    queue.push(second, 0x1801)
    touched = {driver.used // 4096, parts[1].address // 4096}
    touched |= {page for at in (0, 0x17FF) for page in [(parts[0].address + at) // 4096]}
    assert memory.take_log() == touched
    assert queue.pop() is None
    assert memory.take_log() == {(driver.used + 4 + 8 * SIZE) // 4096}


def test_a_failed_start_leaves_the_queue_disabled(memory: GuestMemory) -> None:
    driver, queue = _pair(memory)
    queue.reset()
    driver.set_up(queue)
    queue.used = memory.size - 4
    with pytest.raises(GuestError):
        queue.enable(0)
    assert not queue.enabled


def _use(driver: Driver, queue: Virtqueue, count: int) -> None:
    for _ in range(count):
        driver.add_out(b"x")
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
    driver.taken += count  # the used event is the test's
    driver._free = list(range(driver.size))


def _go_to(driver: Driver, queue: Virtqueue, index: int) -> None:
    """Both sides at free-running ``index``."""
    driver.added = driver.taken = driver._kicked = index
    queue.last_avail = queue.last_used = index & 0xFFFF
    write_u16(driver.memory, driver.avail + 2, index & 0xFFFF)
    write_u16(driver.memory, driver.used + 2, index & 0xFFFF)


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 5, 16]), st.booleans()), min_size=1
    ),
    order=st.randoms(use_true_random=False),
    straight=st.booleans(),
)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_indirect_table_is_read_alike_in_any_form(
    memory: GuestMemory,
    pieces: list[tuple[int, int, bool]],
    order: random.Random,
    straight: bool,
) -> None:
    """A table in its usual form has a way of its own, in which neighbours become one."""
    table, data = 0x20_0000, 0x30_0000
    memory.write(data, bytes(range(96)))  # each place has a content of its own
    places = list(range(len(pieces)))
    if not straight:
        order.shuffle(places)
    for place, (block, length, write), following in zip(
        places, pieces, [*places[1:], 0], strict=True
    ):
        flags = (2 if write else 0) | (1 if place != places[-1] else 0)
        fields = struct.pack("<QIHH", data + 16 * block, length, flags, following)
        memory.write(table + 16 * place, fields)
    driver = Driver(memory, 16, 0x10_0000)
    queue = Virtqueue(memory, 16)
    driver.set_up(queue, F_INDIRECT_DESC)
    driver.set_descriptor(0, table, 16 * len(pieces), 4)

    def walked(quick: bool) -> tuple[object, ...] | str:
        with pytest.MonkeyPatch.context() as patch:
            if not quick:
                patch.setattr(queue_module, "straight", lambda *_: None)
            try:
                chain = queue.again(0)
            except GuestError as error:
                return str(error)
        if isinstance(chain, StraightChain):
            views = [*chain.readable, *chain.writable]
            assert chain.ends == (len(views[0]), len(views[-1]) if len(views) > 1 else 0)
            if len(views) > 1:
                assert bytes(chain.last()) == bytes(views[-1])
            header = struct.Struct(f"{len(views[0])}s")
            assert chain.header(header) == (bytes(views[0]),)
            inner = chain.inner()
            assert (inner.read(), inner.size) == (b"".join(views[1:-1]), sum(map(len, views[1:-1])))
            assert chain.size() == chain.readable_size() + chain.writable_size()
        marked = sorted({page for at, n in chain.writable_at for page in range(at, at + n)})
        return (
            b"".join(chain.readable),
            sum(map(len, chain.writable)),
            b"".join(chain.writable),
            marked,
        )

    assert walked(True) == walked(False)
