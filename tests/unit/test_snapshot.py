"""A snapshot's file: what was saved is restored; what was altered or is another's is refused."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from godwit.errors import ConfigError, StreamError
from godwit.host.kvm import clocks, cpustate
from godwit.hw.memory import PAGE
from godwit.migration.snapshot import compression, format
from godwit.migration.snapshot.format import CHUNK, RAM_AT
from godwit.migration.snapshot.reader import Snapshot
from godwit.migration.snapshot.saver import path_of
from godwit.spec.machine_types import DEFAULT
from godwit.spec.restore import FULL, Restore
from godwit.spec.runstate import RunState
from migration_bench import IMPATIENT, Side
from snapshot_bench import There, changed_copy, header_of, refused, saved

S = RunState


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "guest")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zstandard")
    return saved(tmp_path_factory.mktemp("packed") / "guest", compress="zstd")


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
    header = header_of(path)
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
        changed = changed_copy(path, tmp_path / "changed", at, bytes([old ^ 0x41]))
        assert words in refused(changed), name


@pytest.mark.parametrize("which", ["whole", "packed"])
def test_what_was_cut_off_is_refused_with_the_place(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(which)
    end = header_of(path).end
    for size in (0, 1, 7, 11, 100, PAGE - 1, PAGE, PAGE + 1, end // 2, end - 1, end + 1):
        cut = changed_copy(path, tmp_path / "cut", 0, b"")
        os.truncate(cut, size)
        text = refused(cut)
        assert "no snapshot" in text if size < 8 else f"ends at offset {size}" in text, size


def _relabelled(whole: Path, path: Path, **change: Any) -> Path:
    header = header_of(whole)._replace(**change)
    return changed_copy(whole, path, 0, format.encode_header(header))


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
        assert words in refused(_relabelled(whole, tmp_path / "other", **change))


def test_a_format_of_the_future_and_one_of_the_past(whole: Path, tmp_path: Path) -> None:
    page = bytearray(whole.read_bytes()[:PAGE])
    page[8:12] = struct.pack("<I", format.FORMAT + 1)
    future = changed_copy(whole, tmp_path / "future", 0, bytes(page))
    assert "format 2, and this Godwit knows formats up to 1" in refused(future)
    past = tmp_path / "past"
    past.write_bytes(b"\x01\x02\0\0\x10\0\0\0" + bytes(5000))
    assert "earlier format, without checksums" in refused(past)
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n" * 1000)
    assert "no snapshot of Godwit's" in refused(script)


def test_an_index_that_lies(whole: Path, tmp_path: Path) -> None:
    header = header_of(whole)
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
        assert words in refused(lie)
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
    with pytest.raises(ConfigError, match="pip install zstandard"):
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
