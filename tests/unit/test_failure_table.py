"""Every phase of a move x every fault: exactly one side runs, and all is given back.

Both ends are real, with their threads and sockets; the machines are stand-ins. What a real guest
and its peers notice is for tests/vm (test_failing_moves, test_lost_line, test_handover).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.migration import destination, source
from godwit.migration.packets import destination as arrival
from godwit.migration.packets import source as forwarder
from godwit.migration.wire import sockets as channel
from godwit.migration.wire.messages import Kind
from move_bench import Move, S
from tests.fakes.line_cutter import LineCutter

#: The frame at which the fault strikes: each step of the conversation.
PHASES = (
    Kind.HELLO,
    Kind.WELCOME,
    Kind.PREFAULT,
    Kind.RAM,
    Kind.ROUND,
    Kind.STATE,
    Kind.READY,
    Kind.COMMIT,
    Kind.SWITCHED,
    Kind.PATH_DRAINED,
    Kind.STARTED,
    Kind.ACK,
)
#: From here on the guest may be at its destination; before, it is not.
HANDED_OVER = (Kind.COMMIT, Kind.SWITCHED, Kind.PATH_DRAINED, Kind.STARTED, Kind.ACK)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is given up soon; what comes, comes sooner."""
    monkeypatch.setattr(channel, "SILENCE", 0.5)
    monkeypatch.setattr(source, "SILENCE", 0.5)
    monkeypatch.setattr(destination, "SILENCE", 0.5)
    monkeypatch.setattr(arrival, "SILENCE", 0.5)
    monkeypatch.setattr(destination, "PATIENCE", 5.0)
    monkeypatch.setattr(source, "_ASK_AGAIN", 0.01)
    monkeypatch.setattr(forwarder, "MARKS_S", 0.0)
    monkeypatch.setattr(forwarder, "LATE_S", 0.0)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Descriptors and threads are what they were."""
    before = _held()
    yield
    for thread in threading.enumerate():
        if thread.name in ("migration", "incoming", "touch"):
            thread.join(10)
    assert _held() == before


def _held() -> tuple[int, set[str]]:
    ours = {t.name for t in threading.enumerate() if t.name in ("migration", "incoming", "touch")}
    return len(os.listdir("/proc/self/fd")), ours


def _judge(move: Move) -> None:
    """Exactly one side runs, and both say what is so."""
    here, there = move.running
    completed = move.told[-1] == "completed"
    assert here is not completed, move.source.report
    assert there is (completed and not move.dead)  # whoever is killed after that takes it along
    assert move.states.current is (S.POSTMIGRATE if completed else S.RUNNING)
    assert not move.here.logging
    if move.told[-1] == "failed":
        assert move.source.report.error


def _run(folder: Path, kind: Kind, delivered: bool, fault: str) -> Move:
    near = folder / "near"
    move = Move(folder, near)

    def strike() -> None:
        if fault == "killed":
            move.kill()
        elif fault == "cancelled":
            move.source.cancel()

    before = strike if fault == "killed" else None
    cut = None if fault == "cancelled" else kind

    def shown(seen: Kind, payload: object) -> None:
        if fault == "cancelled" and seen is kind:
            strike()

    with LineCutter(near, move.far, cut, delivered, before, shown, fault == "stopped"):
        try:
            move.run()
            _judge(move)
        finally:
            move.close()
    return move


@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_the_line_breaks(tmp_path: Path, kind: Kind, delivered: bool) -> None:
    move = _run(tmp_path, kind, delivered, "cut")
    # Once the source has given the guest up it asks, and the destination has it or takes it. With
    # READY both may be: the commit is under way, or not.
    if kind is not Kind.READY:
        assert (move.told[-1] == "completed") == (kind in HANDED_OVER)


@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_the_destination_is_killed(tmp_path: Path, kind: Kind, delivered: bool) -> None:
    move = _run(tmp_path, kind, delivered, "killed")
    # Its own kernel refuses for it: the guest is not there. What was heard counts.
    heard = kind is Kind.ACK or (kind is Kind.STARTED and delivered)
    assert (move.told[-1] == "completed") == heard


@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_the_destination_stops_answering(tmp_path: Path, kind: Kind) -> None:
    move = _run(tmp_path, kind, False, "stopped")
    assert (move.told[-1] == "completed") == (kind in HANDED_OVER)


@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_it_is_cancelled(tmp_path: Path, kind: Kind) -> None:
    move = _run(tmp_path, kind, True, "cancelled")
    if kind in HANDED_OVER:
        assert move.told[-1] == "completed"
    else:
        assert move.told[-1] in ("cancelled", "completed")  # the commit may have been on its way


def test_a_question_is_answered_on_the_line_where_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COMMIT is lost: nobody waits for what the old line cannot bring."""
    for module in (channel, destination, arrival, source):
        monkeypatch.setattr(module, "SILENCE", 120.0)
    move = _run(tmp_path, Kind.COMMIT, False, "cut")
    assert move.told[-1] == "completed"


def test_a_line_that_is_only_silent_is_left_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STARTED is lost, and nobody hangs up: the destination has to hear the question."""
    monkeypatch.setattr(arrival, "SILENCE", 120.0)
    move = _run(tmp_path, Kind.STARTED, False, "stopped")
    assert move.told[-1] == "completed"


def test_the_state_is_bad(tmp_path: Path) -> None:
    move = Move(tmp_path)
    move.there.bad_state = True
    move.run()
    _judge(move)
    assert move.told[-1] == "failed"
    assert "not as they should be" in (move.source.report.error or "")
    move.wait_failed()
    move.close()
    assert "not as they should be" in str(move.failed[0])


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
def test_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Late: the old road ends when its guest runs already, and its source is told to quit."""
    move = Move(tmp_path, tmp_path / "near")
    if late:
        monkeypatch.setattr(arrival, "SETTLE_S", 0.0)
        for name in ("MARKS_S", "LONGEST_S"):
            monkeypatch.setattr(forwarder, name, 60.0)
    seen: list[Kind] = []
    road_ends = threading.Event()

    def told(status: str) -> None:
        if late and status == "completed":
            move.source.abandon()
            monkeypatch.setattr(forwarder, "MARKS_S", 0.0)

    def shown(kind: Kind, payload: object) -> None:
        seen.append(kind)
        if kind is Kind.PATH_DRAINED:
            road_ends.set()

    move.on_told = told
    with LineCutter(tmp_path / "near", move.far, None, True, None, shown):
        move.run()
        _judge(move)
        assert move.told[-1] == "completed"
        assert move.logged[-1], "to end the log takes a CPU that the guest has use for"
        size = 64 * 4096
        assert move.there.memory.view(0, size) == move.here.memory.view(0, size)
        assert road_ends.wait(30)  # it may be on its way yet
        move.close()
    assert (seen.index(Kind.STARTED) < seen.index(Kind.PATH_DRAINED)) is late
    assert move.failed == []


def test_a_guest_that_is_still_arriving_does_not_move_yet(tmp_path: Path) -> None:
    looks: list[bool] = []

    def arriving() -> bool:
        looks.append(not move.source.report.rounds)
        return len(looks) < 3

    move = Move(tmp_path)
    move.arriving = arriving
    move.run()
    _judge(move)
    move.close()
    assert looks == [True] * 3
    assert move.told[-1] == "completed"


def test_a_guest_that_is_still_arriving_may_stay(tmp_path: Path) -> None:
    def arriving() -> bool:
        return move.source.cancel()

    move = Move(tmp_path)
    move.arriving = arriving
    move.run()
    _judge(move)
    move.close()
    assert move.told[-1] == "cancelled"
