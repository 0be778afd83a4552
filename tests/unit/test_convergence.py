"""When the pre-copy ends, goes on, slows the guest down or is given up. Guests are numbers here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.errors import ConfigError
from godwit.migration.ram.convergence import (
    GOOD_ENOUGH_MS,
    MAX_FAILURES,
    MAX_ROUNDS,
    Action,
    Convergence,
    Verdict,
    why_not,
)
from godwit.migration.report import Report, Round
from godwit.spec.parameters import ConvergenceParameters, OnNoConvergence

LIMIT = 300.0
PATIENT = ConvergenceParameters()
ANYWAY = ConvergenceParameters(on_no_convergence=OnNoConvergence.STOP_AND_COPY)
AUTO = ConvergenceParameters(auto_converge=True)


def copy(
    first: int,
    dirties: float,
    parameters: ConvergenceParameters = PATIENT,
    *,
    limit: float = LIMIT,
    line: float = 10.0,
    most: int | None = None,
) -> Iterator[tuple[int, Verdict]]:
    """(pages left, verdict) of each round, for a guest that makes ``dirties`` pages dirty in a ms.

    ``first`` pages are populated, ``line`` go out in a ms, and the guest writes to ``most``.
    """
    judge = Convergence()
    pages, throttle = first, 0
    while True:
        ms = pages / line
        dirty = min(most or first, int(ms * dirties * (100 - throttle) / 100))
        verdict = judge.judge(pages, ms, dirty, limit, parameters)
        yield dirty, verdict
        if verdict.action is not Action.ROUND:
            return
        pages, throttle = dirty, verdict.throttle


def test_an_idle_guest_is_stopped_after_one_round() -> None:
    assert list(copy(20_000, 0.01)) == [(20, Verdict(Action.STOP, 0, 2.0))]
    # Many little pages, but quickly sent.
    ((dirty, verdict),) = copy(200_000, 0.02, line=100.0)
    assert (dirty, verdict.action) == (40, Action.STOP)


def test_rounds_go_on_as_long_as_they_help() -> None:
    rounds = list(copy(100_000, 5.0))
    assert [dirty for dirty, _ in rounds[:3]] == [50_000, 25_000, 12_500]
    assert rounds[-1][1].action is Action.STOP
    # Further than the limit asks for: a shorter stop is worth rounds that are as short.
    assert rounds[-1][1].expected_ms <= GOOD_ENOUGH_MS


def test_rounds_that_help_no_more_end_within_the_limit() -> None:
    # Its working set of 2,000 pages takes 200 ms.
    *others, (dirty, verdict) = copy(100_000, 50.0, most=2000)
    assert [verdict.action for _, verdict in others] == [Action.ROUND]
    assert (dirty, verdict.action, verdict.expected_ms) == (2000, Action.STOP, 200.0)


def test_the_limit_is_kept() -> None:
    *others, (_, last) = copy(100_000, 50.0, most=4000)
    assert last == Verdict(Action.ABORT, 0, 400.0)
    assert len(others) == MAX_ROUNDS - 1
    # And with the operator's leave it is not.
    *others, (_, last) = copy(100_000, 50.0, ANYWAY, most=4000)
    assert last == Verdict(Action.STOP, 0, 400.0)
    assert len(others) == MAX_ROUNDS - 1


def test_a_limit_of_nothing_still_lets_an_idle_guest_go() -> None:
    ((_, verdict),) = copy(20_000, 0.01, limit=0)
    assert verdict.action is Action.STOP


def test_the_throttle_rises_step_by_step_until_rounds_help() -> None:
    rounds = list(copy(100_000, 20.0, AUTO, most=50_000))
    throttles = [verdict.throttle for _, verdict in rounds]
    # Twice as fast as the line: at 60 percent, eight tenths of it, and that shrinks too little.
    assert throttles[:8] == [0, 20, 30, 40, 50, 60, 70, 70]
    assert set(throttles[7:]) == {70}
    assert rounds[-1][1].action is Action.STOP


def test_the_throttle_has_a_bound_and_tries_there() -> None:
    parameters = ConvergenceParameters(
        auto_converge=True,
        cpu_throttle_initial=30,
        cpu_throttle_increment=25,
        max_cpu_throttle=70,
    )
    rounds = [verdict for _, verdict in copy(100_000, 100.0, parameters)]
    assert [verdict.throttle for verdict in rounds] == [
        0,
        30,
        55,
        70,
        *[70] * (MAX_FAILURES - 1),
        0,
    ]
    assert rounds[-1].action is Action.ABORT


def test_the_highest_throttle_may_help_slowly() -> None:
    # At 99 percent seven tenths come back: that is progress.
    rounds = [verdict for _, verdict in copy(100_000, 700.0, AUTO)]
    assert max(verdict.throttle for verdict in rounds) == 99
    assert rounds[-1].action is Action.STOP
    assert rounds[-1].expected_ms <= LIMIT


def test_a_throttled_guest_may_be_stopped_regardless() -> None:
    parameters = ConvergenceParameters(
        auto_converge=True, max_cpu_throttle=20, on_no_convergence=OnNoConvergence.STOP_AND_COPY
    )
    *_, (_, last) = copy(100_000, 100.0, parameters)
    assert last.action is Action.STOP
    assert last.expected_ms > LIMIT


def test_an_operator_may_change_the_mind_between_rounds() -> None:
    judge = Convergence()

    def useless(parameters: ConvergenceParameters) -> Verdict:
        return judge.judge(50_000, 5000.0, 50_000, LIMIT, parameters)

    assert [useless(PATIENT).throttle for _ in range(5)] == [0] * 5
    assert [useless(AUTO).throttle for _ in range(3)] == [20, 30, 40]
    lower = ConvergenceParameters(auto_converge=True, max_cpu_throttle=25)
    assert useless(lower) == Verdict(Action.ROUND, 25, 5000.0)
    assert useless(PATIENT) == Verdict(Action.ROUND, 0, 5000.0)


def test_a_round_of_few_pages_does_not_measure_the_line() -> None:
    judge = Convergence()
    judge.judge(10_000, 1000.0, 5000, LIMIT, PATIENT)  # 0.1 ms a page
    # Ten pages and a hiccup of the host's.
    verdict = judge.judge(10, 50.0, 100, LIMIT, PATIENT)
    assert verdict.expected_ms == pytest.approx(10.0)
    # A burst after next to nothing is sent is no reason to stop, if nothing was measured.
    verdict = Convergence().judge(10, 1.0, 50_000, LIMIT, PATIENT)
    assert verdict.action is Action.ROUND
    assert Convergence().judge(0, 0.1, 0, LIMIT, PATIENT).action is Action.STOP


_PERCENT = st.integers(1, 99)


@st.composite
def _parameters(draw: st.DrawFn) -> ConvergenceParameters:
    initial = draw(_PERCENT)
    return ConvergenceParameters(
        auto_converge=draw(st.booleans()),
        cpu_throttle_initial=initial,
        cpu_throttle_increment=draw(_PERCENT),
        max_cpu_throttle=draw(st.integers(initial, 99)),
        on_no_convergence=draw(st.sampled_from(OnNoConvergence)),
    )


@given(
    parameters=_parameters(),
    limit=st.integers(0, 2000),
    rounds=st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(0.0, 1e6)), min_size=1, max_size=300
    ),
)
def test_whatever_a_guest_does(
    parameters: ConvergenceParameters, limit: int, rounds: list[tuple[int, float]]
) -> None:
    judge = Convergence()
    before, level, at_level = 0, 10**6, 0
    throttle = 0
    for dirty, ms in rounds:
        verdict = judge.judge(level, ms, dirty, limit, parameters)
        level, at_level = dirty, at_level + 1
        assert verdict.expected_ms >= 0
        if verdict.action is Action.ABORT:
            assert parameters.on_no_convergence is OnNoConvergence.ABORT
            assert verdict.expected_ms > max(limit, GOOD_ENOUGH_MS)
            assert throttle in (0, parameters.max_cpu_throttle)
            return
        if verdict.action is Action.STOP:
            if parameters.on_no_convergence is OnNoConvergence.ABORT:
                assert verdict.expected_ms <= max(limit, GOOD_ENOUGH_MS)
            return
        throttle = verdict.throttle
        assert throttle <= (parameters.max_cpu_throttle if parameters.auto_converge else 0)
        assert throttle >= before  # it rises only
        if throttle != before:
            at_level = 0
        before = throttle
        assert at_level < MAX_ROUNDS


@given(parameters=_parameters(), dirties=st.floats(0.0, 1e4), limit=st.integers(0, 2000))
def test_it_always_ends(parameters: ConvergenceParameters, dirties: float, limit: int) -> None:
    rounds = list(copy(100_000, dirties, parameters, limit=limit))
    span = parameters.max_cpu_throttle - parameters.cpu_throttle_initial
    levels = 2 + -(-span // parameters.cpu_throttle_increment)
    # A steady guest fails once at each level, and helps at one of them.
    assert len(rounds) <= levels + MAX_FAILURES + MAX_ROUNDS


@given(
    limit=st.integers(0, 2000),
    rounds=st.lists(st.tuples(st.integers(64, 10**5), st.floats(0.0, 1e4)), min_size=1),
    ends_with=st.integers(0, 63),
)
def test_without_auto_converge_the_rounds_are_those_of_the_plain_rule(
    limit: int, rounds: list[tuple[int, float]], ends_with: int
) -> None:
    """30 passes; fewer if 10 ms are left, or if what is left shrinks no more and is in the limit.
    Short passes of less than half a frame say only how slow the line is at the most."""

    def plain() -> int:
        sent, previous, per_page = 10**5, None, float("inf")
        for number, (dirty, ms) in enumerate(played, 1):
            if sent >= 1024 or (sent >= 64 and ms >= 100.0):
                per_page = ms / sent
            elif sent >= 64:
                per_page = min(per_page, ms / sent)
            expected = dirty * per_page
            shrinking = previous is None or dirty < previous * 0.75
            if number == 30 or expected <= 10.0 or (not shrinking and expected <= limit):
                return number
            sent = previous = dirty
        return 0

    def judged() -> int:
        judge, sent = Convergence(), 10**5
        for number, (dirty, ms) in enumerate(played, 1):
            if judge.judge(sent, ms, dirty, limit, ANYWAY).action is Action.STOP:
                return number
            sent = dirty
        return 0

    played = [*rounds, (ends_with, 1.0), (0, 0.1)]
    assert judged() == plain()


def test_a_line_that_became_quicker_is_noticed_by_small_rounds() -> None:
    judge = Convergence()
    assert judge.judge(30_000, 120_000.0, 900, 300, ANYWAY).expected_ms == 3600.0
    assert judge.judge(900, 8.0, 900, 300, ANYWAY) == (Action.STOP, 0, 8.0)


def test_a_line_that_became_slower_is_noticed_by_small_rounds() -> None:
    judge = Convergence()
    assert judge.judge(100_000, 1000.0, 1100, 300, ANYWAY).action is Action.ROUND
    verdict = judge.judge(900, 3600.0, 900, 300, ANYWAY)
    assert (verdict.action, verdict.expected_ms) == (Action.ROUND, 3600.0)


def test_a_small_round_does_not_make_the_line_slow() -> None:
    judge = Convergence()
    assert judge.judge(20_000, 600.0, 700, 300, ANYWAY).expected_ms == 21.0
    assert judge.judge(700, 70.0, 330, 300, ANYWAY) == (Action.STOP, 0, 9.9)


def test_the_reason_names_what_can_be_changed() -> None:
    last = Round(40_000, 0, 4000.0, dirty=20_000, throttle=70)
    verdict = Verdict(Action.ABORT, 0, 2000.0)
    bounded = ConvergenceParameters(auto_converge=True, max_cpu_throttle=70)
    text = why_not(verdict, 8, last, 300, bounded)
    for part in (
        "8 rounds",
        "70 percent",
        "81.9 MB",
        "2000 ms",
        "300 ms",
        "raise max-cpu-throttle",
    ):
        assert part in text
    assert "auto-converge" not in text
    text = why_not(verdict, 30, Round(40_000, 0, 4000.0, dirty=20_000), 300, PATIENT)
    assert "switch auto-converge on" in text
    assert "throttled" not in text
    assert "max-cpu-throttle" not in why_not(verdict, 9, last, 300, AUTO)
    for parameters in (bounded, PATIENT, AUTO):
        text = why_not(verdict, 8, last, 300, parameters)
        for remedy in ("max-bandwidth", "downtime-limit", "on-no-convergence=stop-and-copy"):
            assert remedy in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"cpu_throttle_initial": 0}, "'cpu-throttle-initial' is 0: choose a value from 1 to 99"),
        ({"cpu_throttle_increment": 100}, "'cpu-throttle-increment' is 100: choose a value"),
        ({"max_cpu_throttle": 100}, "'max-cpu-throttle' is 100: choose a value from 1 to 99"),
        ({"max_cpu_throttle": 10}, "less than 'cpu-throttle-initial', which is 20: raise"),
        ({"cpu_throttle_initial": 60, "max_cpu_throttle": 50}, "'max-cpu-throttle' is 50, less"),
    ],
)
def test_wrong_parameters_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConvergenceParameters(**values)
    assert text in str(caught.value)


def test_what_query_migrate_shows_of_a_round() -> None:
    report = Report(now=time.monotonic, status="active")
    assert report.info()["ram"]["dirty-pages-rate"] == 0
    assert "expected-downtime" not in report.info()
    report.rounds.append(Round(1000, 10, 500.0, 4_100_000, 200, 400.0, 0))
    report.rounds.append(Round(200, 0, 100.0, 820_000, 300, 100.0, 20))
    report.throttle, report.expected_ms = 30, 150.0
    info = report.info()
    assert info["ram"]["dirty-sync-count"] == 2
    assert info["ram"]["dirty-pages-rate"] == 3000
    assert info["ram"]["pages-per-second"] == 2000
    assert info["ram"]["mbps"] == 65.6
    assert info["expected-downtime"] == 150.0
    assert info["cpu-throttle-percentage"] == 30
    first, second = info["godwit"]["rounds"]
    assert first == {
        "pages": 1000,
        "zero-pages": 10,
        "ms": 500.0,
        "dirty-pages": 200,
        "dirty-pages-rate": 500,
        "cpu-throttle-percentage": 0,
    }
    assert second["cpu-throttle-percentage"] == 20
    # The stop is no measure of the guest, and ends what was only expected.
    report.rounds.append(Round(50, 0, 0.0))
    report.throttle, report.downtime_ms, report.status = 0, 170.0, "completed"
    info = report.info()
    assert info["ram"]["dirty-pages-rate"] == 3000
    assert info["godwit"]["rounds"][-1] == {"pages": 50, "zero-pages": 0, "ms": 0.0}
    assert info["downtime"] == 170.0
    assert not {"expected-downtime", "cpu-throttle-percentage"} & set(info)
