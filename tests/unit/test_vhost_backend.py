"""Who has a ring: vhost-net, or this process, which puts what goes first into it.

The kernel's part is a stand-in that refuses what the kernel refuses; rings and loop are real.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from godwit.errors import GuestError, HostError
from godwit.host.loop import Loop
from godwit.host.net.tap import HEADER
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.virtio.net.backend import Ring
from godwit.hw.virtio.net.vhost import VhostBackend
from godwit.hw.virtio.queue import F_EVENT_IDX, Virtqueue
from tests.fakes.driver import Driver, Part, write_u16
from tests.fakes.tap import FakeTap
from tests.fakes.vhost import FakeVhost

FEATURES = F_EVENT_IDX | 1 << 15 | 1 << 32
SIZE = 16


def frame(number: int, length: int = 60) -> bytes:
    return bytes(HEADER) + b"\x02" * 12 + number.to_bytes(4, "little").ljust(length - 12, b"\0")


class Bench:
    """The backend, its device, and a guest's driver of both rings."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory, self.loop, self.tap, self.device = memory, Loop(), FakeTap(), FakeVhost()
        self.errors: list[str] = []
        lock = threading.RLock()
        self.backlog = RxBacklog(self.tap, lock)
        self.backend = VhostBackend(
            self.tap,
            self.backlog,
            memory,
            self.loop,
            lock,
            self.errors.append,
            lambda: self.device,
        )
        self.rx, self.tx = (
            Driver(memory, SIZE, 0x10_0000 * (i + 1), event_idx=True, capacity=0x8_0000)
            for i in range(2)
        )
        self.queues = [Virtqueue(memory, 256) for _ in range(2)]
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        for driver, queue in zip((self.rx, self.tx), self.queues, strict=True):
            driver.set_up(queue, FEATURES)
        self.buffers: list[list[Part]] = []

    def start(self) -> None:
        rings = (Ring(*one) for one in zip(self.queues, self.kicks, self.calls, strict=True))
        self.backend.start(FEATURES, *rings)

    def offer(self, count: int, length: int = 2048) -> None:
        """Receive buffers; the guest notifies if it is asked to."""
        self.buffers += [self.rx.add_in(length) for _ in range(count)]
        if self.rx.must_kick():
            os.eventfd_write(self.kicks[0], 1)
        for _ in range(4):
            self.loop.run_once(0)

    def received(self) -> list[bytes]:
        """What the guest got since the last call."""
        frames = []
        for _, length in self.rx.take_all():
            parts = self.buffers.pop(0)
            data = b"".join(self.memory.read(part.address, part.length) for part in parts)
            frames.append(data[:length])
        return frames

    def interrupted(self) -> bool:
        try:
            return os.eventfd_read(self.calls[0]) > 0
        except BlockingIOError:
            return False

    @property
    def vhost_receives(self) -> bool:
        return self.device.backends[0] == self.tap.fd

    def close(self) -> None:
        self.backend.close()
        self.tap.close()
        for fd in self.kicks + self.calls:
            os.close(fd)
        self.loop.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    memory = GuestMemory(32 << 20)
    bench = Bench(memory)
    yield bench
    bench.close()
    memory.close()


def without_count(data: bytes) -> bytes:
    """A received frame as it was sent: num_buffers, at 10, is the device's to say."""
    return data[:10] + bytes(2) + data[12:]


def test_both_rings_are_vhosts_where_nothing_goes_first(bench: Bench) -> None:
    bench.start()
    assert bench.device.backends == [bench.tap.fd] * 2
    bench.backend.stop()
    assert bench.device.backends == [-1, -1]


def test_what_goes_first_is_in_the_ring_before_vhost_has_it(bench: Bench) -> None:
    bench.offer(4)
    bench.backlog.hold()
    bench.start()
    assert bench.device.backends == [-1, bench.tap.fd]
    assert bench.backlog.inject([frame(1), frame(2)]) == 0
    assert [without_count(data) for data in bench.received()] == [frame(1), frame(2)]
    assert bench.interrupted()
    assert not bench.vhost_receives
    bench.backlog.release()
    assert bench.vhost_receives
    # It goes on after the two buffers that were used here.
    assert bench.device.done[-2:] == [("base", 0, 2), ("backend", 0, bench.tap.fd)]


def test_frames_that_came_before_the_start_are_given_at_the_start(bench: Bench) -> None:
    bench.offer(4)
    bench.backlog.hold()
    bench.backlog.inject([frame(1)])
    bench.backlog.release()
    bench.start()
    assert [without_count(data) for data in bench.received()] == [frame(1)]
    assert bench.vhost_receives


def test_a_full_ring_keeps_vhost_waiting_until_the_guest_makes_space(bench: Bench) -> None:
    bench.backlog.hold()
    bench.start()
    bench.offer(1)
    bench.backlog.inject([frame(number) for number in range(3)])
    bench.backlog.release()
    assert [without_count(data) for data in bench.received()] == [frame(0)]
    assert not bench.vhost_receives
    bench.offer(1)
    assert [without_count(data) for data in bench.received()] == [frame(1)]
    assert not bench.vhost_receives
    bench.offer(3)
    assert [without_count(data) for data in bench.received()] == [frame(2)]
    assert bench.vhost_receives
    assert bench.device.bases[0] == 3


def test_a_late_frame_takes_the_ring_back_and_returns_it(bench: Bench) -> None:
    bench.offer(8)
    bench.start()
    bench.device.done.clear()
    bench.device.bases[0] = 0
    bench.backlog.inject([frame(7)])
    assert [without_count(data) for data in bench.received()] == [frame(7)]
    assert bench.device.done == [
        ("backend", 0, -1),
        ("base", 0, 1),
        ("backend", 0, bench.tap.fd),
    ]


def test_a_late_frame_goes_in_after_what_vhost_used(bench: Bench) -> None:
    bench.offer(8)
    bench.start()
    # vhost received three frames meanwhile: it has moved on, and so has the used ring.
    bench.device.bases[0] = 3
    write_u16(bench.memory, bench.rx.used + 2, 3)
    bench.backlog.inject([frame(7)])
    assert bench.rx.used_index() == 4
    assert bench.device.bases[0] == 4
    at = bench.rx.used + 4 + 8 * 3
    assert int.from_bytes(bench.memory.read(at, 4), "little") == 3  # the fourth buffer


def test_a_stop_learns_only_of_the_rings_that_vhost_had(bench: Bench) -> None:
    bench.offer(4)
    bench.backlog.hold()
    bench.start()
    bench.backlog.inject([frame(1)])
    bench.device.bases[0] = 99  # of an earlier life: nobody asks
    bench.backend.stop()
    assert bench.queues[0].last_avail == 1
    assert bench.device.backends == [-1, -1]


def test_a_stop_while_the_ring_is_full_watches_for_space_no_more(bench: Bench) -> None:
    bench.backlog.hold()
    bench.start()
    bench.backlog.inject([frame(1)])
    bench.backend.stop()
    bench.offer(2)
    assert bench.received() == []
    assert bench.backlog.take(10) == [frame(1)]


def test_another_interrupt_is_told_to_vhost_and_used_here(bench: Bench) -> None:
    bench.offer(4)
    bench.backlog.hold()
    bench.start()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        bench.backend.set_call(0, other)
        assert bench.device.calls[0] == other
        bench.backlog.inject([frame(1)])
        assert os.eventfd_read(other) == 1
        assert not bench.interrupted()
    finally:
        os.close(other)


@pytest.mark.parametrize("refused", ["set_features", "set_addresses", "set_backend 1"])
def test_rings_that_vhost_refuses_are_nobodys(bench: Bench, refused: str) -> None:
    bench.device.refuses.add(refused)
    with pytest.raises(GuestError, match=f"vhost-net refused a ring.*{refused}"):
        bench.start()
    assert bench.device.backends == [-1, -1]
    bench.device.refuses.clear()
    bench.start()
    assert bench.vhost_receives


def test_a_receive_ring_that_vhost_refuses_takes_the_other_back(bench: Bench) -> None:
    bench.device.refuses.add("set_backend 0")
    with pytest.raises(GuestError, match="set_backend 0"):
        bench.start()
    assert bench.device.backends == [-1, -1]


def test_a_ring_that_vhost_refuses_later_is_an_offence_and_no_error(bench: Bench) -> None:
    bench.backlog.hold()
    bench.start()
    bench.device.refuses.add("set_backend 0")
    bench.backlog.release()
    assert bench.errors == ["receive ring: [Errno 14] set_backend 0"]


def test_a_receive_buffer_without_space_is_a_guest_error(bench: Bench) -> None:
    bench.rx.add([Part(bench.rx.place(16), 16)])  # one that the device may not write
    bench.backlog.hold()
    bench.start()
    bench.backlog.inject([frame(1)])
    assert len(bench.errors) == 1
    assert not bench.vhost_receives


def test_a_host_whose_vhost_fails_hears_of_the_other_backend() -> None:
    memory, device = GuestMemory(32 << 20), FakeVhost()
    device.refuses.add("set_memory")
    tap, loop, lock = FakeTap(), Loop(), threading.RLock()
    try:
        with pytest.raises(HostError, match="vhost=off"):
            VhostBackend(tap, RxBacklog(tap, lock), memory, loop, lock, print, lambda: device)
        assert device.closed
    finally:
        tap.close()
        loop.close()
        memory.close()


# --- a tap that is gone ---------------------------------------------------------------------------
def test_what_vhost_took_for_a_lost_tap_is_returned_to_the_guest(bench: Bench) -> None:
    """vhost takes frames of a tap that is gone, and never returns their buffers."""
    bench.start()
    heads = [bench.tx.add_out(frame(number)) for number in range(4)]
    bench.device.bases[1] = 3
    bench.tap.delete()
    bench.backlog.check()
    assert bench.device.backends[1] == -1
    assert [head for head, _ in bench.tx.take_all()] == heads
    # And so is all that follows, whenever the guest notifies.
    more = [bench.tx.add_out(frame(number)) for number in range(3)]
    assert bench.tx.must_kick()
    os.eventfd_write(bench.kicks[1], 1)
    bench.loop.run_once(0)
    assert [head for head, _ in bench.tx.take_all()] == more
    assert bench.errors == []
    # A migration takes over where the guest is.
    bench.backend.stop()
    assert bench.queues[1].last_avail == bench.queues[1].last_used == 7
    bench.start()
    assert bench.device.backends == [-1, -1], "there is nothing to serve"
    bench.backend.stop()


def test_a_tap_that_was_lost_unnoticed_costs_no_frame_at_the_destination(bench: Bench) -> None:
    bench.start()
    for number in range(4):
        bench.tx.add_out(frame(number))
    bench.device.bases[1] = 3
    bench.tap.delete()
    bench.backend.stop()
    assert bench.queues[1].last_avail == 0, "they are sent there"


def test_a_guest_that_floods_a_lost_tap_leaves_others_their_turn(bench: Bench) -> None:
    bench.start()
    bench.tap.delete()
    bench.backlog.check()
    for _ in range(20):
        count = 0
        while count < SIZE:
            bench.tx.add_out(frame(count))
            count += 1
        os.eventfd_write(bench.kicks[1], 1)
        bench.loop.run_once(0)
        assert len(bench.tx.take_all()) == SIZE


def test_a_broken_ring_of_a_lost_tap_is_a_guest_error_and_the_loss_is_reported(
    bench: Bench,
) -> None:
    bench.start()
    lost: list[str] = []
    bench.backlog.on_lost = lambda: lost.append("tap")
    bench.backend._on_guest_error = lambda message: bench.backend.stop()
    bench.tx.add_out(frame(1))
    bench.memory.write(bench.queues[1].desc, b"\xff" * 16)
    bench.tap.delete()
    bench.backlog.check()
    assert lost == ["tap"]
