"""The in-process backend: frames of the guest, and its start and stop."""

import os
from collections.abc import Iterator

import pytest

from godwit.hw.capabilities import LogsDirtyPages
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.chain import Chain
from godwit.hw.virtio.net import offloads
from godwit.hw.virtio.queue import F_INDIRECT_DESC
from inprocess_bench import ALL, HEADER, MERGE, Bench, make_frame
from tests.fakes.driver import Part


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- transmit -------------------------------------------------------------------------------------
@pytest.mark.parametrize("indirect", [False, True])
def test_frames_leave_in_order_with_their_header(bench: Bench, indirect: bool) -> None:
    header = bytes(range(HEADER))
    for number in range(5):
        bench.tx.add_out(header, make_frame(number), b"tail", indirect=indirect)
    assert bench.kick(1)
    bench.serve()
    assert [bench.tap.get() for _ in range(6)] == [
        *(header + make_frame(number) + b"tail" for number in range(5)),
        None,
    ]
    assert [length for _, length in bench.tx.take_all()] == [0] * 5
    assert bench.interrupts(1) == 1


@pytest.mark.parametrize("features", [ALL, MERGE | F_INDIRECT_DESC], ids=["event idx", "flags"])
def test_70000_frames_leave(memory: GuestMemory, features: int) -> None:
    bench = Bench(memory, features, size=256)
    try:
        part = Part(bench.tx.place(bytes(HEADER) + make_frame(1)), HEADER + 60)
        sent = 0
        while bench.tx.taken < 70_000:
            for _ in range(64):
                bench.tx.add([part])
            bench.kick(1)
            bench.loop.run_once(0)
            while bench.tap.get() is not None:
                sent += 1
            bench.tx.take_all()
        assert sent == bench.tx.taken
        assert not bench.errors
    finally:
        bench.close()


def test_more_than_a_turns_worth_goes_on_in_the_next(memory: GuestMemory) -> None:
    bench = Bench(memory, size=256)
    try:
        part = Part(bench.tx.place(bytes(HEADER) + make_frame(1)), HEADER + 60)
        for _ in range(200):
            bench.tx.add([part])
        bench.kick(1)
        bench.loop.run_once(0)
        first = len(bench.tx.take_all())
        assert 0 < first < 200
        bench.serve()
        assert first + len(bench.tx.take_all()) == 200
    finally:
        bench.close()


def test_a_network_that_takes_nothing_loses_frames_not_buffers(bench: Bench) -> None:
    while True:
        try:
            os.write(bench.tap.fd, bytes(60_000))
        except BlockingIOError:
            break
    bench.tx.add_out(bytes(HEADER), make_frame(1))
    bench.kick(1)
    bench.serve()
    assert len(bench.tx.take_all()) == 1
    assert not bench.errors


def test_a_frame_too_long_for_any_network_is_an_offence(bench: Bench) -> None:
    at = bench.tx.place(bytes(0x4000))
    bench.tx.add([Part(at, 0x4000)] * 5, indirect=True)
    bench.kick(1)
    bench.serve()
    assert "81920" in bench.errors[0]


# --- start, stop, interrupts ----------------------------------------------------------------------
def test_stopped_it_moves_nothing_and_started_again_it_goes_on(bench: Bench) -> None:
    buffers = bench.offer(1526, 1526)
    bench.backend.stop()
    bench.backend.stop()
    bench.tap.put(make_frame(1))
    bench.tx.add_out(bytes(HEADER), make_frame(2))
    bench.kick(1)
    bench.serve()
    assert bench.rx.take_all() == []
    assert bench.tap.get() is None
    bench.start()
    bench.serve()
    assert [piece[HEADER:] for piece in bench.received(buffers)] == [make_frame(1)]
    assert bench.tap.get() == bytes(HEADER) + make_frame(2)


def test_interrupts_may_go_elsewhere_or_nowhere(bench: Bench) -> None:
    for fd, expected in ((bench.calls[2], 1), (-1, 0)):
        bench.backend.set_call(1, fd)
        bench.tx.add_out(bytes(HEADER), make_frame(1))
        bench.kick(1)
        bench.serve()
        bench.tx.take_all()
        assert bench.interrupts(1) == 0
        assert bench.interrupts(2) == expected


def test_the_drain_throws_away_what_waits(bench: Bench) -> None:
    bench.backend.stop()
    for number in range(5):
        bench.tap.put(make_frame(number))
    assert bench.backlog.drain() == 5
    assert bench.backlog.drain() == 0
    buffers = bench.offer(1526)
    bench.start()
    bench.serve()
    assert bench.received(buffers) == []


def test_features_are_those_of_the_tap(bench: Bench) -> None:
    assert bench.backend.features & MERGE
    assert bench.backend.features & offloads.GUEST_TSO6
    assert not bench.backend.features & offloads.GUEST_UFO
    assert not isinstance(bench.backend, LogsDirtyPages), "guest memory has the log"


def test_what_arrives_is_marked_for_a_migration(bench: Bench) -> None:
    buffers = bench.offer(1526)
    bench.memory.start_log()
    bench.tap.put(make_frame(1))
    bench.serve()
    assert buffers[0][0].address // 4096 in bench.memory.take_log()
    bench.memory.stop_log()


def test_a_frame_that_is_held_back_is_used_up_and_not_sent(bench: Bench) -> None:
    seen: list[bytes] = []

    def outgoing(chain: Chain) -> list[bytes]:
        seen.append(chain.read(1 << 16))
        return [seen[-1]] if len(seen) % 2 == 0 else []

    bench.outgoing = outgoing
    for number in range(4):
        bench.tx.add_out(bytes(HEADER), make_frame(number))
    bench.kick(1)
    bench.serve()
    assert seen == [bytes(HEADER) + make_frame(number) for number in range(4)]
    assert [bench.tap.get() for _ in range(3)] == [
        bytes(HEADER) + make_frame(1),
        bytes(HEADER) + make_frame(3),
        None,
    ]
    assert len(bench.tx.take_all()) == 4
