"""scripts/vm-tests: which verdict counts when a lab dies or a test fails in it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "scripts/vm-tests"
_spec = spec_from_loader("vm_tests", SourceFileLoader("vm_tests", str(_PATH)))
assert _spec is not None
assert _spec.loader is not None
runner = module_from_spec(_spec)
_spec.loader.exec_module(runner)

#: A lab: its exit status, and what its tests note.
Lab = tuple[int, str]


def _labs(done: Path, *labs: Lab) -> Callable[[], int]:
    rest = list(labs)

    def run() -> int:
        status, notes = rest.pop(0)
        with done.open("a") as stream:
            stream.writelines(f"{note}\n" for note in notes.split(",") if note)
        return status

    return run


@pytest.mark.parametrize(
    ("labs", "status", "says"),
    [
        ([(0, "passed a,passed b")], 0, "2 passed, 0 failed"),
        # A dead lab's tests without a verdict are judged by the next one.
        ([(75, "passed a"), (0, "passed b")], 0, "2 passed, 0 failed"),
        # One that died after the last test.
        ([(75, "passed a"), (5, "")], 0, "1 passed, 0 failed"),
        # Failed once, passed once: unstable, and named.
        ([(1, "failed a,passed b"), (0, "passed a")], 0, "UNSTABLE"),
        # Failed in a lab that died: also only the first verdict.
        ([(75, "failed a"), (0, "passed a,passed b")], 0, "UNSTABLE"),
        ([(75, "failed a"), (75, "failed a,passed b"), (5, "")], 1, "1 passed, 1 failed"),
        ([(1, "failed a,passed b"), (1, "failed a")], 1, "failed a"),
        # A failure for the first time in the lab that judges another for the second.
        ([(75, "failed a"), (1, "failed a,failed b"), (0, "passed b")], 1, "1 passed, 1 failed"),
        # No test at all is no success; neither is a usage error.
        ([(5, "")], 1, "0 passed, 0 failed"),
        ([(4, "")], 4, ""),
        # Ended, but not by a test: a time limit, say.
        ([(75, "passed a"), (1, "")], 1, "1 passed, 0 failed"),
        ([(1, "passed a")], 1, "1 passed, 0 failed"),
        ([(75, "failed a"), (1, "passed b")], 1, "1 passed, 0 failed"),
        ([(75, "")] * 8, 1, "0 passed, 0 failed"),
    ],
)
def test_verdicts_in_the_lab(
    labs: list[Lab], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    verdicts = runner.Verdicts(done)
    assert runner.judge(_labs(done, *labs), verdicts, emulated=True) == status
    assert says in capsys.readouterr().out


def test_on_kvm_the_first_verdict_is_the_only_one(tmp_path: Path) -> None:
    done = tmp_path / "done"
    verdicts = runner.Verdicts(done)
    assert runner.judge(_labs(done, (1, "failed a,passed b")), verdicts, emulated=False) == 1


def test_an_unstable_test_passes_once_and_is_to_be_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    verdicts = runner.Verdicts(done, {"tests/vm/test_y.py::test_b"})
    node = "tests/vm/test_x.py::test_a[with a space]"
    labs = _labs(done, (1, f"failed {node}"), (0, f"passed {node}"))
    assert runner.judge(labs, verdicts, emulated=True) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "add to tests/vm/unstable.txt" in line)
    assert runner.unstable(line.partition(": ")[2]) == {node}


def test_a_test_that_is_unstable_again_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    verdicts = runner.Verdicts(done, {"a"})
    labs = _labs(done, (1, "failed a,passed b"), (0, "passed a"))
    assert runner.judge(labs, verdicts, emulated=True) == 1
    out = capsys.readouterr().out
    assert "named UNSTABLE twice, which counts as failed: a" in out
    assert "failed a\n" in out
    assert "1 passed, 1 failed" in out


def test_a_listed_test_that_just_passes_has_passed(tmp_path: Path) -> None:
    done = tmp_path / "done"
    verdicts = runner.Verdicts(done, {"a"})
    assert runner.judge(_labs(done, (0, "passed a")), verdicts, emulated=True) == 0


def test_the_list_of_unstable_tests() -> None:
    kept = (_PATH.parents[1] / runner.UNSTABLE).read_text()
    root = _PATH.parents[1]
    assert all((root / node.partition("::")[0]).exists() for node in runner.unstable(kept))
    text = "# why\n\n2026-11-26 ping tests/vm/test_x.py::test_a[b c]\n"
    assert runner.unstable(text) == {"tests/vm/test_x.py::test_a[b c]"}
    with pytest.raises(ValueError, match="not a date, a word and a node id"):
        runner.unstable("tests/vm/test_x.py::test_a\n")


def test_without_a_path_both_folders_run() -> None:
    assert runner.TESTS == ("tests/vm", "tests/networks")
    assert all((_PATH.parents[1] / folder / "conftest.py").exists() for folder in runner.TESTS)
