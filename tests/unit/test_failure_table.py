"""Every phase of a migration x every fault: exactly one side runs, and all is given back.

Both ends are real, with machine, threads and sockets; KVM and the taps are fakes. What a real guest
and its peers notice is for tests/vm (test_failing_moves, test_lost_line, test_handover).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import pytest

from godwit.errors import HostError, LinkLost, MigrationError
from godwit.migration.packets.destination import PacketDestination
from godwit.migration.source import Source
from godwit.migration.times import Times
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from migration_bench import IMPATIENT, Migration, S
from tests.fakes.connection_cutter import ConnectionCutter

#: The message at which the fault strikes: each step of the conversation.
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
def _nothing_left() -> Iterator[None]:
    """Descriptors and threads are what they were."""
    before = _held()
    yield
    for thread in threading.enumerate():
        if thread.name in ("migration", "incoming", "prefault"):
            thread.join(10)
    assert _held() == before


def _held() -> tuple[int, set[str]]:
    ours = {
        t.name for t in threading.enumerate() if t.name in ("migration", "incoming", "prefault")
    }
    return len(os.listdir("/proc/self/fd")), ours


def _judge(migration: Migration) -> None:
    """Exactly one side runs, and both report what is so."""
    here, there = migration.running
    completed = migration.here.statuses[-1] == "completed"
    assert here is not completed, migration.source.report
    assert there is (
        completed and not migration.dead
    )  # whoever is killed after that takes it along
    assert migration.here.states.current is (S.POSTMIGRATE if completed else S.RUNNING)
    assert not migration.here.logging
    if migration.here.statuses[-1] == "failed":
        assert migration.source.report.error


def _run(
    folder: Path, kind: Kind, delivered: bool, fault: str, times: Times = IMPATIENT
) -> Migration:
    near = folder / "near"
    migration = Migration(folder, near, times)

    def strike() -> None:
        if fault == "killed":
            migration.kill()
        elif fault == "cancelled":
            migration.source.cancel()

    before = strike if fault == "killed" else None
    cut = None if fault == "cancelled" else kind

    def shown(seen: Kind, payload: object) -> None:
        if fault == "cancelled" and seen is kind:
            strike()

    with ConnectionCutter(near, migration.far, cut, delivered, before, shown, fault == "stopped"):
        try:
            migration.run()
            _judge(migration)
        finally:
            migration.close()
    return migration


@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_the_line_breaks(tmp_path: Path, kind: Kind, delivered: bool) -> None:
    migration = _run(tmp_path, kind, delivered, "cut")
    # Once the source has given the guest up it asks, and the destination has it or takes it. With
    # READY both may be: the commit is under way, or not.
    if kind is not Kind.READY:
        assert (migration.here.statuses[-1] == "completed") == (kind in HANDED_OVER)


@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_the_destination_is_killed(tmp_path: Path, kind: Kind, delivered: bool) -> None:
    migration = _run(tmp_path, kind, delivered, "killed")
    # Its own kernel refuses for it: the guest is not there. What was heard counts.
    heard = kind is Kind.ACK or (kind is Kind.STARTED and delivered)
    assert (migration.here.statuses[-1] == "completed") == heard


@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_the_destination_stops_answering(tmp_path: Path, kind: Kind) -> None:
    migration = _run(tmp_path, kind, False, "stopped")
    assert (migration.here.statuses[-1] == "completed") == (kind in HANDED_OVER)


@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.name)
def test_it_is_cancelled(tmp_path: Path, kind: Kind) -> None:
    migration = _run(tmp_path, kind, True, "cancelled")
    if kind in HANDED_OVER:
        assert migration.here.statuses[-1] == "completed"
    else:
        assert migration.here.statuses[-1] in (
            "cancelled",
            "completed",
        )  # the commit may have been on its way


def test_the_guest_goes_on_before_its_destination_is_notified(tmp_path: Path) -> None:
    """A peer that does not read must not hold the guest."""
    migration = Migration(tmp_path)
    running: list[bool] = []
    send = SocketConnection.send

    def note(connection: SocketConnection, kind: Kind, value: msgspec.Struct | None = None) -> None:
        if kind is Kind.FAILED:
            running.append(migration.here.machine.running)
        send(connection, kind, value)

    try:
        with (
            mock.patch.object(SocketConnection, "send", note),
            mock.patch.object(Source, "_commit", side_effect=MigrationError("not now")),
        ):
            migration.run()
    finally:
        migration.close()
    assert running == [True]
    assert migration.here.statuses[-1] == "failed"


def test_a_guest_whose_packets_are_lost_on_the_way_back_goes_on(tmp_path: Path) -> None:
    migration = Migration(tmp_path)
    try:
        with (
            mock.patch.object(Source, "_commit", side_effect=MigrationError("not now")),
            mock.patch.object(Source, "_before_return", side_effect=HostError("no tap")),
        ):
            migration.run()
        assert migration.here.statuses[-1] == "failed"
        assert "on the guest's way back: no tap" in str(migration.source.report.error)
        assert migration.running == (True, False), "it goes on without its packets"
        assert migration.here.states.current is S.RUNNING
    finally:
        migration.close()


def test_a_guest_that_cannot_be_resumed_is_left_to_the_operators_cont(tmp_path: Path) -> None:
    migration = Migration(tmp_path)
    machine = migration.here.machine
    try:
        with (
            mock.patch.object(Source, "_commit", side_effect=MigrationError("not now")),
            mock.patch.object(machine, "resume", side_effect=HostError("no vhost")),
        ):
            migration.run()
        assert migration.here.statuses[-1] == "failed"
        assert migration.here.states.current is S.PAUSED
    finally:
        migration.close()


def test_a_destination_that_has_the_guest_answers_whatever_goes_wrong(tmp_path: Path) -> None:
    """STARTED is lost, and then a bug strikes at the destination: it must not refuse the QUERY."""
    migration = Migration(tmp_path)
    reported: list[str] = []
    lost = mock.patch.object(PacketDestination, "send", side_effect=LinkLost("gone"))
    bug = mock.patch.object(PacketDestination, "listen", side_effect=ValueError("a bug"))
    hook = mock.patch.object(threading, "excepthook", lambda args: reported.append(str(args)))
    try:
        with lost, bug, hook:
            migration.run()
            assert migration.here.statuses[-1] == "completed"
            assert migration.running == (False, True)
            migration.there.migrations.close()
        assert "a bug" in reported[0]
    finally:
        migration.close()


def test_an_error_nobody_expected_after_the_commit_is_resolved(tmp_path: Path) -> None:
    migration = Migration(tmp_path)
    try:
        with mock.patch.object(Source, "_await_started", side_effect=ValueError("a bug")):
            migration.run()
        assert migration.here.statuses[-1] == "completed"
        assert migration.running == (False, True)
    finally:
        migration.close()


def test_a_query_is_answered_on_the_connection_where_it_came(tmp_path: Path) -> None:
    """COMMIT is lost: nobody waits for what the old connection cannot bring."""
    patient = IMPATIENT._replace(silence=120.0)
    migration = _run(tmp_path, Kind.COMMIT, False, "cut", patient)
    assert migration.here.statuses[-1] == "completed"


def test_a_connection_that_is_only_silent_is_left_by_both(tmp_path: Path) -> None:
    """STARTED is lost, and nobody hangs up: the destination has to receive the query."""
    migration = _run(tmp_path, Kind.STARTED, False, "stopped")
    assert migration.here.statuses[-1] == "completed"


def test_the_state_is_bad(tmp_path: Path) -> None:
    migration = Migration(tmp_path)
    migration.there.refuse_states()
    migration.run()
    _judge(migration)
    assert migration.here.statuses[-1] == "failed"
    assert "not as they should be" in (migration.source.report.error or "")
    migration.there.wait_failed()
    migration.close()
    assert "not as they should be" in str(migration.there.failures[0])


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
def test_nothing_fails(tmp_path: Path, late: bool) -> None:
    """Late: the old path is drained when its guest runs already, and its source is to quit."""
    times: Any = SimpleNamespace(**IMPATIENT._asdict())
    if late:
        times.settle, times.marker, times.old_path = 0.0, 60.0, 60.0
    migration = Migration(tmp_path, tmp_path / "near", times)
    seen: list[Kind] = []
    drained = threading.Event()

    def on_status(status: str) -> None:
        if late and status == "completed":
            migration.source.abandon()
            times.marker = 0.0

    def shown(kind: Kind, payload: object) -> None:
        seen.append(kind)
        if kind is Kind.PATH_DRAINED:
            drained.set()

    migration.here.on_status = on_status
    with ConnectionCutter(tmp_path / "near", migration.far, None, True, None, shown):
        migration.run()
        _judge(migration)
        assert migration.here.statuses[-1] == "completed"
        assert migration.here.logged[-1], "to end the log takes a CPU that the guest has use for"
        size = 64 * 4096
        assert migration.there.machine.memory.view(0, size) == migration.here.machine.memory.view(
            0, size
        )
        assert drained.wait(30)  # it may be on its way yet
        migration.close()
    assert (seen.index(Kind.STARTED) < seen.index(Kind.PATH_DRAINED)) is late
    assert migration.there.failures == []


def test_a_guest_that_is_still_arriving_does_not_move_yet(tmp_path: Path) -> None:
    looks: list[bool] = []

    def arriving() -> bool:
        looks.append(not migration.source.report.rounds)
        return len(looks) < 3

    migration = Migration(tmp_path)
    migration.await_packets_while(arriving)
    migration.run()
    _judge(migration)
    migration.close()
    assert looks == [True] * 3
    assert migration.here.statuses[-1] == "completed"


def test_a_guest_that_is_still_arriving_may_stay(tmp_path: Path) -> None:
    def arriving() -> bool:
        return migration.source.cancel()

    migration = Migration(tmp_path)
    migration.await_packets_while(arriving)
    migration.run()
    _judge(migration)
    migration.close()
    assert migration.here.statuses[-1] == "cancelled"
