"""virtio-vsock: who has the CID, the event of lost connections, and what a migration's log sees."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, cast

import pytest

from godwit.errors import ConfigError, HostError, StreamError
from godwit.hw.memory import PAGE, GuestMemory
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.vsock.device import VirtioVsock, VsockState
from godwit.spec.config import VmConfig, VsockConfig, parse_devices, parse_vsock
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from tests.fakes.vhost_vsock import FakeVhostVsock
from virtio_bench import ALL, F_EVENT_IDX, NEEDS_RESET, SLOT, Guest

RX, TX, EVENT = 0, 1, 2
Taken = dict[int, FakeVhostVsock]


class Bench:
    """A vsock in a slot, and a guest's driver; ``taken`` is the host."""

    def __init__(self, memory: GuestMemory, cid: int | None = 7, taken: Taken | None = None):
        self.taken: Taken = {} if taken is None else taken
        self.memory, self.board = memory, Board(memory)
        self.vm, self.loop = self.board.vm, self.board.loop
        self.ports, self.mmio, self.bus = self.board.ports, self.board.mmio, self.board.bus
        self.opened: list[FakeVhostVsock] = []
        self.vsock = VirtioVsock("vsock0", cid, memory, self.loop, self._open)
        self.pci = VirtioPci(self.vsock, self.board.slot(SLOT))
        self.guest = Guest(cast(Any, self))

    def _open(self) -> FakeVhostVsock:
        self.opened.append(FakeVhostVsock(self.taken))
        return self.opened[-1]

    @property
    def kernel(self) -> FakeVhostVsock:
        """The device that the kernel serves."""
        (device,) = (one for one in self.opened if one.owned and not one.closed)
        return device

    @property
    def rx(self) -> Driver:
        return self.guest.queues[RX]

    def run(self, features: int = ALL) -> None:
        self.vsock.acquire()
        self.pci.resume()
        self.guest.probe(features)

    def serve(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)

    def offer(self, *lengths: int) -> list[Part]:
        """Give buffers to be received in, each in so many pieces as lengths."""
        parts = self.rx.add_in(*lengths)
        os.eventfd_write(self.pci.kick_fd(RX), 1)
        self.serve()
        return parts

    def marked(self, parts: list[Part]) -> bool:
        """Return whether the log has the pages of these parts, since the last call."""
        log = int.from_bytes(self.vsock.take_log(), "little")
        pages = {page for page in range(self.memory.size // PAGE) if log >> page & 1}
        return {part.address // PAGE for part in parts} <= pages | self.memory.take_log()

    def close(self) -> None:
        self.pci.pause()
        self.pci.close()
        self.board.close()
        assert all(device.closed for device in self.opened)


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- configuration --------------------------------------------------------------------------------
def test_the_option() -> None:
    assert parse_vsock("cid=7", 0) == VsockConfig("vsock0", 7)
    assert parse_vsock("cid=auto,id=s", 0) == VsockConfig("s", None)
    for wrong in ("", "cid=2", "cid=4294967295", "cid=x", "id=s", "cid=-1", "cid=7,port=1"):
        with pytest.raises(ConfigError, match="--vsock"):
            parse_vsock(wrong, 0)
    with pytest.raises(ConfigError, match="2 times --vsock"):
        VmConfig(devices=parse_devices([("--vsock", "cid=7"), ("--vsock", "cid=8")]))


def test_the_guest_sees_its_cid_and_three_queues(bench: Bench) -> None:
    bench.run()
    assert bench.guest.device_config()[:8] == (7).to_bytes(8, "little")
    assert bench.guest.read(0x12, 2) == 3
    assert bench.guest.read_config(0) == 0x1053_1AF4
    assert bench.guest.read_config(8) >> 8 == 0x078000
    assert bench.vsock.offered & 2, "SEQPACKET, as the kernel has it"
    assert bench.kernel.running


# --- the CID --------------------------------------------------------------------------------------
def test_a_cid_is_one_guests(memory: GuestMemory, bench: Bench) -> None:
    bench.vsock.acquire()
    bench.vsock.acquire()
    other = Bench(memory, 7, bench.taken)
    with pytest.raises(HostError, match="CID 7 is another guest's"):
        other.vsock.acquire()
    bench.vsock.release()
    bench.vsock.release()
    other.vsock.acquire()
    assert bench.taken[7] in other.opened
    other.close()


def test_a_cid_that_could_not_be_taken_back_keeps_the_guest_here(bench: Bench) -> None:
    bench.vsock.acquire()
    while bench.vsock.unmovable(False) is None:
        bench.vsock.release()
        assert bench.vsock.unmovable(False) is None, "it has left, and may come back"
        bench.vsock.acquire()
    assert len(bench.opened) == 5
    says = "the CID was given up 4 times .* restart the VM"
    for into_file in (False, True):
        assert re.search(says, bench.vsock.unmovable(into_file) or "")
    with pytest.raises(HostError, match=says):
        bench.vsock.release()
    assert bench.kernel is bench.opened[0], "and the CID is here"


def test_auto_finds_one_that_is_free(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    one = Bench(memory, None)
    one.vsock.acquire()
    two = Bench(memory, None, one.taken)
    two.vsock.acquire()
    assert one.vsock.properties() == {"cid": 1024}
    assert two.vsock.properties() == {"cid": 1025}
    two.vsock.acquire()
    assert two.vsock.cid == 1025
    one.taken.update({cid: FakeVhostVsock(one.taken) for cid in range(1024, 1100) if cid != 1025})
    three = Bench(memory, None, {**one.taken})
    with pytest.raises(HostError, match="another guest's"):
        three.vsock.acquire()
    for bench in (three, two):
        bench.close()
    one.taken.clear()
    one.opened[-1].cid = None
    one.close()


def test_auto_follows_the_source_and_a_number_does_not(memory: GuestMemory) -> None:
    source = Bench(memory, 9)
    source.vsock.acquire()
    there = Bench(memory, None, source.taken)
    there.vsock.follow(source.vsock.properties())
    assert there.vsock.properties() == source.vsock.properties()
    there.vsock.reserve(same_host=True)  # the source has it, and will release it
    with pytest.raises(HostError, match="CID 9"):
        there.vsock.reserve(same_host=False)
    there.vsock.load(VsockState(9))
    source.vsock.release()
    there.vsock.acquire()
    assert there.guest is not None
    assert source.taken.keys() == {9}
    fixed = Bench(memory, 5)
    fixed.vsock.follow({"cid": 9})
    assert fixed.vsock.cid == 5
    with pytest.raises(StreamError, match="cid: 9 in the stream, 5 here"):
        fixed.vsock.load(VsockState(9))
    there.vsock.follow({"cid": 1 << 40})
    assert there.vsock.cid == 9
    for one in (source, there, fixed):
        one.close()


def test_another_host_has_the_cid_reserved_before_the_stop(memory: GuestMemory) -> None:
    there = Bench(memory, None)
    there.vsock.follow({"cid": 9})
    there.vsock.reserve(same_host=False)
    assert there.taken.keys() == {9}
    there.vsock.follow({"cid": 10})  # another source, after the first was refused
    there.vsock.reserve(same_host=False)
    assert there.taken.keys() == {10}
    there.close()


def test_the_cid_is_given_up_as_often_as_there_are_devices(bench: Bench) -> None:
    bench.run()
    for _ in range(4):
        bench.pci.pause()
        bench.vsock.release()
        assert bench.taken == {}
        bench.vsock.acquire()
        bench.pci.resume()
    bench.pci.pause()
    with pytest.raises(HostError, match="restart the VM"):
        bench.vsock.release()
    bench.pci.resume()
    assert bench.taken.keys() == {7}
    assert bench.kernel.running


# --- the event ------------------------------------------------------------------------------------
def test_a_guest_that_arrived_learns_that_its_connections_are_gone(bench: Bench) -> None:
    bench.run()
    events = bench.guest.queues[EVENT]
    (buffer,) = events.add_in(4)
    bench.memory.write(buffer.address, b"\xff" * 4)
    bench.pci.pause()
    bench.pci.resume()
    bench.serve()
    assert events.take_all() == [], "a pause resets nothing"
    bench.pci.pause()
    bench.vsock.relocated()
    bench.pci.resume()
    assert [length for _, length in events.take_all()] == [4]
    assert bench.memory.read(buffer.address, 4) == bytes(4)
    assert bench.guest.interrupts(EVENT + 1) >= 1
    bench.pci.pause()
    bench.pci.resume()
    events.add_in(4)
    bench.guest.kick(EVENT)
    bench.serve()
    assert events.take_all() == [], "it is sent once"


def test_a_guest_that_stays_after_all_learns_it_too(bench: Bench) -> None:
    bench.run()
    bench.guest.queues[EVENT].add_in(8)
    bench.pci.pause()
    bench.vsock.release()
    bench.vsock.acquire()
    bench.pci.resume()
    assert [length for _, length in bench.guest.queues[EVENT].take_all()] == [4]


def test_a_driver_that_begins_has_no_connections(bench: Bench) -> None:
    bench.run()
    bench.pci.pause()
    bench.vsock.relocated()
    bench.pci.resume()
    bench.guest.probe()
    bench.guest.queues[EVENT].add_in(4)
    bench.guest.kick(EVENT)
    bench.serve()
    assert bench.guest.queues[EVENT].take_all() == []


@pytest.mark.parametrize("bad", ["short", "readable"])
def test_an_event_buffer_that_is_none(bench: Bench, bad: str) -> None:
    bench.run()
    events = bench.guest.queues[EVENT]
    if bad == "short":
        events.add_in(3)
    else:
        events.add_out(b"data")
    bench.pci.pause()
    bench.vsock.relocated()
    bench.pci.resume()
    assert bench.guest.status & NEEDS_RESET
    assert [id for id, _ in bench.board.errors] == ["vsock0"]
    assert not bench.kernel.running


# --- the rings ------------------------------------------------------------------------------------
def test_a_driver_without_a_queue(bench: Bench) -> None:
    bench.run()
    bench.guest.status = 0
    bench.guest.status = 3
    bench.guest.accept(bench.guest.offered())
    bench.guest.status = bench.guest.status | 4
    assert "not all three queues" in bench.board.errors[0][1]


def test_a_ring_that_the_kernel_refuses(bench: Bench) -> None:
    bench.vsock.acquire()
    bench.kernel.refuses.add("set_running")
    bench.pci.resume()
    bench.guest.probe()
    assert "refused a ring" in bench.board.errors[0][1]
    assert bench.guest.status & NEEDS_RESET


@pytest.mark.parametrize("features", [ALL, ALL & ~F_EVENT_IDX], ids=["event-idx", "flags"])
def test_all_that_is_received_while_a_migration_logs_is_marked(bench: Bench, features: int) -> None:
    bench.run(features)
    before = [bench.offer(64) for _ in range(3)]
    assert bench.kernel.receive(b"before")
    bench.memory.start_log()
    bench.vsock.start_log()
    bench.serve()
    bench.marked([])
    later = [bench.offer(4, 5000) for _ in range(4)]
    expected = [b"before"]
    for number, parts in enumerate([*before[1:], *later[:3]]):
        data = bytes([number + 1]) * (32 if number < 2 else 4004)
        assert bench.kernel.receive(data)
        bench.serve()
        expected.append(data)
        assert bench.marked(parts), number
    bench.vsock.stop_log()
    assert bench.kernel.receive(b"after")
    got = [length for _, length in bench.rx.take_all()]
    assert got == [len(data) for data in [*expected, b"after"]]
    for parts, data in zip([*before, *later], [*expected, b"after"], strict=True):
        read = b"".join(bench.memory.read(part.address, part.length) for part in parts)
        assert read[: len(data)] == data
    assert bench.guest.interrupts(RX + 1) >= 1
    assert bench.board.errors == []


def test_a_stop_in_the_middle_of_a_migration_loses_no_buffer(
    bench: Bench, memory: GuestMemory
) -> None:
    bench.run()
    bench.memory.start_log()
    bench.vsock.start_log()
    buffers = [bench.offer(100) for _ in range(5)]
    assert bench.kernel.receive(b"first")
    assert bench.kernel.receive(b"second")  # which nobody here has seen by now
    bench.pci.pause()
    assert bench.marked([*buffers[0], *buffers[1]])
    assert (bench.vsock.queues[RX].last_avail, bench.vsock.queues[RX].last_used) == (2, 2)
    there = Bench(memory, None)
    there.pci.load(bench.pci.save())
    there.vsock.acquire()
    there.pci.resume()
    assert there.kernel.receive(b"third")
    assert [length for _, length in bench.rx.take_all()] == [5, 6, 5]
    assert memory.read(buffers[2][0].address, 5) == b"third"
    there.close()


def test_more_buffers_than_the_copy_has_space_for(bench: Bench) -> None:
    bench.run()
    bench.vsock.start_log()
    for _ in range(64):
        bench.rx.add([Part(bench.rx.place(64), 64, True) for _ in range(9)], indirect=True)
    bench.guest.kick(RX)
    bench.serve()
    for number in range(64):
        assert bench.kernel.receive(bytes([number]) * 500), number
        bench.serve()
    assert [length for _, length in bench.rx.take_all()] == [500] * 64
    assert bench.board.errors == []


def test_a_broken_buffer_while_a_migration_logs(bench: Bench) -> None:
    bench.run()
    bench.vsock.start_log()
    bench.rx.add_out(b"to read")
    bench.guest.kick(RX)
    bench.serve()
    assert "a receive buffer" in bench.board.errors[0][1]
    assert not bench.kernel.running
    bench.vsock.stop_log()


def test_the_used_ring_that_the_kernel_writes_is_in_the_log(bench: Bench) -> None:
    bench.run()
    bench.vsock.start_log()
    ring = Part(bench.guest.queues[TX].used, 4)
    assert bench.marked([ring])
    assert bench.marked([ring])
    bench.pci.pause()
    assert not any(bench.vsock.take_log())
