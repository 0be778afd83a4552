"""The file of a guest's console: for its owner, no link's target, and never waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from godwit.cli.run import _open_console
from godwit.errors import ConfigError


def test_a_new_file_is_for_its_owner_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "console"
    before = os.umask(0)
    try:
        for text in (b"one", b"two"):
            fd = _open_console(f"file:{path}")
            os.write(fd, text)
            assert os.get_blocking(fd)
            os.close(fd)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"onetwo"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="symbolic link"):
        _open_console(f"file:{tmp_path}/link")
    assert (tmp_path / "victim").read_bytes() == b"x"


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="nobody reads that pipe"):
        _open_console(f"file:{tmp_path}/fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    fd = _open_console(f"file:{tmp_path}/fifo")
    os.close(fd)
    os.close(reader)


@pytest.mark.parametrize(
    "spec", ["file:", "x", "", "stdio:", "file:/absent/x", "file:/", "file:a\0b"]
)
def test_consoles_that_are_none(spec: str) -> None:
    with pytest.raises(ConfigError, match="--console"):
        _open_console(spec)
