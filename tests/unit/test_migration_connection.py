"""The connection between two hosts: addresses, messages, deadlines, and whether it is direct."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.errors import ConfigError, LinkLost, PeerRefused, StreamError
from godwit.migration.times import Times
from godwit.migration.wire import messages
from godwit.migration.wire.address import Address
from godwit.migration.wire.messages import Kind, Reason
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec import saved


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[SocketConnection, SocketConnection]]:
    if request.param == "unix":
        a, b = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            a = socket.create_connection(listener.getsockname())
            b, _ = listener.accept()
    near, far = SocketConnection(a), SocketConnection(b)
    yield near, far
    near.close()
    far.close()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "give unix:PATH"),
        ("unix:", "give unix:PATH"),
        ("tcp:host", "give unix:PATH"),
        ("tcp::1", "give unix:PATH"),
        ("tcp:host:0", "give unix:PATH"),
        ("tcp:host:65536", "give unix:PATH"),
        ("tcp:host:http", "give unix:PATH"),
        ("http:host:80", "give unix:PATH"),
        ("tcp:192.0.2.1:4444", "--insecure"),
        ("tcp:[2001:db8::1]:4444", "--insecure"),
        ("tcp:example:4444", "--insecure"),
    ],
)
def test_addresses_that_are_refused(uri: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Address(uri, insecure=False)


@pytest.mark.parametrize(
    ("uri", "insecure"),
    [
        ("tcp:127.0.0.1:4444", False),
        ("tcp:localhost:4444", False),
        ("tcp:[::1]:4444", False),
        ("tcp:192.0.2.1:4444", True),
        ("unix:/run/x", False),
    ],
)
def test_addresses_that_are_taken(uri: str, insecure: bool) -> None:
    assert Address(uri, insecure).uri == uri


def test_a_unix_address_is_for_its_owner_and_a_dead_socket_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "m"
    address = Address(f"unix:{path}", False)
    with pytest.raises(LinkLost, match="cannot reach"):
        address.connect()
    listener = address.listen()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="listens"):
        address.listen()
    listener.close()
    with pytest.raises(LinkLost) as refused:
        address.connect()
    assert isinstance(refused.value.__cause__, ConnectionRefusedError)
    address.listen().close()


def test_messages_arrive_whole_and_counted(ends: tuple[SocketConnection, SocketConnection]) -> None:
    near, far = ends
    near.send(Kind.FAILED, Reason("because"))
    near.send_parts([messages.header(Kind.RAM, 6), memoryview(b"abc"), b"", b"def"])
    with pytest.raises(PeerRefused, match="because"):
        far.expect(Kind.READY)
    assert far.receive() == (Kind.RAM, 6)
    first, second = bytearray(2), bytearray(4)
    far.read_into([memoryview(first), memoryview(second)])
    assert (bytes(first), bytes(second)) == (b"ab", b"cdef")
    assert near.sent == 8 + len(saved.encode(Reason("because"))) + 8 + 6


def test_another_message_or_a_payload_where_none_is_due(
    ends: tuple[SocketConnection, SocketConnection],
) -> None:
    near, far = ends
    near.send(Kind.ROUND)
    with pytest.raises(StreamError, match="ROUND where READY was due"):
        far.expect(Kind.READY)
    near.send_parts([messages.message(Kind.READY, b"x")])
    with pytest.raises(StreamError, match="payload"):
        far.expect(Kind.READY)


def test_a_silent_peer_and_a_gone_one(ends: tuple[SocketConnection, SocketConnection]) -> None:
    near, far = ends
    near.set_silence(0.01)
    near.begin()
    with pytest.raises(LinkLost, match="silent"):
        near.read(1)
    near.begin()
    far.interrupt()
    with pytest.raises(LinkLost, match="closed"):
        near.read(1)


def test_a_connection_that_both_ends_see_alike_is_direct(
    ends: tuple[SocketConnection, SocketConnection],
) -> None:
    near, far = ends
    assert near.is_direct(far.describe(False))


def test_a_connection_with_something_between_is_not(
    ends: tuple[SocketConnection, SocketConnection],
) -> None:
    near, far = ends
    seen = far.describe(False)
    other = messages.Welcome(os.getpid() + 1, seen.near, seen.far and f"{seen.far}1")
    assert not near.is_direct(other)


def test_a_message_has_a_deadline_in_all_and_not_for_each_byte() -> None:
    """A peer that sends a byte now and then must not hold a stopped guest."""
    ours, theirs = socket.socketpair()
    connection = SocketConnection(ours, Times(silence=0.3, rate=1e9))
    over = threading.Event()

    def trickle() -> None:
        for byte in messages.message(Kind.FAILED, saved.encode(messages.Reason("x" * 1000))):
            if over.wait(0.01):
                return
            theirs.send(bytes((byte,)))

    peer = threading.Thread(target=trickle)
    peer.start()
    try:
        with pytest.raises(LinkLost, match="took too long for a message"):
            connection.expect(Kind.READY)
    finally:
        over.set()
        peer.join()
        connection.close()
        theirs.close()


def test_a_long_message_gets_the_time_of_its_length() -> None:
    ours, theirs = socket.socketpair()
    connection = SocketConnection(ours, Times(now=lambda: 100.0, silence=10.0, rate=1000.0))
    connection.begin(5000)
    assert connection._receive_until == 115.0
    connection.close()
    theirs.close()


def test_bytes_and_other_descriptors_are_waited_for_together(
    ends: tuple[SocketConnection, SocketConnection],
) -> None:
    near, far = ends
    reader, writer = os.pipe()
    try:
        assert near.wait(0.0, [reader]) == (False, set())
        os.write(writer, b"x")
        assert near.wait(60.0, [reader]) == (False, {reader})
        far.send(Kind.ROUND)
        assert near.wait(60.0) == (True, set())
        assert near.wait(60.0, [reader]) == (True, {reader})
    finally:
        os.close(reader)
        os.close(writer)


def test_nothing_follows_half_a_message() -> None:
    """The peer would take it for the rest: FAILED is not sent after a message that broke off."""
    ours, theirs = socket.socketpair()
    connection = SocketConnection(ours, Times(silence=0.05, rate=1e9))
    with pytest.raises(LinkLost):
        connection.send_parts([bytes(64 << 20)])
    sent = connection.sent
    with pytest.raises(LinkLost, match="in the middle of a message"):
        connection.send(Kind.READY)
    assert connection.sent == sent
    connection.close()
    theirs.close()
