"""The in-process backend: frames for the guest."""

import os
from collections.abc import Iterator

import pytest

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.queue import F_EVENT_IDX
from inprocess_bench import ALL, HEADER, MERGE, Bench, make_frame
from tests.fakes.driver import Part


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- receive --------------------------------------------------------------------------------------
def test_frames_arrive_in_order(bench: Bench) -> None:
    buffers = bench.offer(*[1526] * 8)
    for number in range(5):
        bench.tap.put(make_frame(number))
    bench.serve()
    expected = [bytes(10) + b"\1\0" + make_frame(number) for number in range(5)]
    assert bench.received(buffers) == expected
    assert bench.interrupts(0) >= 1


def test_the_header_of_the_tap_is_kept_but_for_its_count(bench: Bench) -> None:
    buffers = bench.offer(1526)
    bench.tap.put(make_frame(1), b"\1\0\x22\0\x10\0\x0e\0\x08\0\xff\xff")
    bench.serve()
    assert bench.received(buffers)[0][:HEADER] == b"\1\0\x22\0\x10\0\x0e\0\x08\0\1\0"


def test_a_long_frame_takes_as_many_buffers_as_it_needs(bench: Bench) -> None:
    buffers = bench.offer(*[1000] * 6)
    frame = os.urandom(3900)
    bench.tap.put(frame)
    bench.tap.put(make_frame(7))
    bench.serve()
    pieces = bench.received(buffers)
    assert [len(piece) for piece in pieces] == [1000, 1000, 1000, 912, 72]
    whole = b"".join(pieces[:4])
    assert whole[10:12] == b"\4\0"
    assert whole[HEADER:] == frame
    assert pieces[4][10:12] == b"\1\0"


def test_a_buffer_may_be_scattered_and_the_header_cut(bench: Bench) -> None:
    lengths = (11, 0, 3, 1500)
    buffers = [bench.rx.add_in(*lengths, indirect=True)]
    bench.kick(0)
    bench.tap.put(make_frame(3))
    bench.serve()
    assert bench.received(buffers) == [bytes(10) + b"\1\0" + make_frame(3)]


@pytest.mark.parametrize("features", [ALL, MERGE], ids=["event idx", "flags"])
def test_a_full_ring_holds_frames_back_until_there_is_space(
    memory: GuestMemory, features: int
) -> None:
    bench = Bench(memory, features)
    try:
        buffers = bench.offer(1526, 1526)
        for number in range(6):
            bench.tap.put(make_frame(number))
        bench.serve()
        got = bench.received(buffers)
        for _ in range(2):
            parts = [bench.rx.add_in(1526) for _ in range(2)]
            assert bench.kick(0), "the device must ask to be told of new buffers"
            bench.serve()
            got += bench.received(parts)
        assert [frame[HEADER:] for frame in got] == [make_frame(number) for number in range(6)]
    finally:
        bench.close()


def test_a_long_frame_waits_for_all_the_buffers_that_it_needs(bench: Bench) -> None:
    buffers = bench.offer(1000, 1000)
    frame = os.urandom(2500)
    bench.tap.put(frame)
    bench.serve()
    assert bench.rx.take_all() == []
    for _ in range(3):  # more buffers do not help until they are enough
        bench.serve()
    buffers += [bench.rx.add_in(1000)]
    assert bench.kick(0)
    bench.serve()
    pieces = bench.received(buffers)
    assert b"".join(pieces)[HEADER:] == frame
    assert pieces[0][10:12] == b"\3\0"


def test_70000_frames_arrive(memory: GuestMemory) -> None:
    bench = Bench(memory, size=64)
    try:
        part = Part(bench.rx.place(1526), 1526, True)
        frame = make_frame(9)
        for _ in range(64):
            bench.rx.add([part])
        bench.kick(0)
        got = 0
        while got < 70_000:
            for _ in range(64):
                bench.tap.put(frame)
            bench.loop.run_once(0)
            taken = bench.rx.take_all()
            assert all(length == HEADER + 60 for _, length in taken)
            for _ in taken:
                bench.rx.add([part])
            bench.kick(0)
            got += len(taken)
        assert not bench.errors
        assert bench.queues[0].last_used == got & 0xFFFF
    finally:
        bench.close()


def test_without_merging_a_frame_that_does_not_fit_is_dropped(memory: GuestMemory) -> None:
    bench = Bench(memory, F_EVENT_IDX)
    try:
        buffers = bench.offer(500, 500)
        bench.tap.put(bytes(600))
        bench.tap.put(make_frame(2))
        bench.serve()
        assert [piece[HEADER:] for piece in bench.received(buffers)] == [make_frame(2)]
        assert not bench.errors
    finally:
        bench.close()


def test_a_frame_longer_than_the_whole_ring_does_not_block_it(bench: Bench) -> None:
    buffers = bench.offer(*[100] * 16)
    bench.tap.put(bytes(2000))
    bench.tap.put(make_frame(2))
    bench.serve()
    assert [piece[HEADER:] for piece in bench.received(buffers)] == [make_frame(2)]


def test_a_frame_that_waits_for_space_outlasts_a_stop(bench: Bench) -> None:
    buffers = bench.offer(1526)
    for number in range(3):
        bench.tap.put(make_frame(number))
    bench.serve()
    bench.backend.stop()
    bench.start()
    bench.serve()
    buffers += bench.offer(1526, 1526)
    assert [piece[HEADER:] for piece in bench.received(buffers)] == [
        make_frame(number) for number in range(3)
    ]


def test_a_frame_that_waits_for_space_is_not_drained(bench: Bench) -> None:
    bench.tap.put(make_frame(1))
    bench.tap.put(make_frame(2))
    bench.serve()
    bench.backend.stop()
    assert bench.backlog.drain() == 1
    bench.start()
    assert [frame[HEADER:] for frame in bench.received(bench.offer(1526))] == [make_frame(1)]


def test_frames_that_are_not_for_the_guest_are_not_delivered(bench: Bench) -> None:
    bench.refused.add(b"\2\0\0\0\0\1")
    buffers = bench.offer(1526, 1526)
    bench.tap.put(b"\2\0\0\0\0\1" + bytes(54))
    bench.tap.put(make_frame(1))
    bench.serve()
    assert [piece[HEADER:] for piece in bench.received(buffers)] == [make_frame(1)]


@pytest.mark.parametrize("parts", [[0], [5], [0, 0], [11]])
def test_a_buffer_without_space_for_the_header_is_a_guest_error(
    memory: GuestMemory, parts: list[int]
) -> None:
    bench = Bench(memory, MERGE)
    try:
        for _ in range(16 // len(parts)):
            bench.rx.add([Part(0x80_0000, length, True) for length in parts])
        bench.kick(0)
        bench.tap.put(make_frame(1))
        bench.serve()
        assert len(bench.errors) == 1  # 5.1.6.3.1: each buffer has space for the header
    finally:
        bench.close()


def test_a_readable_buffer_in_the_receive_ring_is_an_offence(bench: Bench) -> None:
    bench.rx.add_out(bytes(2000))
    bench.kick(0)
    bench.tap.put(make_frame(1))
    bench.serve()
    assert len(bench.errors) == 1


# --- around a move --------------------------------------------------------------------------------
def _whole(number: int) -> bytes:
    return bytes(HEADER) + make_frame(number)


def _numbers(bench: Bench, buffers: list[list[Part]]) -> list[bytes]:
    return [frame[HEADER:] for frame in bench.received(buffers)]


def test_the_tap_waits_while_it_is_held(bench: Bench) -> None:
    buffers = bench.offer(*[1526] * 8)
    bench.backlog.hold()
    bench.tap.put(make_frame(3))
    bench.serve()
    assert bench.rx.used_index() == 0
    assert bench.backlog.inject([_whole(1), _whole(2)]) == 0
    bench.serve()
    assert bench.backlog.release() == 0
    bench.serve()
    assert _numbers(bench, buffers) == [make_frame(number) for number in (1, 2, 3)]
    assert bench.interrupts(0) >= 1


def test_what_was_put_before_a_start_comes_with_it(bench: Bench) -> None:
    buffers = bench.offer(*[1526] * 8)
    bench.backend.stop()
    bench.backlog.inject([_whole(1)])
    bench.tap.put(make_frame(2))
    bench.start()
    bench.serve()
    assert _numbers(bench, buffers) == [make_frame(1), make_frame(2)]


def test_what_goes_first_waits_for_space_too(bench: Bench) -> None:
    bench.backlog.inject([_whole(number) for number in range(100)])
    bench.tap.put(make_frame(100))
    seen: list[bytes] = []
    for _ in range(10):
        seen += _numbers(bench, bench.offer(*[1526] * 11))
    assert seen == [make_frame(number) for number in range(101)]


def test_what_waits_can_be_taken_in_order(bench: Bench) -> None:
    bench.backlog.inject([_whole(1)])
    bench.backend.stop()
    bench.tap.put(make_frame(2))
    bench.tap.put(make_frame(3))
    assert bench.backlog.take(2) == [_whole(1), _whole(2)]
    assert bench.backlog.take(2) == [_whole(3)]
    assert bench.backlog.take(2) == []


def test_what_goes_first_is_filtered_as_the_taps_frames_are(bench: Bench) -> None:
    buffers = bench.offer(1526, 1526)
    bench.refused.add(b"\2\0\0\0\0\1")
    bench.backlog.inject([bytes(HEADER) + b"\2\0\0\0\0\1" + bytes(54), _whole(1)])
    bench.serve()
    assert _numbers(bench, buffers) == [make_frame(1)]
