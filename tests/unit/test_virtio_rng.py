"""virtio-rng: random bytes, a rate limit, and what a hostile driver gets. A real ring, no KVM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from godwit.errors import ConfigError
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.rng import VirtioRng
from godwit.spec.config import RngConfig, parse_rng
from tests.fakes.clock import FakeClock
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from virtio_bench import NEEDS_RESET, SLOT, Guest


class Bench:
    """The device and a guest's driver; time passes by hand."""

    def __init__(self, memory: GuestMemory, max_bytes: int | None = None) -> None:
        self.memory, self.board, self.clock = memory, Board(memory), FakeClock()
        self.vm, self.loop = self.board.vm, self.board.loop
        self.ports, self.mmio, self.bus = self.board.ports, self.board.mmio, self.board.bus
        self.loop.call_later = self.clock.call_later  # type: ignore[assignment]
        self.rng = VirtioRng("rng0", memory, self.loop, max_bytes, 1.0)
        self.pci = VirtioPci(self.rng, self.board.slot(SLOT))
        self.pci.resume()
        self.guest = Guest(cast(Any, self))
        self.guest.probe()

    @property
    def driver(self) -> Driver:
        return self.guest.queues[0]

    def ask(self, *lengths: int) -> list[list[Part]]:
        """Ask for bytes; returns the buffers."""
        parts = [self.driver.add_in(length) for length in lengths]
        if self.driver.must_kick():
            self.guest.kick(0)
        self.serve()
        return parts

    def given(self) -> list[int]:
        """How many bytes were given to each request that was answered since the last call."""
        return [length for _, length in self.driver.take_all()]

    def serve(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)

    def close(self) -> None:
        self.pci.pause()
        self.pci.close()
        self.board.close()


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


@pytest.fixture
def limited(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory, max_bytes=100)
    yield bench
    bench.close()


def test_each_request_gets_bytes_that_nobody_had_before(bench: Bench) -> None:
    buffers = bench.ask(64, 64, 16)
    assert bench.given() == [64, 64, 16]
    assert bench.guest.interrupts(1) >= 1
    got = [bench.memory.read(part.address, part.length) for (part,) in buffers]
    assert len({*got, bytes(64)}) == 4
    assert len(set(got[0])) > 16, "64 random bytes have more than 16 values but once in an age"
    assert bench.rng.counters() == {"requests": 3, "bytes": 144}


def test_buffers_in_pieces_are_filled_in_order(bench: Bench) -> None:
    parts = bench.driver.add_in(5, 0, 11, 16)
    bench.guest.kick(0)
    bench.serve()
    assert bench.given() == [32]
    assert all(
        bench.memory.read(part.address, part.length) != bytes(part.length)
        for part in parts
        if part.length > 4
    )


def test_a_large_request_gets_a_part(bench: Bench) -> None:
    ((part,),) = bench.ask(5000)
    assert bench.given() == [1024]
    assert bench.memory.read(part.address + 1024, 100) == bytes(100)


def test_more_than_a_turns_worth_is_answered_all_the_same(bench: Bench) -> None:
    for _ in range(10):
        bench.ask(*[8] * 60)
        assert bench.given() == [8] * 60


def test_what_is_written_is_marked_for_a_migration(bench: Bench) -> None:
    bench.memory.start_log()
    ((part,),) = bench.ask(64)
    assert part.address // 4096 in bench.memory.take_log()
    bench.memory.stop_log()


def test_beyond_the_limit_a_request_waits_for_the_next_period(limited: Bench) -> None:
    limited.ask(64, 64, 64, 64)
    assert limited.given() == [64, 36]
    limited.clock.advance(0.9)
    assert limited.given() == []
    limited.clock.advance(0.1)
    assert limited.given() == [64, 36]


def test_a_period_begins_with_its_first_request(limited: Bench) -> None:
    limited.ask(60)
    limited.clock.advance(1.0)
    limited.ask(60)  # within the limit, as the first period is over
    assert limited.given() == [60, 60]
    assert limited.clock.pending == [1.0]


def test_nothing_is_given_while_it_is_paused_and_the_limit_holds_after_it(limited: Bench) -> None:
    limited.ask(100, 50)
    assert limited.given() == [100]
    limited.pci.pause()
    limited.clock.advance(10.0)
    assert limited.given() == []
    limited.pci.resume()
    limited.serve()
    assert limited.given() == []
    limited.clock.advance(1.0)
    assert limited.given() == [50]


@pytest.mark.parametrize("wrong", ["to read", "none", "both"])
def test_a_request_that_breaks_the_rules_stops_the_device(bench: Bench, wrong: str) -> None:
    at = bench.driver.place(64)
    parts = {
        "to read": [Part(at, 64)],
        "none": [Part(at, 0, True)],
        "both": [Part(at, 8), Part(at + 8, 8, True)],
    }[wrong]
    bench.driver.add(parts)
    bench.guest.kick(0)
    bench.serve()
    assert bench.guest.status & NEEDS_RESET
    assert bench.board.errors == [
        ("rng0", "request queue: a request needs a buffer to write to, and no other")
    ]
    bench.guest.probe()
    bench.ask(16)
    assert bench.given() == [16]


def test_the_option() -> None:
    assert parse_rng("id=dice", 0) == RngConfig("dice")
    assert parse_rng("max-bytes=4096,period=500", 1) == RngConfig("rng1", 4096, 500)
    for text, says in (
        ("max-bytes=0", "a number from 1"),
        ("period=70000,max-bytes=1", "1 to 60000"),
        ("period=10", "has no effect without max-bytes"),
        ("source=/dev/random", "KEY=VALUE with id, max-bytes, period"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse_rng(text, 0)
