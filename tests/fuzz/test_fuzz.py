"""Each target finds nothing: in its corpus, and in inputs that are made from it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.fuzz import fuzzer
from tests.fuzz.driver import line, report
from tests.fuzz.fuzzer import Fuzzer
from tests.fuzz.mutate import mutate
from tests.fuzz.target import LONGEST, Finding, Target, require
from tests.fuzz.targets import NAMES, load

#: The signal of pytest-timeout is the fuzzer's own, which bounds each input.
pytestmark = pytest.mark.timeout(0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found(name: str, request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("--fuzz-time")
    result = Fuzzer(load(name), request.config.getoption("--fuzz-seed")).run(seconds)
    print(line(result))
    if result.found is not None:
        pytest.fail(report(result), pytrace=False)
    assert result.inputs >= len(load(name).corpus)


@pytest.mark.parametrize("name", NAMES)
def test_each_target_has_a_small_corpus(name: str) -> None:
    paths = load(name).corpus
    assert 4 <= len(paths) <= 60
    assert all(path.stat().st_size <= 8192 for path in paths)


# --- the fuzzer -----------------------------------------------------------------------------------
def _run(data: bytes) -> None:
    require(b"bug" not in data, "there is a bug")
    if b"fail" in data:
        raise KeyError("fail")


@pytest.mark.parametrize("token", [b"bug", b"fail"])
def test_what_is_planted_is_found_and_made_small(
    token: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("planted", _run, tokens=(token,))
    found = Fuzzer(target, 1).run(30).found
    assert found is not None
    data, what = found
    assert token in data
    last = what.strip().splitlines()[-1]
    again = Fuzzer(target, 0)
    small = fuzzer.shrink(target, data, lambda shorter: last in (again.one(shorter) or ""))
    assert small == token
    monkeypatch.setattr(fuzzer, "OUT", tmp_path)
    assert fuzzer.keep(target, small).read_bytes() == token


def test_an_input_that_takes_too_long_is_a_finding() -> None:
    def run(data: bytes) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                pass

    assert "more than 0.05 s" in (Fuzzer(Target("slow", run, limit=0.05), 1).one(b"") or "")


def test_memory_that_one_input_takes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [100 << 10, 100 << 10, 120 << 10, 900 << 10]
    monkeypatch.setattr(fuzzer, "_peak", lambda: peaks.pop(0))
    one = Fuzzer(Target("large", lambda data: None), 1).one
    assert one(b"") is None
    assert "MiB" in (one(b"") or "")


def test_descriptors_that_are_left_behind_are_a_finding() -> None:
    kept: list[int] = []

    def run(data: bytes) -> None:
        kept.append(os.open("/dev/null", os.O_RDONLY))

    target = Target("leak", run, quick=160)
    found = Fuzzer(target, 1).run(None).found
    for fd in kept:
        os.close(fd)
    assert found is not None
    assert "descriptors" in found[1]


def test_coverage_keeps_an_input_that_reaches_something_new() -> None:
    from godwit.qmp.protocol import Session

    def run(data: bytes) -> None:
        session = Session(lambda name, arguments: None)
        session.feed(data)
        session.step()

    fuzzer = Fuzzer(Target("kept", run, ("/godwit/qmp/",)), 1)
    for data in (b"{}", b"{}", b'{"execute":"a"}', b"["):
        assert fuzzer.one(data) is None
    assert fuzzer._queue == [b"{}", b'{"execute":"a"}', b"["]


def test_a_seed_makes_the_same_inputs() -> None:
    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []
        Fuzzer(Target("seen", seen.append, tokens=(b"abc",), quick=50), seed).run(None)
        return seen

    assert inputs(1) == inputs(1) != inputs(2)


def test_mutations_stay_within_the_longest_input() -> None:
    rnd = random.Random(1)
    target = Target("records", lambda data: None, record=4, head=1)
    data = b"h" + b"".join(bytes([n]) * 4 for n in range(20))
    for _ in range(200):
        assert len(mutate(rnd, target, data, data)) <= LONGEST


def test_a_finding_names_the_rule() -> None:
    with pytest.raises(Finding, match="not so"):
        require(False, "not so")
