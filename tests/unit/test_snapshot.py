"""A snapshot's file: what was saved is restored; what was altered or is another's is refused."""

from __future__ import annotations

import os
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from godwit.errors import ConfigError, GodwitError, KvmError, StreamError
from godwit.host.kvm import clocks, cpustate
from godwit.hw import memory as hw_memory
from godwit.hw.memory import PAGE
from godwit.machine.machine import Machine
from godwit.migration.outgoing import Outgoing
from godwit.migration.snapshot import compression, format
from godwit.migration.snapshot import lazy as lazy_module
from godwit.migration.snapshot.format import CHUNK, RAM_AT, Header
from godwit.migration.snapshot.lazy import Lazy
from godwit.migration.snapshot.reader import Snapshot
from godwit.migration.snapshot.restorer import Restorer
from godwit.migration.snapshot.saver import path_of
from godwit.spec.machine_types import DEFAULT
from godwit.spec.restore import FULL, Restore
from godwit.spec.runstate import RunState
from migration_bench import IMPATIENT, Side

S = RunState
#: Pages with something in them, in three chunks, and one that was written and is zeros.
PAGES = {0: 1, 1: 2, 70: 3, 4000: 4, 4001: 0}


def _saved(path: Path, **manner: Any) -> Path:
    """Save a guest of 32 MiB."""
    side = Side(S.RUNNING, IMPATIENT)
    for number, byte in PAGES.items():
        side.machine.memory.view(number * PAGE, PAGE)[:] = bytes([byte]) * PAGE
    side.machine.resume()
    side.migrations.save(str(path), manner.get("keep_running", True), manner.get("compress", ""))
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    outgoing.join(60)
    assert side.statuses[-1] == "completed", outgoing.report.error
    side.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(tmp_path_factory.mktemp("whole") / "guest")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zstandard")
    return _saved(tmp_path_factory.mktemp("packed") / "guest", compress="zstd")


class There(Side):
    """A VM that takes the guest from a file."""

    def __init__(self, path: Path, restore: Restore = FULL) -> None:
        super().__init__(S.INMIGRATE, IMPATIENT)
        self.damage: list[GodwitError] = []
        self.damaged = threading.Event()
        self.migrations._restore = restore
        self.migrations._on_damaged = self._note
        self.migrations.await_guest(f"file:{path}", False)
        incoming = self.migrations._incoming
        assert incoming is not None
        incoming._thread.join(60)

    def _note(self, error: GodwitError) -> None:
        self.damage.append(error)
        self.damaged.set()

    def check(self) -> None:
        assert not self.failures
        assert self.states.history == [S.INMIGRATE, S.RESTORE_VM, S.PRELAUNCH_MIGRATE, S.RUNNING]
        for number, byte in PAGES.items():
            assert self.machine.memory.read(number * PAGE, PAGE) == bytes([byte]) * PAGE
        assert self.machine.memory.read(2 * PAGE, PAGE) == bytes(PAGE)


def _refused(path: Path) -> str:
    side = There(path)
    try:
        (error,) = side.failures
        assert not side.machine.running
        assert str(path) in str(error)
        return str(error)
    finally:
        side.close()


def _changed(whole: Path, path: Path, at: int, data: bytes) -> Path:
    """Copy a snapshot, holes and all, with other bytes at one place."""
    with open(whole, "rb") as source, open(path, "wb") as target:
        size = os.fstat(source.fileno()).st_size
        target.truncate(size)
        at_data = 0
        while at_data < size:
            try:
                at_data = os.lseek(source.fileno(), at_data, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(source.fileno(), at_data, os.SEEK_HOLE)
            os.pwrite(target.fileno(), os.pread(source.fileno(), end - at_data, at_data), at_data)
            at_data = end
        os.pwrite(target.fileno(), data, at)
    return path


def _header(path: Path) -> Header:
    return format.decode_header(path.read_bytes()[:PAGE])


# --- restored -------------------------------------------------------------------------------------
@pytest.mark.parametrize("lazy", [False, True], ids=["full", "lazy"])
def test_what_was_saved_is_restored(whole: Path, lazy: bool) -> None:
    side = There(whole, Restore(lazy=lazy))
    side.check()
    side.close()


def test_a_compressed_guest_is_restored(packed: Path, whole: Path) -> None:
    side = There(packed)
    side.check()
    side.close()
    assert packed.stat().st_size < whole.stat().st_blocks * 512
    refused = There(packed, Restore(lazy=True))
    assert "compressed" in str(refused.failures)
    refused.close()


def test_zeros_take_no_space(whole: Path) -> None:
    assert whole.stat().st_size > 32 << 20
    assert whole.stat().st_blocks * 512 < 2 << 20


def test_a_copy_without_holes_is_restored(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(whole.read_bytes())
    side = There(copy)
    side.check()
    side.close()


# --- refused --------------------------------------------------------------------------------------
def _places(path: Path) -> Iterator[tuple[str, int, str]]:
    header = _header(path)
    first = PAGE if header.compression else RAM_AT
    yield "magic", 0, "no snapshot"
    yield "format", 8, "newer"
    yield "machine", 16, "header"
    yield "reserved", 2000, "header"
    yield "ram", first + 5, "chunk 0 "
    yield "index", header.index_at + 3, "index"
    yield "end", header.end - 1, "index"
    if not header.compression:
        yield "before RAM", PAGE + 77, f"offset {PAGE}: zeros were there"
        yield "zeros of a chunk", RAM_AT + 20 * PAGE, "chunk 0 "
        yield "a chunk of zeros", RAM_AT + 3 * CHUNK + 5, "zeros were there"
        yield "last of RAM", header.index_at - 1, "zeros were there"


@pytest.mark.parametrize("which", ["whole", "packed"])
def test_what_was_altered_is_refused_with_the_place(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(which)
    for name, at, words in _places(path):
        old = path.read_bytes()[at]
        changed = _changed(path, tmp_path / "changed", at, bytes([old ^ 0x41]))
        assert words in _refused(changed), name


@pytest.mark.parametrize("which", ["whole", "packed"])
def test_what_was_cut_off_is_refused_with_the_place(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(which)
    end = _header(path).end
    for size in (0, 1, 7, 11, 100, PAGE - 1, PAGE, PAGE + 1, end // 2, end - 1, end + 1):
        cut = _changed(path, tmp_path / "cut", 0, b"")
        os.truncate(cut, size)
        text = _refused(cut)
        assert "no snapshot" in text if size < 8 else f"ends at offset {size}" in text, size


def _relabelled(whole: Path, path: Path, **change: Any) -> Path:
    header = _header(whole)._replace(**change)
    return _changed(whole, path, 0, format.encode_header(header))


def test_a_guest_of_another_machine_is_refused(whole: Path, tmp_path: Path) -> None:
    other = "godwit-0.1"
    assert other != DEFAULT
    for change, words in (
        ({"machine": other}, f"of machine type '{other}', and this VM is a '{DEFAULT}'; give"),
        ({"machine": "godwit-9.9"}, "'godwit-9.9', which this Godwit does not know: a newer one"),
        ({"memory": 64 << 20}, "64 MiB of RAM, and this VM 32 MiB; give --memory 64M"),
        ({"index_length": 1 << 30}, "too long"),
        ({"index_length": (1 << 32) - 1}, "too long"),
        ({"index_at": (1 << 64) - 1, "index_length": 8}, "not whole"),
    ):
        assert words in _refused(_relabelled(whole, tmp_path / "other", **change))


def test_a_format_of_the_future_and_one_of_the_past(whole: Path, tmp_path: Path) -> None:
    page = bytearray(whole.read_bytes()[:PAGE])
    page[8:12] = struct.pack("<I", format.FORMAT + 1)
    future = _changed(whole, tmp_path / "future", 0, bytes(page))
    assert "format 2, and this Godwit knows formats up to 1" in _refused(future)
    past = tmp_path / "past"
    past.write_bytes(b"\x01\x02\0\0\x10\0\0\0" + bytes(5000))
    assert "earlier format, without checksums" in _refused(past)
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n" * 1000)
    assert "no snapshot of Godwit's" in _refused(script)


def test_an_index_that_lies(whole: Path, tmp_path: Path) -> None:
    header = _header(whole)
    index, chunks = format.decode_index(whole.read_bytes()[header.index_at :], header)
    table = index.chunks
    for chunks_, words in (
        (table[:-8], "another size"),
        (struct.pack("<II", CHUNK + 1, 0) + table[8:], "chunk 0 has"),
        (struct.pack("<II", 5, 0) + table[8:], "chunk 0 has"),
    ):
        payload = format.encode_index(
            format.Index(index.hello, index.state, index.running, bytes(chunks_))
        )
        lie = _relabelled(
            whole, tmp_path / "lie", index_length=len(payload), index_crc=zlib.crc32(payload)
        )
        with open(lie, "r+b") as file:
            file.seek(header.index_at)
            file.write(payload)
            file.truncate()
        assert words in _refused(lie)
    assert len(chunks) == len(table) // 8


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, words in (
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "fifo", "no regular file"),
    ):
        with pytest.raises(ConfigError, match=words):
            Snapshot(path)


def test_only_absolute_paths() -> None:
    assert path_of("file:/run/guest") == Path("/run/guest")
    for uri in ("file:", "file:guest", "file:./guest", "file:/run/\0"):
        with pytest.raises(ConfigError, match="absolute"):
            path_of(uri)
    with pytest.raises(ConfigError, match="no file can have that name"):
        path_of("file:/run/\ud800")


# --- clocks ---------------------------------------------------------------------------------------
def test_clocks_go_on_from_the_save_or_from_now(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour, real = 3600 * 10**9, clocks.host_clocks
    monkeypatch.setattr(clocks, "host_clocks", lambda: (real()[0] + hour, real()[1]))

    def restored(restore: Restore) -> tuple[int, int]:
        side = There(whole, restore)
        side.check()
        state = side.machine.save()
        side.close()
        return state.platform.clock_ns, cpustate.tsc_of(state.vcpus[0])

    (clock, tsc), (clock_now, tsc_now) = restored(FULL), restored(Restore(clock_now=True))
    assert clock_now - clock == pytest.approx(hour, abs=60 * 10**9)
    # The fake's TSC has 1 GHz.
    assert tsc_now - tsc == pytest.approx(clock_now - clock, abs=10**6)


# --- lazily ---------------------------------------------------------------------------------------
LAZY = Restore(lazy=True)


@pytest.fixture
def lazy(whole: Path) -> Iterator[There]:
    side = There(whole, LAZY)
    yield side
    side.close()


def test_no_guest_runs_that_nobody_would_check(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Lazy) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Lazy, "start", full)
    side = There(whole, LAZY)
    (error,) = side.failures
    assert "can't start new thread" in str(error)
    assert not side.machine.running
    assert S.RUNNING not in side.states.history
    side.close()


def test_a_check_that_never_began_ends(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lazy, "begin", lambda self: None)
    side = There(whole, LAZY)
    side.check()
    restorer = side.migrations._incoming
    assert isinstance(restorer, Restorer)
    assert restorer._lazy is not None
    thread = restorer._lazy._thread
    assert thread.is_alive()
    assert not restorer.checked()
    side.close()
    assert not thread.is_alive()


def test_pages_not_touched_yet_migrate_too(lazy: There) -> None:
    def has(number: int) -> bool:
        found = lazy.machine.memory.populated()
        assert found == sorted(found)
        return any(at <= number * PAGE < at + pages * PAGE for at, pages in found)

    assert all(has(number) for number, byte in PAGES.items() if byte)
    lazy.machine.memory.write(2000 * PAGE, b"x")
    assert has(2000)
    assert sum(pages for _, pages in lazy.machine.memory.populated()) < 3 * CHUNK // PAGE


def test_what_was_written_here_is_saved_and_the_file_stays(
    lazy: There, whole: Path, tmp_path: Path
) -> None:
    before = whole.read_bytes()
    lazy.machine.memory.write(70 * PAGE, b"changed")
    lazy.migrations.save(str(tmp_path / "again"), True, "")
    outgoing = lazy.migrations._outgoing
    assert outgoing is not None
    outgoing.join(60)
    assert lazy.statuses[-1] == "completed"
    assert whole.read_bytes() == before
    side = There(tmp_path / "again")
    assert side.machine.memory.read(70 * PAGE, 8) == b"changed\x03"
    assert side.machine.memory.read(4000 * PAGE, 8) == bytes([4]) * 8
    side.close()


def test_a_reboot_finds_zeros(lazy: There) -> None:
    lazy.machine.memory.read(0, PAGE)
    lazy.machine.memory.discard(lazy.machine.memory.regions[0].host, 2 << 20)
    assert lazy.machine.memory.read(0, PAGE) == bytes(PAGE)
    assert lazy.machine.memory.read(4000 * PAGE, 4) == bytes([4]) * 4
    lazy.machine.memory.clear()
    for number in PAGES:
        assert lazy.machine.memory.read(number * PAGE, PAGE) == bytes(PAGE)
    assert lazy.machine.memory.populated() == [] or lazy.machine.memory.read(0, 4) == bytes(4)


@pytest.mark.parametrize("at", [RAM_AT + 70 * PAGE, RAM_AT + 3 * CHUNK + 5])
def test_a_guest_whose_ram_was_altered_is_stopped(whole: Path, tmp_path: Path, at: int) -> None:
    side = There(_changed(whole, tmp_path / "changed", at, b"?"), LAZY)
    assert side.damaged.wait(60)
    assert not side.machine.running
    assert "altered" in str(side.damage[0])
    side.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a large file: after its first chunk it rests until somebody waits for it."""
    monkeypatch.setattr(lazy_module, "_REST", 1e6)


def _leave(side: There, path: Path, keep_running: bool) -> Outgoing:
    side.migrations.save(str(path), keep_running, "")
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    return outgoing


@pytest.mark.parametrize("keep_running", [False, True])
@pytest.mark.usefixtures("slow")
def test_damage_that_is_not_found_yet_does_not_leave(
    whole: Path, tmp_path: Path, keep_running: bool
) -> None:
    side = There(_changed(whole, tmp_path / "changed", RAM_AT + 4000 * PAGE + 5, b"?"), LAZY)
    assert not side.damage
    outgoing = _leave(side, tmp_path / "again", keep_running)
    outgoing.join(60)
    assert side.statuses[-1] == "failed"
    assert "was altered" in str(outgoing.report.error)
    assert not (tmp_path / "again").exists()
    assert side.damaged.wait(60)
    assert not side.machine.running
    side.migrations.migrate(f"unix:{tmp_path / 'nobody'}", False)
    assert side.migrations._outgoing is not None
    side.migrations._outgoing.join(60)
    assert "was altered" in str(side.migrations._outgoing.report.error)
    side.close()


@pytest.mark.usefixtures("slow")
def test_who_leaves_hurries_the_check(lazy: There, tmp_path: Path) -> None:
    _leave(lazy, tmp_path / "again", False).join(60)
    assert lazy.statuses[-1] == "completed"
    again = There(tmp_path / "again")
    again.check()
    again.close()


def test_a_save_that_waits_for_the_check_can_be_cancelled(
    lazy: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def never() -> bool:
        asked.set()
        return False

    monkeypatch.setattr(lazy.migrations, "_checked", never)
    outgoing = _leave(lazy, tmp_path / "again", False)
    assert asked.wait(60)
    assert outgoing.cancel()
    outgoing.join(60)
    assert lazy.statuses[-1] == "cancelled"
    assert lazy.machine.running


@pytest.mark.parametrize("times", [1, 2, 99])
def test_damage_is_reported_whatever_keeps_the_guest_from_a_pause(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    pause, refused = Machine.pause, []

    def busy(machine: Machine, *given: Any) -> None:
        if threading.current_thread().name == "snapshot" and len(refused) < times:
            refused.append(1)
            raise KvmError("device 'disk0' did not finish its work in 10 s; the guest goes on")
        pause(machine, *given)

    monkeypatch.setattr(Machine, "pause", busy)
    monkeypatch.setattr(lazy_module, "_AGAIN_S", 0.0)
    side = There(_changed(whole, tmp_path / "changed", RAM_AT + 70 * PAGE, b"?"), LAZY)
    assert side.damaged.wait(60)
    assert len(refused) == min(times, 3)
    assert side.machine.running == (times > 2)
    side.close()


def test_all_but_ram_is_checked_before(whole: Path, tmp_path: Path) -> None:
    changed = _changed(whole, tmp_path / "changed", _header(whole).index_at + 3, b"?")
    side = There(changed, LAZY)
    assert "index" in str(side.failures)
    side.close()


def test_who_writes_the_file_waits_until_the_guest_has_a_copy(whole: Path, tmp_path: Path) -> None:
    path = _changed(whole, tmp_path / "held", 0, b"")
    side = There(path, LAZY)
    assert side.machine.memory._backed
    with open(path, "r+b") as file:  # waits
        assert not side.machine.memory._backed
        file.truncate(0)
    side.check()
    assert not side.damage
    side.close()


def test_whoever_reads_while_the_guest_gets_its_copy_finds_the_same(
    lazy: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hw_memory, "_COPIED", 3 * PAGE)
    memory = lazy.machine.memory
    memory.write(70 * PAGE + 8, b"changed")
    at = 4000 * PAGE
    view, over, seen = memory.view(at, PAGE), threading.Event(), set[bytes]()

    def read() -> None:
        while not over.is_set():
            seen.add(bytes(view))

    reader = threading.Thread(target=read)
    reader.start()
    lazy.machine.pause()
    memory.leave_file()
    over.set()
    reader.join()
    assert seen <= {bytes([4]) * PAGE}
    assert memory.read(70 * PAGE + 7, 9) == b"\x03changed\x03"
    assert not memory._backed
    lazy.machine.memory.write(70 * PAGE + 8, b"\x03" * 7)
    lazy.check()


def test_what_cannot_be_held_is_not_mapped(whole: Path, tmp_path: Path) -> None:
    path = _changed(whole, tmp_path / "written", 0, b"")
    with open(path, "r+b"), pytest.raises(ConfigError, match=r"close what writes it.*lazy"):
        There(path, LAZY)


def test_shared_ram_is_not_mapped(whole: Path) -> None:
    side = Side(S.INMIGRATE, IMPATIENT)
    side.machine.memory.fd = 77
    with pytest.raises(ConfigError, match="needs private RAM"):
        Lazy(Snapshot(whole), side.machine, lambda error: None)
    side.machine.memory.fd = None
    side.close()


# --- compression ----------------------------------------------------------------------------------
def test_a_bomb_is_bounded() -> None:
    zstandard = pytest.importorskip("zstandard")
    decompress = compression.decompressor()
    target = memoryview(bytearray(CHUNK))
    whole = bytes(range(256)) * (CHUNK // 256)
    decompress(compression.compressor()(whole), target)
    assert target == whole
    make = zstandard.ZstdCompressor(level=19)
    for bomb in (
        make.compress(bytes(256 << 20)),
        make.compress(bytes(CHUNK + 1)),
        make.compress(bytes(CHUNK - 1)),
        make.compress(b""),
        make.compress(bytes(CHUNK))[:-3],
        b"",
        b"nonsense",
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(CHUNK * 2)),
    ):
        with pytest.raises(StreamError, match="zstd"):
            decompress(bomb, target)


def test_without_zstd_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    side = Side(S.RUNNING, IMPATIENT)
    with pytest.raises(ConfigError, match="pip install 'godwit-vmm"):
        side.migrations.save(str(tmp_path / "guest"), False, "zstd")
    side.close()


def test_the_standard_librarys_zstd_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: Python 3.14 has it, with these names (docs.python.org, compression.zstd)."""
    zstandard = pytest.importorskip("zstandard")
    own: Any = ModuleType("compression.zstd")

    class Decompressor:
        eof, unused_data = False, b""

        def __init__(self, options: dict[str, int]) -> None:
            assert options == {"log": 20}

        def decompress(self, data: bytes, max_length: int) -> bytes:
            found: bytes = zstandard.ZstdDecompressor().stream_reader(data).read(max_length)
            self.eof = len(found) < max_length or max_length == CHUNK
            return found

    own.ZstdError = zstandard.ZstdError
    own.DecompressionParameter = type("Parameter", (), {"window_log_max": "log"})
    own.ZstdDecompressor = Decompressor
    own.compress = lambda data, level: zstandard.ZstdCompressor(level=level).compress(data)
    monkeypatch.setitem(sys.modules, "compression.zstd", own)
    target = memoryview(bytearray(CHUNK))
    compression.decompressor()(compression.compressor()(b"x" * CHUNK), target)
    assert target == b"x" * CHUNK
    with pytest.raises(StreamError):
        compression.decompressor()(compression.compressor()(b"x"), target)
