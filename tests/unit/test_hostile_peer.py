"""Peers that are slow on purpose, and errors that nobody foresaw."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from godwit.errors import GodwitError
from godwit.migration import outgoing
from godwit.migration.packets.destination import PacketDestination
from godwit.migration.ram import dirty_log
from godwit.migration.source import Source
from godwit.migration.times import Times
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec import saved
from godwit.spec.parameters import ConvergenceParameters, MigrationParameters
from migration_bench import Migration, S

#: The stop ends soon; a message may take long.
STOP = Times(stop=0.2, silence=5.0, last_message=0.02, last_messages=0.05, hurry=0.05)


class Peer:
    """A destination of ours, honest until the guest has stopped: then ``misbehave`` is called."""

    def __init__(self, path: Path, misbehave: Callable[[SocketConnection, threading.Event], None]):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._misbehave = misbehave
        self.stopped, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Peer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._listener.close()
        self._thread.join(10)

    def _main(self) -> None:
        connection = SocketConnection(self._listener.accept()[0])
        with suppress(GodwitError, OSError):
            connection.expect_struct(Kind.HELLO, messages.Hello)
            connection.send(Kind.WELCOME, connection.describe(False))
            while True:
                kind, length = connection.receive()
                if kind is Kind.STATE:
                    break
                connection.read(length)
            self.stopped.set()
            self._misbehave(connection, self._over)
        connection.close()


def _reads_slowly(connection: SocketConnection, over: threading.Event) -> None:
    while not over.wait(0.05):
        connection._sock.recv(4096)


def _trickles_ready(connection: SocketConnection, over: threading.Event) -> None:
    threading.Thread(target=_swallow, args=(connection,), daemon=True).start()
    connection._sock.send(messages.header(Kind.READY, 60_000))
    while not over.wait(0.02):
        connection._sock.send(b"x")


def _swallow(connection: SocketConnection) -> None:
    with suppress(OSError):
        while connection._sock.recv(1 << 20):
            pass


def _trickles_last_messages(connection: SocketConnection, over: threading.Event) -> None:
    connection._sock.send(messages.header(Kind.RAM, 8_000_000))
    while not over.wait(0.02):
        connection._sock.send(b"x")


@pytest.fixture
def much_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is left for the stop than the connection's buffers hold."""
    monkeypatch.setattr(dirty_log.DirtyLog, "take", lambda log: [(8 << 20, 4096)])


def _hold(
    tmp_path: Path,
    misbehave: Callable[[SocketConnection, threading.Event], None],
    act: Callable[[Migration], None],
    times: Times = STOP,
) -> Migration:
    migration = Migration(tmp_path, times=times)
    migration.here.migrations.parameters = MigrationParameters(
        downtime_limit=1000,
        handover=False,
        convergence=ConvergenceParameters(on_no_convergence="stop-and-copy"),
    )
    memory = migration.here.machine.memory
    memory.view(8 << 20, 16 << 20)[::4096] = b"\1" * 4096
    with Peer(migration.far, misbehave) as peer:
        migration.here.migrations.migrate(f"unix:{migration.far}", False)
        assert peer.stopped.wait(30)
        act(migration)
        migration.source.join(30)
        assert not migration.source.active
    assert migration.here.machine.running
    assert migration.here.states.current is S.RUNNING
    return migration


@pytest.mark.parametrize("misbehave", [_reads_slowly, _trickles_ready, _trickles_last_messages])
@pytest.mark.usefixtures("much_dirty")
def test_a_slow_peer_gives_the_guest_back_when_the_stop_is_over(
    tmp_path: Path,
    misbehave: Callable[[SocketConnection, threading.Event], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing.Outgoing, "_longest_stop", lambda migration: 0.3)
    migration = _hold(tmp_path, misbehave, lambda _: None)
    assert migration.here.statuses[-1] == "failed"
    assert "the whole of the stop" in str(migration.source.report.error)
    migration.close()


@pytest.mark.parametrize("misbehave", [_reads_slowly, _trickles_ready])
@pytest.mark.usefixtures("much_dirty")
def test_a_cancel_ends_what_a_slow_peer_holds_up(
    tmp_path: Path, misbehave: Callable[[SocketConnection, threading.Event], None]
) -> None:
    patient = STOP._replace(stop=3600.0, silence=3600.0)

    def cancel(migration: Migration) -> None:
        assert migration.source.cancel()

    migration = _hold(tmp_path, misbehave, cancel, patient)
    assert migration.here.statuses[-1] == "cancelled"
    migration.close()


def test_the_stop_has_a_budget_by_what_it_was_allowed_or_expected_to_take(tmp_path: Path) -> None:
    migration = Migration(tmp_path)
    migration.run()
    source = migration.source
    source._parameters = lambda: MigrationParameters(downtime_limit=300)
    source._times = Times()
    source.report.expected_ms = 20.0
    assert source._longest_stop() == 13.0
    source.report.expected_ms = 60_000.0  # on-no-convergence=stop-and-copy
    assert source._longest_stop() == 610.0
    migration.close()


# --- after the start ------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [OverflowError, KeyError, MemoryError, GodwitError])
def test_an_error_after_the_start_does_not_end_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Both sides ran: the destination's thread ended, and the source found nobody."""

    def step(handover: PacketDestination) -> None:
        raise error("int too big to convert")

    monkeypatch.setattr(PacketDestination, "_handle", step)
    migration = Migration(tmp_path)
    nic = migration.here.machine.nics[0]
    resume = migration.there.machine.resume

    def resumed(*given: object) -> None:
        resume(*given)  # type: ignore[arg-type]
        migration.here.host.taps["tap0"].put(nic.mac + bytes(60))

    migration.there.machine.resume = resumed  # type: ignore[method-assign]
    migration.run()
    assert migration.running == (False, True)
    assert migration.here.statuses[-1] == "completed"
    assert not migration.there.failures
    migration.close()


def test_an_error_while_the_guest_starts_leaves_it_to_the_source(tmp_path: Path) -> None:
    migration = Migration(tmp_path)

    def resume(*_: object) -> None:
        raise KeyError("unforeseen")

    migration.there.machine.resume = resume  # type: ignore[method-assign]
    migration.run()
    assert migration.running == (True, False)
    migration.close()


@pytest.mark.parametrize("message", [Kind.STARTED, Kind.ACK])
def test_an_unforeseen_error_behind_the_commit_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Kind
) -> None:
    names = {Kind.STARTED: "_await_started", Kind.ACK: "_started"}

    def fail(*_: object) -> None:
        raise IndexError("of no bytes")

    monkeypatch.setattr(Source, names[message], fail)
    migration = Migration(tmp_path)
    migration.run()
    assert migration.running == (False, True)
    assert migration.here.statuses[-1] == "completed"
    migration.close()


def test_nonsense_in_started_is_an_arrival_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = saved.encode

    def lies(value: object) -> bytes:
        if isinstance(value, messages.Started):
            return encode({"phases": {"loaded": float("nan")}, "runstates": ["x" * 9999]})
        return encode(value)  # type: ignore[arg-type]

    monkeypatch.setattr(saved, "encode", lies)
    migration = Migration(tmp_path)
    migration.run()
    assert migration.running == (False, True)
    assert migration.here.statuses[-1] == "completed"
    assert migration.source.report.destination_phases == {}
    migration.close()
