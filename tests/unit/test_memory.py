"""Guest RAM: its layout, its bounds, the log of the VMM's own writes."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from godwit.errors import ConfigError, GuestError
from godwit.hw.memory import HUGE, PAGE, GuestMemory, layout

M, G = 1 << 20, 1 << 30
SIZE = 32 * M


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(SIZE)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def large() -> Iterator[GuestMemory]:
    memory = GuestMemory(4 * G)  # not reserved: it costs address space alone
    yield memory
    memory.close()


def test_the_layout_has_a_hole_for_devices() -> None:
    assert layout(256 * M) == [(0, 256 * M)]
    assert layout(3 * G) == [(0, 3 * G)]
    assert layout(3 * G + 2 * M) == [(0, 3 * G), (4 * G, 2 * M)]
    assert layout(8 * G) == [(0, 3 * G), (4 * G, 5 * G)]


@pytest.mark.parametrize("size", [0, -1, 30 * M, 33 * M + 1, SIZE + PAGE, SIZE + M])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 2M"):
        GuestMemory(size)


def test_more_than_the_host_has_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"--memory"):
        GuestMemory(1 << 56)


def test_guest_and_host_agree_modulo_a_huge_page(large: GuestMemory) -> None:
    assert [(region.slot, region.start) for region in large.regions] == [(0, 0), (1, 4 * G)]
    assert all(region.host % HUGE == region.start % HUGE == 0 for region in large.regions)
    assert large.regions[1].end == 5 * G


def test_what_is_written_is_read(large: GuestMemory) -> None:
    for at in (0, PAGE - 2, 3 * G - 4, 4 * G, 5 * G - 4):
        large.write(at, b"data")
        assert large.read(at, 4) == b"data"
        assert bytes(large.view(at, 4)) == b"data"
    large.clear()
    assert large.read(3 * G - 4, 4) == bytes(4)


def test_runs_of_pages_are_seen_wherever_they_are(large: GuestMemory) -> None:
    runs = [(0, 1), (3 * G - 2 * PAGE, 2), (4 * G, 3), (5 * G - PAGE, 1)]
    views = large.views(runs)
    assert [len(view) for view in views] == [pages * PAGE for _, pages in runs]
    for (address, _), view in zip(runs, views, strict=True):
        large.write(address, b"here")
        assert bytes(view[:4]) == b"here"
        view.release()


@pytest.mark.parametrize(
    "run", [(3 * G - PAGE, 2), (3 * G, 1), (5 * G - PAGE, 2), (1 << 63, 1), (0, (1 << 32) - 1)]
)
def test_runs_beyond_the_ram_are_an_error(large: GuestMemory, run: tuple[int, int]) -> None:
    with pytest.raises(GuestError, match="not in its RAM"):
        large.views([(0, 1), run])


def test_memory_that_was_closed_has_no_runs() -> None:
    memory = GuestMemory(32 << 20)
    memory.close()
    with pytest.raises(GuestError, match="not in its RAM"):
        memory.views([(0, 1)])


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (3 * G - 4, 8),
        (3 * G, 1),
        (4 * G - 1, 1),
        (4 * G - 1, 2),
        (5 * G, 1),
        (5 * G - 1, 2),
        (3 * G - 1, 2 * G),
        (-1, 1),
        (-4, 8),
        (0, -1),
        (16, -8),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
        (6 * G, 0),
    ],
)
def test_nothing_outside_ram_is_reached(large: GuestMemory, address: int, length: int) -> None:
    with pytest.raises(GuestError, match="RAM"):
        large.view(address, length)
    with pytest.raises(GuestError):
        large.read(address, length)
    with pytest.raises(GuestError):
        large.writable(address, length)


def test_own_writes_are_logged_while_it_logs(memory: GuestMemory) -> None:
    memory.write(0, b"before")
    assert memory.take_log() == set()
    memory.start_log()
    memory.write(PAGE - 1, b"ab")
    memory.write(5 * PAGE + 2, b"\x01\x00")
    memory.writable(7 * PAGE, 2 * PAGE)
    memory.mark_dirty(SIZE - 1, 1)
    memory.write(9 * PAGE, b"")
    memory.mark_dirty(9 * PAGE, 0)
    assert memory.take_log() == {0, 1, 5, 7, 8, SIZE // PAGE - 1}
    assert memory.take_log() == set()
    memory.write(0, b"x")
    memory.stop_log()
    memory.write(PAGE, b"x")
    assert memory.take_log() == set()


def test_memory_of_a_guest_goes_away_with_it() -> None:
    # In a process of its own, so that other tests' memory does not count.
    program = (
        "from godwit.hw.memory import GuestMemory\n"
        "def size():\n"
        "    return int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "before = size()\n"
        "memory = GuestMemory(1 << 32)\n"
        "assert size() - before >= 1 << 32\n"
        "view = memory.view(0, 4)\n"
        "del view\n"
        "memory.close()\n"
        "assert size() - before < 1 << 28, size() - before\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)
