"""``python -m lab``: its command line, and how it exits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import __main__ as module
from lab import demo, host
from lab.errors import LabCrashed, LabError

_ROOT = Path(__file__).parents[2]


def test_a_command_is_run_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(argv: list[str], **given: Any) -> int:
        asked.append((argv, given["timeout_s"], given["cpus"], given["rw"], given["cpu"]))
        return 17

    monkeypatch.setattr(host, "run", run)
    argv = [
        "run",
        "--timeout",
        "5",
        "--cpus",
        "3",
        "--rw",
        "out",
        "--rw",
        "more",
        "--cpu",
        "EPYC-Rome",
        "--",
        "ls",
        "--",
        "-l",
    ]
    assert module.main(argv) == 17
    assert module.main(["run", "true"]) == 17
    assert asked == [
        (["ls", "--", "-l"], 5.0, 3, [Path("out"), Path("more")], "EPYC-Rome"),
        (["true"], 600.0, 2, [], None),
    ]


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["run"], ["run", "--"]):
        with pytest.raises(SystemExit) as caught:
            module.main(argv)
        assert caught.value.code == 2
    assert "python -m lab run -- COMMAND" in capsys.readouterr().err


def test_shell_and_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "shell", lambda: 3)
    assert module.main(["shell"]) == 3
    outs: list[Path] = []
    monkeypatch.setattr(demo, "run", lambda out, say: outs.append(out) or 4)
    assert module.main(["demo", "--out", "there"]) == 4
    assert outs == [Path("there")]


@pytest.mark.parametrize(
    ("error", "status"), [(LabCrashed("it died"), 75), (LabError("it lacks gcc"), 1)]
)
def test_what_it_exits_with(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: LabError,
    status: int,
) -> None:
    def shell() -> int:
        raise error

    monkeypatch.setattr(host, "shell", shell)
    assert module.main(["shell"]) == status
    assert capsys.readouterr().err == f"lab: {error}\n"


def test_it_runs_from_the_repositorys_root() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "--help"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "shell" in done.stdout
    assert "demo" in done.stdout
