"""What the lab's load programs print, and the QEMU that Godwit is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import load, qemu
from lab.errors import LabError


def test_rates_are_bytes_by_the_time_each_direction_took() -> None:
    assert load.rates("out 3000000 1500000\nin 500 1000000\n") == {"out": 2e6, "in": 500.0}


def test_a_qemu_that_waits_has_the_kernel_as_well() -> None:
    argv = qemu.arguments(128, 2, "tap0", "52:54:00:00:00:01", ("k", "i", "quiet"), "unix:/s")
    assert argv[-2:] == ["-incoming", "unix:/s"]
    for option, value in (("-kernel", "k"), ("-initrd", "i"), ("-append", "quiet")):
        assert argv[argv.index(option) + 1] == value
    assert "vhost=on" in argv[argv.index("-netdev") + 1]


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_wrapper_script_is_a_qemu(tmp_path: Path) -> None:
    script = _script(tmp_path / "qemu", 'test "$1" = --version && echo "QEMU 11.0" && echo more')
    assert qemu.version(qemu.find(script)) == "QEMU 11.0"
    with qemu.Qemu("a", tmp_path, ["-m", "128M"], program=script) as vm:
        assert vm.wait() == 1  # it is run with other arguments, too


def test_a_qemu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match=r"the QEMU to compare with, .*/none: no such file"):
        qemu.find(str(tmp_path / "none"))
    (tmp_path / "text").write_text("")
    with pytest.raises(LabError, match=r"/text: may not be executed: chmod \+x"):
        qemu.find(str(tmp_path / "text"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="apt-get install qemu-system-x86"):
        qemu.find()


@pytest.mark.parametrize(
    ("text", "words"),
    [("echo no such library >&2; exit 127", "no such library"), ("exit 0", "index")],
)
def test_a_qemu_that_does_not_run_is_named(tmp_path: Path, text: str, words: str) -> None:
    script = _script(tmp_path / "qemu", text)
    with pytest.raises(LabError, match=rf"{script} --version: .*{words}"):
        qemu.version(script)
