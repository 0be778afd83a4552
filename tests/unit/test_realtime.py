"""The real-time section: both ends go before all others while a guest stands still."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from godwit.migration import realtime
from godwit.migration.realtime import RealtimeSection
from godwit.migration.times import Times
from migration_bench import IMPATIENT, Migration, S, Side
from tests.fakes.clock import FakeClock

FLAG = os.SCHED_RESET_ON_FORK
NORMAL, RAISED = os.SCHED_OTHER | FLAG, os.SCHED_RR | FLAG


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who asked for which policy."""
    found: list[tuple[str, int]] = []

    def ask(pid: int, policy: int, parameter: os.sched_param) -> None:
        assert pid == 0, "the calling thread"
        assert policy & FLAG, "without a capability it cannot be taken back"
        assert parameter.sched_priority == (policy != NORMAL)
        found.append((threading.current_thread().name, policy))

    monkeypatch.setattr(realtime.os, "sched_setscheduler", ask)
    return found


def test_both_ends_are_raised_during_the_stop_and_not_after_it(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    move = Migration(tmp_path)
    move.run()
    move.close()
    assert move.here.statuses[-1] == "completed"
    for name in ("migration", "incoming"):
        assert [policy for who, policy in asked if who == name] == [RAISED, NORMAL]


def test_a_source_whose_guest_stays_is_ordinary_again(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    move = Migration(tmp_path)
    move.there.refuse_states()
    move.run()
    move.close()
    assert move.here.statuses[-1] == "failed"
    assert [policy for who, policy in asked if who == "migration"] == [RAISED, NORMAL]


@pytest.mark.parametrize("starts", [True, False])
def test_a_guest_from_a_file_is_not_raised_for_ever(
    tmp_path: Path, asked: list[tuple[str, int]], starts: bool
) -> None:
    uri = f"file:{tmp_path / 'guest'}"
    here = Side(S.RUNNING, IMPATIENT)
    here.machine.resume()
    here.migrations.migrate(uri, False)
    outgoing = here.migrations._outgoing
    assert outgoing is not None
    outgoing.join(30)
    assert here.statuses[-1] == "completed"
    there = Side(S.INMIGRATE, IMPATIENT)
    there.migrations.autostart = starts
    collects: list[bool] = []
    there.states.listen(lambda old, new: collects.append(gc.isenabled()))
    asked.clear()
    there.migrations.await_guest(uri, False)
    incoming = there.migrations._incoming
    assert incoming is not None
    incoming._thread.join(30)
    assert there.states.current is (S.RUNNING if starts else S.PRELAUNCH_MIGRATE)
    assert collects[:2] == [True, False], "prelaunch-migrate: within the section"
    here.close()
    there.close()
    assert gc.isenabled()
    assert [policy for _, policy in asked] == [RAISED, NORMAL]


def test_a_peer_that_comes_to_no_end_is_not_raised_for_long(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]]
) -> None:
    clock = FakeClock()
    one = RealtimeSection(Times(now=clock.now))
    one.begin()
    for passes in (0.9, 0.2, 0.1):
        clock.advance(passes)
        one.expire()
    assert [policy for _, policy in asked] == [RAISED, NORMAL]


@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_FIFO])
def test_nobody_looks_for_garbage_meanwhile(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]], policy: int
) -> None:
    monkeypatch.setattr(realtime.os, "sched_getscheduler", lambda pid: policy)
    one = RealtimeSection()
    assert gc.isenabled()
    one.begin()
    one.begin()
    assert not gc.isenabled()
    one.end()
    one.end()
    assert gc.isenabled()
    gc.disable()  # an operator's choice
    try:
        one.begin()
        one.end()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_stop_that_will_be_long_is_not_raised(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    move = Migration(tmp_path)

    def before(status: str) -> None:
        if status == "setup":
            move.source.report.expected_ms = 301.0
            move.source._precopy = lambda: None  # type: ignore[method-assign]

    move.here.on_status = before
    move.run()
    move.close()
    assert [who for who, _ in asked if who == "migration"] == []


def test_who_may_not_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, policy: int, parameter: os.sched_param) -> None:
        assert policy == RAISED, "nothing is to be undone"
        raise PermissionError

    monkeypatch.setattr(realtime.os, "sched_setscheduler", refuse)
    one = RealtimeSection()
    one.begin()
    assert not gc.isenabled()
    one.end()
    assert gc.isenabled()


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_BATCH])
def test_an_operators_policy_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]], policy: int
) -> None:
    monkeypatch.setattr(realtime.os, "sched_getscheduler", lambda pid: policy)
    one = RealtimeSection()
    one.begin()
    one.end()
    assert asked == []


def test_a_thread_that_is_started_meanwhile_is_ordinary() -> None:
    policies: list[int] = []

    def look() -> None:
        policies.append(os.sched_getscheduler(0) & ~FLAG)

    def raised() -> None:
        one = RealtimeSection()
        one.begin()
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        one.end()
        look()

    thread = threading.Thread(target=raised)
    thread.start()
    thread.join()
    if policies[0] == os.SCHED_OTHER:
        pytest.skip("this user may not")
    assert policies == [os.SCHED_RR, os.SCHED_OTHER, os.SCHED_OTHER]
