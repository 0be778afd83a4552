"""Strangers at a destination's door, and the secret that tells them from the source."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from godwit.errors import GodwitError, LinkLost
from godwit.host.net import sockets
from godwit.migration.source import Source
from godwit.migration.times import Times
from godwit.migration.wire import acceptor as acceptor_module
from godwit.migration.wire import address, messages
from godwit.migration.wire.acceptor import Acceptor
from godwit.migration.wire.address import Address
from godwit.migration.wire.compatibility import describe
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec import saved
from migration_bench import IMPATIENT, Migration
from tests.fakes.connection_cutter import ConnectionCutter


def _stranger(path: Path, data: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.sendall(data)
    return sock


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    return number


HALF = messages.header(Kind.HELLO, 65_536) + b"half a message"


def test_half_a_hello_does_not_keep_the_source_out(tmp_path: Path) -> None:
    migration = Migration(tmp_path, times=IMPATIENT._replace(introduction=3600.0))
    migration.there.migrations.await_guest(f"unix:{migration.far}", False)
    strangers = [_stranger(migration.far, HALF) for _ in range(3)]
    migration.here.migrations.migrate(f"unix:{migration.far}", False)
    migration.finish()
    assert migration.running == (False, True)
    for sock in strangers:
        sock.close()
    migration.close()


def test_half_a_query_does_not_keep_the_source_from_its_answer(tmp_path: Path) -> None:
    """Nobody ran: a stranger was waited for while the source asked what became of its guest."""
    near = tmp_path / "near"
    migration = Migration(tmp_path, near, IMPATIENT._replace(introduction=3600.0))
    strangers: list[socket.socket] = []

    def act(status: str) -> None:
        if status == "active":
            data = messages.header(Kind.QUERY, 40) + b"\0"
            strangers.extend(_stranger(migration.far, data) for _ in range(3))

    migration.here.on_status = act
    with ConnectionCutter(near, migration.far, Kind.COMMIT, False):
        migration.run()
    assert migration.running == (False, True)
    assert migration.here.statuses[-1] == "completed"
    for sock in strangers:
        sock.close()
    migration.close()


def test_a_hello_and_no_more_leaves_the_destination_waiting(tmp_path: Path) -> None:
    """REFUSED has all that a HELLO needs, and the second connection ended the VM."""
    migration = Migration(tmp_path)
    migration.there.migrations.await_guest(f"unix:{migration.far}", False)
    connection = Address(f"unix:{migration.far}", False).connect()
    connection.send(Kind.HELLO, describe(migration.there.machine, bytes(16)))
    connection.expect_struct(Kind.WELCOME, messages.Welcome)
    connection.close()
    migration.here.migrations.migrate(f"unix:{migration.far}", False)
    migration.finish()
    assert migration.running == (False, True)
    assert not migration.there.failures
    migration.close()


@pytest.fixture
def acceptor(tmp_path: Path) -> Iterator[Acceptor]:
    times = Times(introduction=0.05)
    refused: list[GodwitError] = []
    acceptor = Acceptor(
        Address(f"unix:{tmp_path / 'far'}", False), times, lambda _, error: refused.append(error)
    )
    acceptor.refused = refused  # type: ignore[attr-defined]
    yield acceptor
    acceptor.close()


def test_newcomers_that_take_too_long_are_closed(tmp_path: Path, acceptor: Acceptor) -> None:
    with _stranger(tmp_path / "far", HALF) as stranger:
        stranger.settimeout(30)
        assert acceptor.next(0.01) is None
        assert acceptor.next(0.1) is None
        assert stranger.recv(100) == b""


def test_of_too_many_newcomers_one_is_closed_from_where_most_come(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood from one host: the source's, from another, waits for its turn to speak."""
    monkeypatch.setattr(acceptor_module, "MAX_NEWCOMERS", 8)
    uri = f"tcp:127.0.0.1:{port}"
    acceptor = Acceptor(Address(uri, True), Times(introduction=3600.0), lambda *_: None)
    source = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.7", 0))
    assert acceptor.next(0.01) is None
    flood = []
    for _ in range(100):
        flood.append(socket.create_connection(("127.0.0.1", port)))
        assert acceptor.next(0.01) is None
        assert len(acceptor._newcomers) <= 8
    source.sendall(messages.message(Kind.QUERY, saved.encode(messages.Commit(bytes(16), True))))
    introduced = acceptor.next(30)
    assert introduced is not None
    assert introduced[1] is Kind.QUERY
    introduced[0].close()
    acceptor.close()
    for sock in (source, *flood):
        sock.close()


def test_a_hello_and_a_reset_leave_the_destination_waiting(port: int, tmp_path: Path) -> None:
    migration = Migration(tmp_path, times=IMPATIENT._replace(silence=30.0))
    uri = f"tcp:127.0.0.1:{port}"
    migration.there.migrations.await_guest(uri, True)
    hello = saved.encode(describe(migration.there.machine, bytes(16)))
    for _ in range(20):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(messages.message(Kind.HELLO, hello))
        sock.close()
    migration.here.migrations.migrate(uri, True)
    migration.finish()
    assert migration.running == (False, True)
    assert not migration.there.failures
    migration.close()


def test_a_hello_and_silence_do_not_keep_the_source_out(port: int, tmp_path: Path) -> None:
    migration = Migration(tmp_path, times=IMPATIENT._replace(begin=0.05, silence=30.0))
    uri = f"tcp:127.0.0.1:{port}"
    migration.there.migrations.await_guest(uri, True)
    hello = saved.encode(describe(migration.there.machine, bytes(16)))
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    for sock in strangers:
        sock.sendall(messages.message(Kind.HELLO, hello))
    migration.here.migrations.migrate(uri, True)
    migration.finish()
    assert migration.running == (False, True)
    for sock in strangers:
        sock.close()
    migration.close()


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many"), LookupError("ascii")])
def test_a_query_that_is_turned_away_proves_nothing(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Both ran: the acceptor refused before anybody looked at the token."""
    migration = Migration(tmp_path)
    real, trouble = sockets.owner_of_peer, iter([True] * 3)
    committed = threading.Event()

    def flaky(sock: socket.socket, listener: bool) -> int | None:
        here = sock.getsockname()[1] == port
        if committed.is_set() and here and next(trouble, False):
            raise error
        return real(sock, listener)

    def lost(source: Source) -> messages.Started:
        committed.set()
        raise LinkLost("the connection broke")

    monkeypatch.setattr(sockets, "owner_of_peer", flaky)
    monkeypatch.setattr(Source, "_await_started", lost)
    uri = f"tcp:127.0.0.1:{port}"
    migration.there.migrations.await_guest(uri, False)
    migration.here.migrations.migrate(uri, False)
    migration.finish()
    assert next(trouble, False) is False  # all of it came
    assert migration.running == (False, True)
    assert migration.here.statuses[-1] == "completed"
    migration.close()


@pytest.mark.parametrize("secret", [None, b"0123456789abcdef"])
def test_a_cancel_does_not_wait_for_a_silent_listener(
    port: int, tmp_path: Path, secret: bytes | None
) -> None:
    migration = Migration(tmp_path, times=Times(silence=3600.0))
    migration.here.migrations._credentials = address.Credentials(secret=secret)
    with socket.create_server(("127.0.0.1", port)) as listener:
        migration.here.migrations.migrate(f"tcp:127.0.0.1:{port}", True)
        accepted, _ = listener.accept()
        assert migration.source.cancel()
        migration.source.join(30)
        assert not migration.source.active
        accepted.close()
    assert migration.here.statuses[-1] == "cancelled"
    migration.close()


def test_a_full_queue_is_given_up_as_well(tmp_path: Path) -> None:
    path = tmp_path / "full"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        first = socket.socket(socket.AF_UNIX)
        first.connect(str(path))
        asked = threading.Event()

        def given_up() -> bool:
            was = asked.is_set()
            asked.set()
            return was

        with pytest.raises(LinkLost):
            Address(f"unix:{path}", False, Times(silence=3600.0)).connect(given_up=given_up)
        first.close()


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", bytes(8), messages.message(Kind.RAM), b"\xff" * 100]
)
def test_strangers_with_something_else_are_turned_away(
    tmp_path: Path, acceptor: Acceptor, data: bytes
) -> None:
    with _stranger(tmp_path / "far", data) as stranger:
        stranger.settimeout(30)
        assert acceptor.next(0.2) is None
        with suppress(ConnectionResetError):  # what is not read of theirs
            assert stranger.recv(4096) == b""
    assert len(acceptor.refused) == 1


@pytest.mark.parametrize("uri", ["unix:{}/far", "tcp:127.0.0.1:{port}"])
def test_processes_of_other_users_are_turned_away(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    there = Address(uri.format(tmp_path, port=port), False)
    listener = there.listen()
    monkeypatch.setattr(address.os, "geteuid", lambda: 4242)
    monkeypatch.setattr(SocketConnection, "peer_uid", lambda connection, listener: 1000)
    with pytest.raises(GodwitError, match="runs as user 1000, this one as user 4242"):
        there.connect()
    listener.close()


NEAR, FAR = ("127.0.0.1", 40_000), ("127.0.0.1", 4444)
_NEAR, _FAR = "0100007F:9C40", "0100007F:115C"


class Ends:
    """A connected socket, by its two addresses."""

    family = socket.AF_INET

    def getsockname(self) -> tuple[str, int]:
        return NEAR

    def getpeername(self) -> tuple[str, int]:
        return FAR


@pytest.mark.parametrize(
    ("rows", "listener", "known"),
    [
        ([(_FAR, _NEAR, "01", 1000, "5")], False, 1000),
        ([(_FAR, _NEAR, "01", 0, "0")], False, None),  # not accepted, or closed
        ([(_FAR, _NEAR, "01", 0, "0"), (_FAR, "0", "0A", 1000, "7")], True, 1000),
        # Who listens here is no answer to who has connected.
        ([(_FAR, "0", "0A", 1000, "7")], False, None),
        # The exact address counts before all of them, and another address for nothing.
        ([("00000000:115C", "0", "0A", 7, "8"), (_FAR, "0", "0A", 1000, "7")], True, 1000),
        ([("00000000:115C", "0", "0A", 7, "8")], True, 7),
        ([("0500007F:115C", "0", "0A", 7, "8")], True, None),
        ([("0100007F:115D", "0", "0A", 7, "8")], True, None),
        ([(_FAR, "0", "0A", 1000, "7"), (_FAR, "0", "0A", 7, "9")], True, None),
        ([], True, None),
    ],
)
def test_the_user_at_the_other_end_is_the_one_that_the_kernel_names(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[str, str, str, int, str]],
    listener: bool,
    known: int | None,
) -> None:
    monkeypatch.setattr(sockets, "_lines", lambda name: iter(rows if name == "tcp" else []))
    assert sockets.owner_of_peer(Ends(), listener) == known  # type: ignore[arg-type]


def test_the_user_of_a_local_tcp_peer_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = SocketConnection(socket.create_connection(listener.getsockname()))
        far = SocketConnection(listener.accept()[0])
        assert near.peer_uid(True) == far.peer_uid(False) == os.geteuid()
        far.close()
        near.close()


# --- secrets --------------------------------------------------------------------------------------
SECRET = b"0123456789abcdef" * 2


def _pair(
    tmp_path: Path, here: bytes | None, there: bytes | None
) -> tuple[Acceptor, Callable[[], SocketConnection]]:
    uri = f"unix:{tmp_path / 'far'}"
    times = Times(silence=2.0, introduction=0.2)
    acceptor = Acceptor(
        Address(uri, False, times, address.Credentials(secret=there)), times, lambda *_: None
    )
    return acceptor, Address(uri, False, times, address.Credentials(secret=here)).connect


def _talk(tmp_path: Path, here: bytes | None, there: bytes | None) -> Kind | None:
    acceptor, connect = _pair(tmp_path, here, there)
    errors: list[GodwitError] = []

    def source() -> None:
        try:
            connection = connect()
            connection.send(Kind.QUERY, messages.Commit(bytes(16), True))
            connection.expect(Kind.ACK)
        except GodwitError as error:
            errors.append(error)

    thread = threading.Thread(target=source)
    thread.start()
    introduced = acceptor.next(1.0)
    if introduced is not None:
        introduced[0].close()
    thread.join()
    acceptor.close()
    assert errors
    return introduced[1] if introduced is not None else None


def test_ends_with_one_secret_talk(tmp_path: Path) -> None:
    assert _talk(tmp_path, SECRET, SECRET) is Kind.QUERY


@pytest.mark.parametrize("here", [None, b"another secret, quite another"])
def test_a_source_without_the_secret_is_turned_away(tmp_path: Path, here: bytes | None) -> None:
    assert _talk(tmp_path, here, SECRET) is None


def test_a_destination_without_the_secret_gets_nothing(tmp_path: Path) -> None:
    assert _talk(tmp_path, SECRET, None) is None


def test_a_secret_stands_for_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SocketConnection, "peer_uid", lambda connection, listener: 4242)
    assert _talk(tmp_path, SECRET, SECRET) is Kind.QUERY
