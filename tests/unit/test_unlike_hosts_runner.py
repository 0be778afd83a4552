"""scripts/unlike-hosts: two labs in turn, and one more for a lab that died."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "scripts/unlike-hosts"
_spec = spec_from_loader("unlike_hosts", SourceFileLoader("unlike_hosts", str(_PATH)))
assert _spec is not None
assert _spec.loader is not None
runner = module_from_spec(_spec)
_spec.loader.exec_module(runner)


@pytest.mark.parametrize(
    ("statuses", "result", "hosts"),
    [
        ([0, 0], 0, ["EPYC-Rome", "EPYC"]),
        ([1], 1, ["EPYC-Rome"]),
        ([75, 0, 75, 0], 0, ["EPYC-Rome", "EPYC-Rome", "EPYC", "EPYC"]),
        ([75, 75], 75, ["EPYC-Rome", "EPYC-Rome"]),
        ([0, 75, 1], 1, ["EPYC-Rome", "EPYC", "EPYC"]),
    ],
)
def test_the_second_host_takes_what_the_first_one_left(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    statuses: list[int],
    result: int,
    hosts: list[str],
) -> None:
    asked: list[str] = []

    def call(command: list[object], cwd: Path) -> int:
        asked.append(str(command[command.index("--cpu") + 1]))
        assert f"GODWIT_UNLIKE={tmp_path}/out/unlike" in command
        return statuses[len(asked) - 1]

    monkeypatch.setattr(runner, "__file__", str(tmp_path / "scripts/unlike-hosts"))
    monkeypatch.setattr(runner.subprocess, "call", call)
    left = tmp_path / "out/unlike/of an earlier run"
    left.mkdir(parents=True)
    assert runner.main() == result
    assert asked == hosts
    assert not left.exists()
