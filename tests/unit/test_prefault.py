"""The destination's RAM: populated early, wanted parts first, the rest given back."""

import time
from collections.abc import Iterator

import pytest

from godwit.hw.memory import HUGE, PAGE, GuestMemory
from godwit.migration.ram import prefault as module
from godwit.migration.ram.prefault import Prefault

SIZE = 64 << 20


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    memory = GuestMemory(SIZE, shared=request.param)
    yield memory
    memory.close()


def _populated(memory: GuestMemory) -> set[int]:
    """Numbers of the huge pages of RAM that exist, by the kernel's word."""
    return {
        (address + page * PAGE) // HUGE
        for address, pages in memory.populated()
        for page in range(pages)
    }


def _available(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "_available", lambda: size)


def test_what_is_wanted_stays_and_the_rest_is_given_back(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _available(monkeypatch, 1 << 40)
    prefault = Prefault(memory)
    prefault.start()
    memory.write(40 << 20, b"data")
    prefault.want([memory.view(10 << 20, 3 * PAGE), memory.view((20 << 20) - PAGE, 2 * PAGE)])
    prefault.use([memory.view(40 << 20, PAGE)])
    deadline = time.monotonic() + 10
    while not prefault.idle:
        assert time.monotonic() < deadline
    prefault.finish()
    assert _populated(memory) <= {5, 9, 10, 20}
    assert 20 in _populated(memory)
    assert memory.read(40 << 20, 4) == b"data"
    assert prefault.finished


def test_without_memory_to_spare_only_what_is_wanted_is_populated(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _available(monkeypatch, 0)
    prefault = Prefault(memory)
    prefault.want([memory.view(0, PAGE), memory.view(SIZE - PAGE, PAGE)])
    spare = prefault._spare_blocks()
    taken = []
    while prefault._wanted:
        block = prefault._next(spare)
        assert block is not None
        taken.append(block)
    host = memory.regions[0].host
    assert taken == [host, host + SIZE - HUGE]
    assert next(spare, None) is None


def test_spare_blocks_end_at_the_share_of_what_is_available(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _available(monkeypatch, 20 << 20)
    assert len(list(Prefault(memory)._spare_blocks())) == 5
    _available(monkeypatch, 1 << 40)
    assert len(list(Prefault(memory)._spare_blocks())) == SIZE // HUGE


def test_spare_blocks_end_when_others_take_what_there_was(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1 << 40, 0])
    monkeypatch.setattr(module, "_available", lambda: next(left))
    monkeypatch.setattr(module, "_LOOK", 8)
    assert len(list(Prefault(memory)._spare_blocks())) == 7


def test_finishing_twice_or_before_the_start_is_harmless(memory: GuestMemory) -> None:
    prefault = Prefault(memory)
    prefault.finish()
    prefault.finish()
    assert _populated(memory) == set()


def test_the_host_says_what_it_has() -> None:
    assert module._available() > 1 << 20
