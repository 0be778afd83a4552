"""Which pages to send: bitmaps to runs, zeros, three sources of dirt."""

import ctypes
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.hw.memory import HOLE_END, PAGE, GuestMemory
from godwit.machine.machine import Machine
from godwit.migration.ram import dirty_log
from godwit.migration.ram.page_runs import bitmap_runs, pages_in
from godwit.migration.wire.messages import Run

SIZE = 64 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(SIZE)
    yield memory
    memory.close()


class Log:
    """A device's dirty log."""

    def __init__(self, log: bytes) -> None:
        self.log = log
        self.logging = False

    def start_log(self) -> None:
        self.logging = True

    def stop_log(self) -> None:
        self.logging = False

    def take_log(self) -> bytes:
        return self.log


def _machine(memory: GuestMemory, *logs: Log, kvm: dict[int, set[int]] | None = None) -> Machine:
    """As much of a machine as the dirty log needs. ``kvm``: page numbers by slot."""

    def dirty_log(slot: int, address: int) -> None:
        pages = (kvm or {}).get(slot, set())
        size = memory.regions[slot].size // PAGE // 8
        bits = sum(1 << page for page in pages).to_bytes(size, "little")
        ctypes.memmove(address, bits, size)

    machine: Any = SimpleNamespace(
        memory=memory,
        devices=SimpleNamespace(having=lambda capability: logs),
        vm=SimpleNamespace(dirty_log=dirty_log),
        logging=[],
    )
    machine.set_dirty_log = machine.logging.append
    return cast(Machine, machine)


# --- bitmaps --------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 511)), st.sampled_from([0, HOLE_END]))
def test_bitmaps_become_the_shortest_runs(pages: set[int], start: int) -> None:
    bitmap = sum(1 << page for page in pages).to_bytes(64, "little")
    runs = bitmap_runs(bitmap, start)
    covered = [(address - start) // PAGE + i for address, count in runs for i in range(count)]
    assert covered == sorted(pages)
    for (address, count), (following, _) in itertools.pairwise(runs):
        assert address + count * PAGE < following
    assert pages_in(runs) == len(pages)


def test_bitmaps_at_their_limits() -> None:
    assert bitmap_runs(bytes(1 << 17), 0) == []
    assert bitmap_runs(b"\xff" * (1 << 14), 0) == [(0, 1 << 17)]
    assert bitmap_runs(bytearray(b"\0\x80\x01\0\xff"), 0) == [(15 * PAGE, 2), (32 * PAGE, 8)]


# --- zeros ----------------------------------------------------------------------------------------
def test_zeros_are_told_from_data(memory: GuestMemory) -> None:
    seen = [3, 4, 100, 1500]
    for page in seen:
        memory.write(page * PAGE, b"x")
    hidden = [200, 700]
    for page in hidden:  # the gathered bytes do not show
        memory.write(page * PAGE + 777, b"x")
    runs = [(0, 1024), (1400 * PAGE, 200)]
    data, zero = dirty_log.split_zeros(_machine(memory), runs)
    assert sorted(_pages(data) + _pages(zero)) == [*range(1024), *range(1400, 1600)]
    # Three pages are not many, and one is looked for to within so many.
    assert {*seen, *hidden, 0, 1, 2} <= set(_pages(data))
    assert len(_pages(data)) <= len(seen) + 3 + 15 * len(hidden)


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 63, 2048, 4088, 4095])
def test_one_byte_anywhere_makes_data(memory: GuestMemory, offset: int) -> None:
    memory.write(50 * PAGE + offset, b"\1")
    data, zero = dirty_log.split_zeros(_machine(memory), [(0, 100)])
    assert data == ([(48 * PAGE, 8)] if offset else [(50 * PAGE, 1)])
    assert _pages(zero) == [page for page in range(100) if page not in _pages(data)]


@pytest.mark.parametrize("pages", [1, 7, 8, 15, 16, 63, 64, 65, 200])
def test_only_hordes_of_zeros_are_looked_for(memory: GuestMemory, pages: int) -> None:
    run = [(0, pages)]
    assert dirty_log.split_zeros(_machine(memory), run) == ((run, []) if pages < 8 else ([], run))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_split_is_exact_whatever_there_is(data: st.DataObject) -> None:
    memory = GuestMemory(32 << 20)
    try:
        full = data.draw(st.lists(st.tuples(st.integers(0, 2047), st.integers(0, PAGE - 1))))
        for page, offset in full:
            memory.write(page * PAGE + offset, b"\xff")
        cuts = sorted(data.draw(st.sets(st.integers(0, 2048), max_size=8)))
        runs = [(a * PAGE, b - a) for a, b in itertools.pairwise(cuts)][::2]
        dirty, zero = dirty_log.split_zeros(_machine(memory), runs)
        assert sorted(_pages(dirty) + _pages(zero)) == _pages(runs)
        assert not {page for page, _ in full} & set(_pages(zero))
    finally:
        memory.close()


def test_a_large_run_of_zeros_is_found_whole(memory: GuestMemory) -> None:
    assert dirty_log.split_zeros(_machine(memory), [(0, SIZE // PAGE)]) == ([], [(0, SIZE // PAGE)])


# --- the dirty log --------------------------------------------------------------------------------
def _bits(pages: set[int], size: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes(size, "little")


def test_three_sources_are_merged(memory: GuestMemory) -> None:
    size = SIZE // PAGE // 8
    logs = [Log(_bits({7, 8}, size)), Log(_bits({2000}, size))]
    log = dirty_log.DirtyLog(_machine(memory, *logs, kvm={0: {1, 7, 16383}}))
    log.start()
    assert all(one.logging for one in logs)
    memory.write(9 * PAGE, b"own")
    assert log.take() == [(PAGE, 1), (7 * PAGE, 3), (2000 * PAGE, 1), (16383 * PAGE, 1)]
    logs[0].log = bytes(size)
    assert 9 not in _pages(log.take())
    log.stop()
    assert not any(one.logging for one in logs)
    log.stop()
    machine: Any = log._machine
    assert machine.logging == [True, False]


def test_each_region_gets_its_part() -> None:
    memory = GuestMemory(4 << 30)
    try:
        high = HOLE_END // PAGE
        vhost = {5, high, high + 64}
        nic = Log(_bits(vhost, (5 << 30) // PAGE // 8))
        log = dirty_log.DirtyLog(_machine(memory, nic, kvm={0: {4}, 1: {2}}))
        log.start()
        memory.write(HOLE_END + PAGE, b"own")
        memory.write(PAGE, b"own")
        pages = _pages(log.take())
        assert pages == [1, 4, 5, high, high + 1, high + 2, high + 64]
    finally:
        memory.close()


def _pages(runs: list[Run]) -> list[int]:
    return [address // PAGE + i for address, count in runs for i in range(count)]
