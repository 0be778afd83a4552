"""The lines that ``godwit migrate`` shows while it waits, and prints in the end."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.cli import main
from godwit.cli.migrate import Progress, doing, rows, table
from godwit.migration.report import Report, Round
from qmp_bench import Vm


def _report() -> Report:
    report = Report(now=time.monotonic, status="active", expected_ms=900.0)
    report.rounds.append(Round(1000, 0, 500.0, 4_100_000, 600, 400.0, 0))
    return report


def test_what_it_does() -> None:
    assert doing({"status": "setup"}) == "setup"
    assert doing(Report(now=time.monotonic, status="active").info()) == "active"
    report = _report()
    assert doing(report.info()) == "active, 8 MB/s, 1500 pages/s get dirty"
    report.throttle = 20
    assert doing(report.info()).endswith("1500 pages/s get dirty, vCPUs throttled by 20 %")
    report.bytes_sent, report.remaining = 30_000_000, 10_000_000
    assert doing(report.info()).startswith("active [##################......] 30.0 MB, 8 MB/s")
    report.status = "device"
    assert "dirty" not in doing(report.info())


def test_the_table_names_the_throttle_if_there_was_one() -> None:
    report = _report()
    report.status, report.downtime_ms = "completed", 170.0
    assert "vCPUs throttled" not in dict(rows(report.info()))
    report.rounds.append(Round(600, 0, 300.0, 2_460_000, 10, 300.0, 30))
    report.rounds.append(Round(10, 0, 0.0))
    found = dict(rows(report.info()))
    assert found["vCPUs throttled"] == "up to 30 %"
    assert found["rounds (pages)"] == "1000, 600, 10"


def test_values_stand_below_each_other() -> None:
    assert table([("sent", "1.0 MB"), ("downtime", "3.0 ms")]) == [
        "sent      1.0 MB",
        "downtime  3.0 ms",
    ]


def test_words_of_the_peer_move_no_cursor() -> None:
    report = _report()
    report.destination_runstates = ["inmigrate", "\x1b[2Jrunning\r\n\u202e"]
    report.destination_phases = {"\x9bload": 1.0}
    lines = table(rows(report.info()))
    assert all(line.isprintable() for line in lines)
    assert "destination's states  inmigrate > ?[2Jrunning???" in lines
    assert doing({"status": "set\x07up\n"}) == "set?up?"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((10, 24)))
    stream = _Terminal()
    with Progress(stream) as progress:
        progress.show("0123456789abc")
        progress.show("short")
    assert stream.getvalue() == "\r012345678\rshort    \r     \r"


def test_progress_is_for_terminals_alone() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.show("setup")
    assert stream.getvalue() == ""


class _Migrating(Vm):
    """A VM whose migrations end as they are told to."""

    answers: list[dict[str, Any]]
    asked: dict[str, Any]
    when_asked: Callable[[], object] = staticmethod(lambda: None)

    def execute(self, name: str, arguments: Any) -> object:
        if name == "query-migrate":
            self.loop.call_soon(self.when_asked)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.asked = dict(arguments)
        self.server.emit("MIGRATION", {"status": "active"})
        return super().execute(name, arguments)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[_Migrating]:
    with _Migrating(tmp_path / "qmp") as vm:
        yield vm
    assert vm.errors == []


def test_a_guest_that_arrives(vm: _Migrating, capsys: pytest.CaptureFixture[str]) -> None:
    done = _report()
    done.status, done.downtime_ms = "completed", 170.0
    vm.answers = [_report().info(), done.info()]
    assert main.main(["migrate", "--qmp", str(vm.path), "unix:/there"]) == 0
    out, err = capsys.readouterr()
    assert "downtime        170.0 ms\n" in out
    assert err == ""


def test_a_guest_that_stays(vm: _Migrating, capsys: pytest.CaptureFixture[str]) -> None:
    failed = _report()
    failed.status, failed.error = "failed", "the peer refused:\x1b]0;owned\x07 RAM differs"
    vm.answers = [failed.info()]
    assert main.main(["migrate", "--qmp", str(vm.path), "unix:/there"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "godwit: failed: the peer refused:?]0;owned? RAM differs\n"


def test_a_guest_that_goes_into_a_file_with_its_vm(
    vm: _Migrating, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VM may be gone before somebody asks it for its report."""

    def end() -> None:
        vm.server.emit("MIGRATION", {"status": "completed"})
        vm.loop.call_soon(vm.server.close)

    vm.answers = [_report().info()]
    vm.when_asked = end
    assert main.main(["save", "--qmp", str(vm.path), "guest"]) == 0
    assert vm.asked == {"path": f"{os.getcwd()}/guest", "keep-running": False}
    assert capsys.readouterr().err == ""


def test_a_vm_that_ends_while_its_guest_is_saved(
    vm: _Migrating, capsys: pytest.CaptureFixture[str]
) -> None:
    vm.answers = [_report().info()]
    vm.when_asked = vm.server.close
    assert main.main(["save", "--qmp", str(vm.path), "guest"]) == 1
    assert capsys.readouterr().out == ""


def test_a_copy(vm: _Migrating, capsys: pytest.CaptureFixture[str]) -> None:
    done = _report()
    done.status, done.downtime_ms = "completed", 30.0
    vm.answers = [done.info()]
    options = ["--keep-running", "--compress", "zstd"]
    assert main.main(["save", "--qmp", str(vm.path), *options, "/there/guest"]) == 0
    assert vm.asked == {"path": "/there/guest", "keep-running": True, "compress": "zstd"}
    assert "downtime        30.0 ms\n" in capsys.readouterr().out


def test_no_vm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["migrate", "--qmp", str(tmp_path / "qmp"), "unix:/there"]) == 1
    assert "no VM answers on" in capsys.readouterr().err
