"""The destination's RAM: populated ahead, wanted parts first, the rest given back."""

import os
import time
from collections.abc import Iterator

import pytest

from godwit.hw.memory import HUGE, PAGE, GuestMemory, Region
from godwit.migration.ram import prefault as touch
from godwit.migration.ram.prefault import Prefault

SIZE = 64 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(SIZE)
    yield memory
    memory.close()


def _populated(memory: GuestMemory) -> set[int]:
    """Numbers of the huge pages of RAM that exist, by the kernel's word."""
    found = set()
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        region: Region = memory.regions[0]
        for block in range(SIZE // HUGE):
            entries = os.pread(pagemap.fileno(), 4096, (region.host + block * HUGE) // PAGE * 8)
            if any(entry & 0xC0 for entry in entries[7::8]):
                found.add(block)
    return found


def _available(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(touch, "_available", lambda: size)


def test_what_is_wanted_stays_and_the_rest_is_given_back(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _available(monkeypatch, 1 << 40)
    toucher = Prefault(memory)
    toucher.start()
    memory.write(40 << 20, b"data")
    toucher.want([memory.view(10 << 20, 3 * PAGE), memory.view((20 << 20) - PAGE, 2 * PAGE)])
    toucher.use([memory.view(40 << 20, PAGE)])
    deadline = time.monotonic() + 10
    while not toucher.idle:
        assert time.monotonic() < deadline
    toucher.finish()
    assert _populated(memory) <= {5, 9, 10, 20}
    assert 20 in _populated(memory)
    assert memory.read(40 << 20, 4) == b"data"
    assert toucher.finished


def test_without_memory_to_spare_only_what_is_wanted_is_populated(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _available(monkeypatch, 0)
    toucher = Prefault(memory)
    toucher.want([memory.view(0, PAGE), memory.view(SIZE - PAGE, PAGE)])
    ahead = toucher._ahead()
    taken = []
    while toucher._wanted:
        block = toucher._next(ahead)
        assert block is not None
        taken.append(block)
    host = memory.regions[0].host
    assert taken == [host, host + SIZE - HUGE]
    assert next(ahead, None) is None


def test_ahead_ends_at_the_share_of_what_is_available(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _available(monkeypatch, 20 << 20)
    assert len(list(Prefault(memory)._ahead())) == 5
    _available(monkeypatch, 1 << 40)
    assert len(list(Prefault(memory)._ahead())) == SIZE // HUGE


def test_ahead_ends_when_others_take_what_there_was(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1 << 40, 0])
    monkeypatch.setattr(touch, "_available", lambda: next(left))
    monkeypatch.setattr(touch, "_LOOK", 8)
    assert len(list(Prefault(memory)._ahead())) == 7


def test_finishing_twice_or_before_the_start_is_harmless(memory: GuestMemory) -> None:
    toucher = Prefault(memory)
    toucher.finish()
    toucher.finish()
    assert _populated(memory) == set()


def test_the_host_says_what_it_has() -> None:
    assert touch._available() > 1 << 20
