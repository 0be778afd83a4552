"""Who goes first while a guest stands still."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from godwit.machine.machine import Machine
from godwit.migration import realtime as urgency
from godwit.migration.realtime import RealtimeSection
from godwit.migration.snapshot import Restorer
from godwit.migration.wire import messages
from godwit.migration.wire.compatibility import describe
from godwit.migration.wire.messages import Kind
from godwit.spec import saved
from move_bench import Move, Standin
from recorded import STREAMS

FLAG = os.SCHED_RESET_ON_FORK
NORMAL, URGENT = os.SCHED_OTHER | FLAG, os.SCHED_RR | FLAG


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who asked for which policy."""
    found: list[tuple[str, int]] = []

    def ask(pid: int, policy: int, parameter: os.sched_param) -> None:
        assert pid == 0, "the calling thread"
        assert policy & FLAG, "without a capability it cannot be taken back"
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


@pytest.mark.parametrize("starts", [True, False])
def test_a_guest_from_a_file_is_not_urgent_for_ever(
    tmp_path: Path, asked: list[tuple[str, int]], starts: bool
) -> None:
    machine, path, ran = Standin(), tmp_path / "guest", list[bool]()
    token = bytes(16)
    frames = (
        (Kind.HELLO, saved.encode(describe(cast(Machine, machine), token))),
        (Kind.STATE, STREAMS[1].read()[1]),
        (Kind.ROUND, b""),
        (Kind.COMMIT, saved.encode(messages.Commit(token, starts))),
    )
    path.write_bytes(b"".join(messages.message(kind, payload) for kind, payload in frames))

    def start(running: bool, mark: Callable[[str], None], *others: object) -> None:
        ran.append(running)
        assert not gc.isenabled()
        if running:
            mark("vcpus-started")

    restorer = Restorer(cast(Machine, machine), path, start, lambda error: pytest.fail(str(error)))
    restorer.start()
    restorer._thread.join(30)
    restorer.close()
    machine.close()
    assert ran == [starts]
    assert gc.isenabled()
    assert [policy for _, policy in asked] == [URGENT, NORMAL]


def test_a_peer_that_comes_to_no_end_is_not_urgent_for_long(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]]
) -> None:
    now = 100.0
    monkeypatch.setattr(urgency, "time", SimpleNamespace(monotonic=lambda: now))
    one = RealtimeSection()
    one.begin()
    for at in (100.9, 101.1, 101.2):
        now = at
        one.look()
    assert [policy for _, policy in asked] == [URGENT, NORMAL]


@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_FIFO])
def test_nobody_looks_for_garbage_meanwhile(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]], policy: int
) -> None:
    monkeypatch.setattr(urgency.os, "sched_getscheduler", lambda pid: policy)
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


def test_a_stop_that_will_be_long_is_not_urgent(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    move = Move(tmp_path)
    move.source.report.expected_ms = 301.0
    move.source._precopy = lambda: None  # type: ignore[method-assign]
    move.run()
    move.close()
    assert [who for who, _ in asked if who == "migration"] == []


def test_who_may_not_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, policy: int, parameter: os.sched_param) -> None:
        assert policy == URGENT, "nothing is to be undone"
        raise PermissionError

    monkeypatch.setattr(urgency.os, "sched_setscheduler", refuse)
    one = RealtimeSection()
    one.begin()
    assert not gc.isenabled()
    one.end()
    assert gc.isenabled()


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_BATCH])
def test_an_operators_policy_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]], policy: int
) -> None:
    monkeypatch.setattr(urgency.os, "sched_getscheduler", lambda pid: policy)
    one = RealtimeSection()
    one.begin()
    one.end()
    assert asked == []


def test_a_thread_that_is_started_meanwhile_is_ordinary() -> None:
    policies: list[int] = []

    def look() -> None:
        policies.append(os.sched_getscheduler(0) & ~FLAG)

    def urgent() -> None:
        one = RealtimeSection()
        one.begin()
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        one.end()
        look()

    thread = threading.Thread(target=urgent)
    thread.start()
    thread.join()
    if policies[0] == os.SCHED_OTHER:
        pytest.skip("this user may not")
    assert policies == [os.SCHED_RR, os.SCHED_OTHER, os.SCHED_OTHER]
