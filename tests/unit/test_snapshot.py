"""Messages in a file: what was written is read, and a file that ends early or is full says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from godwit.errors import ConfigError, LinkLost, StreamError
from godwit.migration.snapshot import FileConnection, path_of
from godwit.migration.wire.messages import Kind, Reason
from godwit.spec import saved


def _open(path: Path | str, flags: int) -> FileConnection:
    return FileConnection(os.open(path, flags | os.O_CLOEXEC, 0o600), str(path))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    pages = [bytes([n % 256]) * 4096 for n in range(2000)]  # more parts than one call takes
    line = _open(path, os.O_WRONLY | os.O_CREAT)
    line.send(Kind.FAILED, Reason("first"))
    line.send_parts(pages)
    line.send(Kind.ROUND)
    line.sync()
    line.close()
    assert line.sent == path.stat().st_size

    line = _open(path, os.O_RDONLY)
    kind, length = line.receive()
    assert kind is Kind.FAILED
    assert saved.decode(line.read(length), Reason) == Reason("first")
    read = [bytearray(4096) for _ in pages]
    line.read_into([memoryview(page) for page in read])
    assert read == pages
    line.expect(Kind.ROUND)
    with pytest.raises(LinkLost, match=r"'.*snapshot' ends too early"):
        line.receive()
    line.close()


def test_a_full_disk_is_named() -> None:
    line = _open("/dev/full", os.O_WRONLY)
    with pytest.raises(LinkLost, match="cannot write '/dev/full': No space left"):
        line.send(Kind.ROUND)
    line.close()


def test_a_file_of_something_else_is_no_stream(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\n")
    line = _open(path, os.O_RDONLY)
    with pytest.raises(StreamError):
        line.receive()
    line.close()


def test_only_absolute_paths() -> None:
    assert path_of("file:/run/guest") == Path("/run/guest")
    for uri in ("file:", "file:guest", "file:./guest", "file:/run/\0"):
        with pytest.raises(ConfigError, match="absolute"):
            path_of(uri)
    with pytest.raises(ConfigError, match="no file can have that name"):
        path_of("file:/run/\ud800")


def test_a_line_that_is_stopped_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(bytes(100))
    line = _open(path, os.O_RDONLY)
    assert line.read(50) == bytes(50)
    line.give_up()
    with pytest.raises(LinkLost, match="no further"):
        line.read(50)
    line.close()
