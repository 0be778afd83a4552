"""Who goes first while a guest stands still."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from move_bench import Move

from godwit.migration import urgency
from godwit.migration.urgency import Urgency

NORMAL, URGENT = os.SCHED_OTHER, os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who asked for which policy."""
    found: list[tuple[str, int]] = []

    def ask(pid: int, policy: int, parameter: os.sched_param) -> None:
        assert pid == 0, "the calling thread"
        assert parameter.sched_priority == (policy != NORMAL)
        found.append((threading.current_thread().name, policy))

    monkeypatch.setattr(urgency.os, "sched_setscheduler", ask)
    return found


def test_both_ends_are_urgent_during_the_stop_and_not_after_it(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    move = Move(tmp_path)
    move.run()
    move.close()
    assert move.told[-1] == "completed"
    for name in ("migration", "incoming"):
        assert [policy for who, policy in asked if who == name] == [URGENT, NORMAL]


def test_a_source_whose_guest_stays_is_ordinary_again(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    move = Move(tmp_path)
    move.there.bad_state = True
    move.run()
    move.close()
    assert move.told[-1] == "failed"
    assert [policy for who, policy in asked if who == "migration"] == [URGENT, NORMAL]


def test_who_may_not_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, policy: int, parameter: os.sched_param) -> None:
        assert policy != NORMAL, "nothing is to be undone"
        raise PermissionError

    monkeypatch.setattr(urgency.os, "sched_setscheduler", refuse)
    one = Urgency()
    one.begin()
    one.end()


def test_a_thread_that_is_started_meanwhile_is_ordinary() -> None:
    one = Urgency()
    one.begin()
    if os.sched_getscheduler(0) == NORMAL:
        pytest.skip("this user may not")
    try:
        policies: list[int] = []
        thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        assert policies == [NORMAL]
    finally:
        one.end()
    assert os.sched_getscheduler(0) == NORMAL
