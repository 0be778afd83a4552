"""A VM as a process of its own, as the client starts it; here a QMP server is all of the VM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from godwit.client import vm as module
from godwit.client.qmp import CommandRefused
from godwit.client.vm import Vm, VmGone
from lab.guest import READY
from lab.vm import LabVm

_SERVED = """
import os, sys
from godwit.errors import ConfigError
from godwit.host.loop import Loop
from godwit.qmp.server import Server

def execute(name, arguments):
    if name == "migrate":
        print("uri", arguments["uri"], arguments["insecure"], os.environ.get("MARK"), flush=True)
        if arguments["uri"] == "no":
            raise ConfigError("not there")
        for status in ("setup", "active", "completed"):
            server.emit("MIGRATION", {"status": status})
    if name == "quit":
        loop.stop()
    return {"status": "completed" if name == "query-migrate" else "running"}

loop = Loop(print)
server = Server(loop, sys.argv[1], execute)
print("arguments", *sys.argv[2:], flush=True)
loop.run()
server.close()
sys.exit(9)
"""


class Served(Vm):
    """A process that is a QMP server."""

    def _command(self) -> list[str]:
        return [sys.executable, "-c", _SERVED, str(self.qmp_path)]


class Printing(LabVm):
    """A process that prints its arguments, and exits."""

    def _command(self) -> list[str]:
        return ["/bin/echo"]


def test_it_starts_migrates_and_ends(tmp_path: Path) -> None:
    with Served("a", tmp_path, ["--memory", "128M"], env={**os.environ, "MARK": "set"}) as vm:
        assert "arguments --memory 128M" in vm.wait_console("128M")
        assert vm.alive
        assert vm.status() == "running"
        assert vm.migrate("unix:/there", deadline=20.0) == {"status": "completed"}
        vm.start_migration("tcp:b:1", insecure=True)
        assert vm.wait_migration(20.0) == {"status": "completed"}
        with pytest.raises(CommandRefused, match="not there"):
            vm.migrate("no")
        printed = vm.wait_console("uri no False set")
        assert "uri unix:/there False set" in printed
        assert "uri tcp:b:1 True set" in printed
        with pytest.raises(VmGone, match=r"a has not exited within 0\.05 s"):
            vm.wait(0.05)
        assert vm.quit() == 9
        assert not vm.alive


def test_it_is_godwit_run_that_is_started(tmp_path: Path) -> None:
    with Vm("a", tmp_path, []) as vm:
        assert vm.wait() == 1
        assert vm.console.startswith("godwit: nothing to run; give --kernel to boot")
        with pytest.raises(VmGone, match=r"no 'panic' within .*\n.*nothing to run"):
            vm.wait_console("panic", 20)


def test_a_child_is_prepared_before_the_program(tmp_path: Path) -> None:
    def prepare() -> None:
        os.umask(0o077)
        (tmp_path / "prepared").touch()

    with Served("a", tmp_path, [], preexec=prepare) as vm:
        assert vm.status() == "running"
    assert (tmp_path / "prepared").stat().st_mode & 0o777 == 0o600


def test_the_end_of_the_block_is_the_end_of_the_vm(tmp_path: Path) -> None:
    vm = Served("a", tmp_path, [])
    vm.wait_console("arguments\n")
    with pytest.raises(KeyError) as caught, vm:
        raise KeyError("mine")
    assert not vm.alive
    assert caught.value.__notes__ == ["a printed:\narguments\n"]
    with Served("b", tmp_path, []) as vm:
        vm.status()
        vm.kill()
        assert vm.wait() == -9
        with pytest.raises(VmGone, match="closed the connection"):
            vm.status()


def test_a_guest_that_prints_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONSOLE", 10)
    with Printing("a", tmp_path, ["x" * 100_000 + "end"]) as vm:
        vm.wait()
        assert vm.console == "xxxxxxend\n"


def test_the_labs_guest_is_ready_when_it_says_so(tmp_path: Path) -> None:
    with Printing("a", tmp_path, [READY]) as vm:
        assert 0 < vm.wait_ready(20) < 20
    with Printing("a", tmp_path, ["nothing"]) as vm, pytest.raises(VmGone):
        vm.wait_ready(20)
