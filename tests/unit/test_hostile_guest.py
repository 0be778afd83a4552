"""Guests that ask for more than their share: of the event loop, of memory, of their operator."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from struct import pack

import pytest

import e1000_bench
import inprocess_bench
import virtio_bench
from godwit.host.loop import Loop, SoonCall
from godwit.host.net.tap import HEADER
from godwit.hw.memory import GuestMemory
from godwit.hw.nic import rx_backlog
from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.nic.tap_reader import BUDGET_BYTES
from godwit.hw.virtio import budget
from godwit.hw.virtio.net.rx_ring import place
from godwit.hw.virtio.queue import F_INDIRECT_DESC, Virtqueue
from godwit.vm.limited_reports import BURST, REFILL_S, LimitedReports
from tests.fakes.driver import INDIRECT, NEXT, WRITE, Driver
from tests.fakes.tap import FakeTap

DATA, TABLE = 0x100_0000, 0x140_0000
CTRL = 2


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(64 << 20)
    yield memory
    memory.close()


def _u16(memory: GuestMemory, address: int, value: int) -> None:
    memory.write(address, value.to_bytes(2, "little"))


def _indirect(memory: GuestMemory, at: int, parts: list[tuple[int, int, int]]) -> None:
    last = len(parts) - 1
    for index, (address, length, flags) in enumerate(parts):
        flags |= NEXT if index < last else 0
        memory.write(at + 16 * index, pack("<QIHH", address, length, flags, index + 1))


def _offer(memory: GuestMemory, driver: Driver, pieces: int, flags: int = 0) -> None:
    """Make each buffer of a ring the same indirect table."""
    for index in range(driver.size):
        driver.set_descriptor(index, TABLE, 16 * pieces, INDIRECT | flags)
        _u16(memory, driver.avail + 4 + 2 * index, index)
    _u16(memory, driver.avail + 2, driver.size)


# --- the event loop ---------------------------------------------------------------------------
def test_a_flood_of_calls_leaves_turns_to_descriptors_and_timers() -> None:
    loop = Loop()
    served: list[str] = []
    read, write = os.pipe()
    os.write(write, b"x")
    loop.watch(read, lambda: served.append("descriptor"))
    loop.call_later(0.0, lambda: served.append("timer"))

    def again() -> None:
        served.append("call")
        loop.call_soon(again)
        loop.call_soon(lambda: served.append("call"))

    for _ in range(10_000):
        loop.call_soon(again)
    loop.run_once(0)
    assert served.count("call") <= 64
    assert {"descriptor", "timer"} <= set(served)
    loop.unwatch(read)
    os.close(read)
    os.close(write)
    loop.close()


def test_a_timer_that_sets_itself_anew_at_once_leaves_turns_to_others() -> None:
    loop = Loop()
    calls: list[int] = []

    def again() -> None:
        calls.append(1)
        loop.call_later(-1.0, again)

    loop.call_later(0.0, again)
    loop.run_once(0)
    loop.run_once(0)
    assert 1 <= len(calls) <= 4
    loop.close()


def test_many_requests_are_one_call_and_one_behind_it_is_another() -> None:
    loop = Loop()
    calls: list[int] = []

    def made() -> None:
        calls.append(1)
        if len(calls) == 1:
            soon.request()

    soon = SoonCall(loop, made)
    for _ in range(1000):
        soon.request()
    assert len(loop._soon) == 1
    loop.run_once(0)
    loop.run_once(0)
    assert len(calls) == 2
    loop.close()


def test_writes_of_an_e1000s_tail_queue_one_call(memory: GuestMemory) -> None:
    bench = e1000_bench.Bench(memory)
    bench.driver.start(regs.RCTL_BAM | 3 << 16)  # buffers of 256 bytes
    bench.driver.offer(1)  # one of them is the controller's: too few for the frame
    bench.tap.put(e1000_bench.BROADCAST + bytes(1508))
    bench.serve()
    for _ in range(1000):
        bench.write(regs.RDT, 1)
    assert len(bench.loop._soon) <= 1
    bench.close()


def test_the_control_queue_gets_a_budget_a_turn(memory: GuestMemory) -> None:
    """64 requests of 64 KB in a thousand pieces held the loop for 0.4 s."""
    bench = virtio_bench.Bench(memory)
    bench.guest.probe(size=64)
    driver = bench.guest.queues[CTRL]
    request = bytes((1, 0)) + (10_900).to_bytes(4, "little") + b"\2\0\0\0\0\1" * 10_900 + bytes(4)
    memory.write(DATA, request)
    size = len(request) // 1000 + 1
    parts = [(DATA + at, min(size, len(request) - at), 0) for at in range(0, len(request), size)]
    parts.append((DATA + 0x4_0000, 1, WRITE))
    _indirect(memory, TABLE, parts)
    _offer(memory, driver, len(parts))
    bench.guest.kick(CTRL)
    bench.serve()
    assert driver.used_index() <= 2
    assert memory.read(DATA + 0x4_0000, 1) == b"\0"
    for _ in range(driver.size):
        bench.serve()  # the rest has its turns without another kick
    assert driver.used_index() == driver.size
    bench.close()


def test_transmitted_frames_get_a_budget_of_pieces_a_turn(memory: GuestMemory) -> None:
    bench = inprocess_bench.Bench(memory, size=256)
    _indirect(memory, TABLE, [(DATA, 12, 0), *((DATA + at, 60, 0) for at in range(1023))])
    _offer(memory, bench.tx, 1024)
    os.eventfd_write(bench.kicks[1], 1)
    bench.loop.run_once(0)
    assert bench.tx.used_index() == budget.PIECES // 1024


def test_an_e1000_sends_so_many_bytes_a_turn(memory: GuestMemory) -> None:
    bench = e1000_bench.Bench(memory, size=512)
    bench.driver.start()
    for index in range(500):
        memory.write(bench.driver.tx + 16 * index, pack("<QQ", DATA, 60_000 | 1 << 24))
    bench.write(regs.TDT, 500)
    assert bench.read(regs.TDBAL + regs.HEAD) == 5  # of 60,000 bytes: over 256 KB
    bench.loop.run_once(0)
    assert bench.read(regs.TDBAL + regs.HEAD) == 10
    bench.close()


def test_received_frames_get_a_budget_of_bytes_a_turn(memory: GuestMemory) -> None:
    bench = inprocess_bench.Bench(memory, size=256)
    for index in range(bench.rx.size):
        bench.rx.set_descriptor(index, DATA, 0x1_0100, WRITE)
        _u16(memory, bench.rx.avail + 4 + 2 * index, index)
    _u16(memory, bench.rx.avail + 2, bench.rx.size)
    bench.backlog.inject([bytes(HEADER) + b"\xff" * 6 + bytes(60_000)] * 64)
    bench.loop.run_once(0)
    assert 0 < bench.rx.used_index() <= BUDGET_BYTES // 60_000 + 1
    for _ in range(64):
        bench.loop.run_once(0)
    assert bench.rx.used_index() == 64


# --- receive buffers ----------------------------------------------------------------------------
class Endless(Virtqueue):
    """A ring whose driver, another vCPU, adds a buffer for each that is taken."""

    driver: Driver

    def pop(self):  # type: ignore[no-untyped-def]
        _u16(self._memory, self.driver.avail + 2, self.last_avail + self.size & 0xFFFF)
        return super().pop()


@pytest.mark.parametrize("length", [1, 3])
def test_a_frame_never_takes_more_buffers_than_the_ring_has(
    memory: GuestMemory, length: int
) -> None:
    """One-byte buffers, added as quickly as they are taken: num_buffers overflowed."""
    driver = Driver(memory, 256, 0x10_0000, event_idx=False, capacity=0x8_0000)
    queue = Endless(memory, 256)
    queue.driver = driver
    driver.set_up(queue, inprocess_bench.MERGE)
    for index in range(driver.size):
        driver.set_descriptor(index, DATA, length, WRITE)
        _u16(memory, driver.avail + 4 + 2 * index, 0)
    before = queue.last_avail
    assert place(queue, bytes(65_566), merge=True)  # dropped
    assert (queue.last_avail, driver.used_index()) == (before, 0)


def test_a_frame_never_takes_more_pieces_than_writev_would(memory: GuestMemory) -> None:
    driver = Driver(memory, 256, 0x10_0000, event_idx=False, capacity=0x8_0000)
    queue = Virtqueue(memory, 256)
    driver.set_up(queue, inprocess_bench.MERGE | F_INDIRECT_DESC)
    _indirect(memory, TABLE, [(DATA + 2 * at, 1, WRITE) for at in range(1000)])
    _offer(memory, driver, 1000)
    assert place(queue, bytes(12) + bytes(60_000), merge=True)  # 61 buffers would do
    assert driver.used_index() == 0
    assert place(queue, bytes(12) + bytes(1500), merge=True)  # two of them
    assert driver.used_index() == 2


# --- memory ---------------------------------------------------------------------------------------
def test_broadcasts_that_the_guest_took_are_not_kept_while_taps_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rx_backlog, "MAX_FRAMES", 100)
    backlog = RxBacklog(FakeTap(), threading.RLock())
    backlog.hold()
    for number in range(1000):
        frame = bytes(HEADER) + b"\xff" * 6 + number.to_bytes(4, "little") + bytes(60_000)
        assert backlog.inject([frame]) == 0
        assert backlog.next() == frame
    assert len(backlog._groups) == 100
    assert all(isinstance(kept, int) for kept in backlog._groups)


# --- the operator -------------------------------------------------------------------------------
def test_guest_errors_are_reported_at_a_rate_and_the_others_counted() -> None:
    now = 0.0
    seen: list[tuple[str, str, int]] = []
    errors = LimitedReports(lambda: now, lambda *one: seen.append(one))
    for number in range(1000):
        errors.add("nic0", str(number))
    assert [message for _, message, _ in seen] == [str(number) for number in range(BURST)]
    errors.add("nic1", "another device has its own")
    assert seen[-1] == ("nic1", "another device has its own", 0)
    now = REFILL_S
    errors.add("nic0", "one more")
    errors.add("nic0", "and no other")
    assert seen[-1] == ("nic0", "one more", 1000 - BURST)
    now = 100 * REFILL_S
    for _ in range(BURST):
        errors.add("nic0", "after a long time")
    assert [suppressed for *_, suppressed in seen[-BURST:]] == [1, *[0] * (BURST - 1)]


def test_a_null_mac_address_is_refused(memory: GuestMemory) -> None:
    bench = virtio_bench.Bench(memory)
    bench.guest.probe()
    assert bench.guest.command(1, 1, bytes(6)) == 1
    assert bench.net.mac == virtio_bench.MAC
    bench.close()
