"""The QMP server with all its commands as clients made for QEMU find it, unchanged.

qmp-shell is a development dependency. avocado-vt's and labgrid's monitors are installed by
``make test-judges``; without them their tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp import ExecuteError
from qemu.qmp.legacy import QEMUMonitorProtocol

import qmp_bench
import test_qmp_commands
from godwit import __version__
from godwit.migration.report import Report, Round
from godwit.qmp import commands
from godwit.spec import events
from godwit.spec.events import Event
from godwit.spec.runstate import RunState

ROOT = Path(__file__).parents[2]
JUDGES = ROOT / "out/judges"
S = RunState


class _Controller(test_qmp_commands.Vm):
    """A VM whose run states and events are the real ones; its guest is a report of a migration."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.states, self._served = served.states, served

    def stop(self) -> None:
        super().stop()
        self.states.set(S.PAUSED)

    def cont(self) -> None:
        super().cont()
        self.states.set(S.RUNNING)

    def powerdown(self) -> None:
        super().powerdown()
        self._served.server.emit(*Event.POWERDOWN.of())

    def migrate(self, uri: str, insecure: bool) -> None:
        super().migrate(uri, insecure)
        report = Report(now=lambda: 1.0, ram_total=1 << 28, status="active", remaining=1 << 26)
        report.rounds.append(Round(1000, 0, 500.0, 4_100_000, 600, 400.0, 0))
        self.info = report.info()
        self._served.server.emit(*events.migration("active"))

    def quit(self) -> None:
        super().quit()
        self._served.loop.stop()


class Served(qmp_bench.Vm):
    """A server with all commands."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.controller = _Controller(self)

    def execute(self, name: str, arguments: Mapping[str, object]) -> object:
        return commands.execute(self.controller, name, arguments)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path / "qmp") as vm:
        yield vm
    assert vm.errors == []


def _run(argv: list[str], tmp_path: Path, given: str = "", **environment: str) -> str:
    done = subprocess.run(
        argv,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- qmp-shell ------------------------------------------------------------------------------------
def _shell(vm: Served, tmp_path: Path, *lines: str) -> str:
    """What qmp-shell prints for these lines, which are typed as a person would."""
    argv = [sys.executable, "-m", "qemu.qmp.qmp_shell", str(vm.path)]
    return _run(argv, tmp_path, "".join(f"{line}\n" for line in lines))


def test_qmp_shell(vm: Served, tmp_path: Path) -> None:
    printed = _shell(
        vm,
        tmp_path,
        "query-status",
        "migrate-set-parameters max-bandwidth=12345 downtime-limit=100",
        "query-migrate-parameters",
        'migrate-set-capabilities capabilities=[{"capability":"auto-converge","state":true}]',
        "migrate uri=unix:/there detach=true",
        "query-migrate",
        "fly",
        "quit",
    )
    assert "Welcome to the QMP low-level shell!\nConnected to QEMU" in printed
    assert '"status": "running"' in printed
    assert '"max-bandwidth": 12345' in printed
    assert '"dirty-sync-missed-zero-copy": 0' in printed
    assert "The command fly has not been found" in printed
    assert [call[0] for call in vm.controller.calls] == ["migrate", "quit"]
    assert vm.controller.parameters.convergence.auto_converge


# --- qemu.qmp -------------------------------------------------------------------------------------
def test_qemu_qmp_as_qemus_own_tests_use_it(vm: Served) -> None:
    monitor = QEMUMonitorProtocol(str(vm.path))
    monitor.connect()
    try:
        schema = monitor.cmd("query-qmp-schema")
        assert {one["name"] for one in monitor.cmd("query-commands")} == {
            entry["name"] for entry in schema if entry["meta-type"] == "command"
        }
        monitor.cmd("stop")
        assert monitor.cmd("query-status")["status"] == "paused"
        event = monitor.pull_event(wait=qmp_bench.DEADLINE)
        assert event is not None
        assert event["event"] == "RUN_STATE"
        assert [one["event"] for one in monitor.get_events()] == ["STOP"]
        reply = monitor.cmd_raw("human-monitor-command", {"command-line": "info mice"})
        assert reply["error"]["class"] == "GenericError"
        with pytest.raises(ExecuteError, match="'blk' is true, but disks are not copied"):
            monitor.cmd("migrate", uri="unix:/there", blk=True)
        monitor.cmd("migrate", uri="unix:/there", blk=False, detach=True)
        assert monitor.cmd("query-migrate")["ram"]["total"] == 1 << 28
    finally:
        monitor.close()


# --- those that make test-judges installs ---------------------------------------------------------
def _judge(name: str, vm: Served, tmp_path: Path) -> dict[str, Any]:
    if not JUDGES.is_dir():
        pytest.skip("the judges are not installed: make test-judges")
    argv = [sys.executable, "-W", "ignore", str(ROOT / f"tests/judges/{name}.py"), str(vm.path)]
    printed = _run(argv, tmp_path, PYTHONPATH=str(JUDGES))
    found: dict[str, Any] = msgspec.json.decode(printed.partition("FOUND ")[2])
    return found


def test_avocado_vts_monitor(vm: Served, tmp_path: Path) -> None:
    found = _judge("with_avocado", vm, tmp_path)
    assert "'auto-converge'" in found.pop("xbzrle-refused")
    assert "there is no human monitor" in found.pop("human-refused")
    assert found == {
        "greeting": f"godwit-{__version__}",
        "running": True,
        "paused": True,
        "stop-event": True,
        "block": {},
        "cpus": 2,
        "max-bandwidth": 1000,
        "auto-converge": True,
        "progress": 75.0,
        "quoted": {"return": {}, "id": "it's"},
    }
    calls = [call[0] for call in vm.controller.calls]
    assert calls == ["stop", "cont", "migrate", "powerdown", "quit"]


def test_labgrids_monitor(vm: Served, tmp_path: Path) -> None:
    found = _judge("with_labgrid", vm, tmp_path)
    assert "there is no human monitor" in found.pop("refused")
    assert found == {"status": "running", "stopped": "paused", "migrate": {}}
    assert json.dumps(vm.controller.info)
