"""Which pages exist at all: as the kernel's scan has it, and as its page map."""

import ctypes
import mmap
import os
import platform
import re
from collections.abc import Iterator

import pytest

from godwit.errors import HostError
from godwit.host import pagemap
from godwit.hw.memory import HOLE_END, PAGE, GuestMemory
from godwit.migration.ram.page_runs import pages_in
from godwit.migration.wire.messages import Run

SIZE = 64 << 20
HUGE = 2 << 20


def _no_scan(fd: int, request: int, argument: bytearray) -> int:
    raise OSError(25, "Inappropriate ioctl for device")


def _no_map(fd: int, start: int, size: int) -> Iterator[Run]:
    pytest.fail("the scan was refused")


def _has_scan() -> bool:
    return [int(number) for number in re.findall(r"\d+", platform.release())[:2]] >= [6, 7]


@pytest.fixture(params=["scan", "map", "memfd"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "map":
        monkeypatch.setattr(pagemap, "ioctl_out", _no_scan)
    elif request.param == "memfd":
        monkeypatch.setattr(pagemap, "populated", lambda start, size: pytest.fail("it is a memfd"))
    elif _has_scan():
        monkeypatch.setattr(pagemap, "_read", _no_map)
    else:
        pytest.skip("PAGEMAP_SCAN came with Linux 6.7")
    return str(request.param)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    shared = "way" in request.fixturenames and request.getfixturevalue("way") == "memfd"
    memory = GuestMemory(SIZE, shared)
    yield memory
    memory.close()


def _populated(memory: GuestMemory) -> list[Run]:
    return memory.populated()


def test_only_what_was_touched_is_populated(memory: GuestMemory, way: str) -> None:
    assert _populated(memory) == []
    touched = [0, 5 << 20, 33 << 20, SIZE - 1]
    for address in touched:
        memory.write(address, b"x")
    runs = _populated(memory)
    pages = {address // PAGE + i for address, count in runs for i in range(count)}
    assert {address // PAGE for address in touched} <= pages
    # Huge pages or not: nothing but the huge pages around what was touched.
    assert {page * PAGE // HUGE for page in pages} == {address // HUGE for address in touched}
    assert runs == sorted(runs)


def test_populated_above_the_hole(way: str) -> None:
    memory = GuestMemory(4 << 30, shared=way == "memfd")
    try:
        memory.write(HOLE_END + 123, b"x")
        runs = _populated(memory)
        assert any(a <= HOLE_END < a + pages * PAGE for a, pages in runs)
        assert all(address >= HOLE_END for address, _ in runs)
    finally:
        memory.close()


def test_more_ranges_than_one_answer_holds(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "_RANGES", 3)
    for address in range(0, SIZE, 2 * HUGE):
        memory.write(address, b"x")
    runs = _populated(memory)
    assert len(runs) == SIZE // (2 * HUGE)
    monkeypatch.setattr(pagemap, "ioctl_out", _no_scan)
    assert _populated(memory) == runs
    assert pages_in(runs) < SIZE // PAGE


@pytest.mark.parametrize("ranges", [3, pagemap._RANGES, 1024, 1 << 16])
@pytest.mark.parametrize("count", [1, 511, 512, 513, 600, 1024, 1537, 3000])
def test_holes_everywhere(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, way: str, count: int, ranges: int
) -> None:
    monkeypatch.setattr(pagemap, "_RANGES", ranges)
    (region,) = memory.regions
    libc = ctypes.CDLL(None)
    size = ctypes.c_size_t(region.size)
    assert libc.madvise(ctypes.c_void_p(region.host), size, mmap.MADV_NOHUGEPAGE) == 0
    addresses = [number * 3 * PAGE for number in range(count)]
    for address in addresses:
        memory.write(address, b"x")
        memory.write(address + PAGE, b"x")
    assert _populated(memory) == [(address, 2) for address in addresses]


def test_a_scan_that_does_not_get_on_is_an_error(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "ioctl_out", lambda *_: 0)
    with pytest.raises(HostError, match="does not get on"):
        _populated(memory)


def test_the_page_map_is_readable_without_rights() -> None:
    assert os.access("/proc/self/pagemap", os.R_OK)


def test_pages_that_another_process_alone_has_touched_are_populated() -> None:
    memory = GuestMemory(SIZE, shared=True)
    try:
        assert memory.fd is not None
        child = os.fork()
        if not child:
            with mmap.mmap(memory.fd, SIZE) as mapping:  # as a back end maps it
                mapping[33 << 20] = 7
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert [run[0] for run in memory.populated()] == [33 << 20]
        assert memory.read(33 << 20, 1) == b"\7"
    finally:
        memory.close()


def test_the_file_of_shared_memory_cannot_be_cut_short() -> None:
    memory = GuestMemory(SIZE, shared=True)
    try:
        assert memory.fd is not None
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)
    finally:
        memory.close()
