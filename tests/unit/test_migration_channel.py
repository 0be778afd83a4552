"""The line between two hosts: addresses, frames, silence, and whether it is a direct one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.errors import ConfigError, LinkLost, PeerRefused, StreamError
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind, Text
from godwit.migration.wire.sockets import Address, SocketConnection
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
        ("", "please"),
        ("unix:", "please"),
        ("tcp:host", "please"),
        ("tcp::1", "please"),
        ("tcp:host:0", "please"),
        ("tcp:host:65536", "please"),
        ("tcp:host:http", "please"),
        ("http:host:80", "please"),
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


def test_frames_arrive_whole_and_counted(ends: tuple[SocketConnection, SocketConnection]) -> None:
    near, far = ends
    near.send(Kind.FAILED, Text("because"))
    near.send_parts([messages.header(Kind.RAM, 6), memoryview(b"abc"), b"", b"def"])
    with pytest.raises(PeerRefused, match="because"):
        far.expect(Kind.READY)
    assert far.receive() == (Kind.RAM, 6)
    first, second = bytearray(2), bytearray(4)
    far.read_into([memoryview(first), memoryview(second)])
    assert (bytes(first), bytes(second)) == (b"ab", b"cdef")
    assert near.sent == 8 + len(saved.encode(Text("because"))) + 8 + 6


def test_another_frame_or_a_payload_where_none_is_due(
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
    with pytest.raises(LinkLost, match="silent"):
        near.read(1)
    far.interrupt()
    with pytest.raises(LinkLost, match="closed"):
        near.read(1)


def test_a_line_that_both_ends_see_alike_is_direct(
    ends: tuple[SocketConnection, SocketConnection],
) -> None:
    near, far = ends
    assert near.is_direct(far.as_seen())


def test_a_line_with_something_between_is_not(
    ends: tuple[SocketConnection, SocketConnection],
) -> None:
    near, far = ends
    seen = far.as_seen()
    other = messages.Welcome(os.getpid() + 1, seen.near, seen.far and f"{seen.far}1")
    assert not near.is_direct(other)
