"""rtnetlink's messages: written by hand as the kernel does, and at random.

What needs no rights is asked of the real kernel; tests/vm/test_ports.py has bridges.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.host.net import rtnetlink
from godwit.host.net.rtnetlink import Forwarding, Link, LinkEvents

MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("5254000000aa")
NEWLINK, GETLINK, NEWNEIGH, ERROR, DONE = 16, 18, 28, 2, 3


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def neighbour(mac: bytes, vlan: int | None, port: int, *, family: int = 7, flags: int = 0) -> bytes:
    body = struct.pack("=BBHiHBB", family, 0, 0, port, 2, flags, 0) + attribute(2, mac)
    if vlan is not None:
        body += attribute(5, struct.pack("=H", vlan))
    return message(NEWNEIGH, body + attribute(3, bytes(16)))  # NDA_CACHEINFO


def interface(*attributes: bytes, flags: int = 0x11043, index: int = 5) -> bytes:
    return message(NEWLINK, struct.pack("=BBHiII", 0, 0, 1, index, flags, 0) + b"".join(attributes))


class Kernel:
    """Stands in for the socket: answers each request with these datagrams, then with silence."""

    def __init__(self, *datagrams: bytes) -> None:
        self.datagrams = list(datagrams)
        self.requests: list[bytes] = []

    def __call__(self, *_: object) -> Kernel:
        return self

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    def sendto(self, data: bytes, to: object) -> None:
        self.requests.append(data)

    def recv(self, size: int) -> bytes:
        if not self.datagrams:
            raise TimeoutError("timed out")
        return self.datagrams.pop(0)


def kernel(monkeypatch: pytest.MonkeyPatch, *datagrams: bytes) -> Kernel:
    fake = Kernel(*datagrams)
    monkeypatch.setattr(socket, "socket", fake)
    return fake


# --- the real kernel ------------------------------------------------------------------------------
def test_the_loopback_is_known_and_others_are_not() -> None:
    lo = rtnetlink.link("lo")
    assert lo is not None
    assert (lo.number, lo.name, lo.master, lo.port_state) == (1, "lo", 0, None)
    assert rtnetlink.link("godwit-no-such") is None


def test_a_name_that_cannot_be_is_an_error() -> None:
    with pytest.raises(OSError):
        rtnetlink.link("x" * 40)


def test_a_dump_that_the_kernel_refuses_is_an_error() -> None:
    with pytest.raises(OSError, match="No such device"):
        rtnetlink.forwarding(0x7FFFFFF0)


def test_a_message_of_a_link_is_a_change_and_is_reported_once() -> None:
    with closing(LinkEvents()) as events:
        assert events.sock.getsockname()[1] == 1  # RTMGRP_LINK: what changes is sent here
        # Another process may change links, but not for ever.
        while events.changed():
            pass
        # To change a link takes rights. To ask for one takes none, and the kernel has answered with
        # the same message by the time the question is sent.
        body = struct.pack("=BBHiII", 0, 0, 0, 1, 0, 0)
        events.sock.sendto(struct.pack("=IHHII", 16 + len(body), GETLINK, 1, 1, 0) + body, (0, 0))
        assert events.changed()
        while events.changed():
            pass


# --- links ----------------------------------------------------------------------------------------
def port_of(kind: bytes, state: int | None) -> bytes:
    data = b"" if state is None else attribute(1, bytes((state,)))
    # NLA_F_NESTED is set by some kernels and not by others.
    return attribute(18 | 0x8000, attribute(4, kind + b"\0") + attribute(5 | 0x8000, data))


@pytest.mark.parametrize(
    ("answer", "link"),
    [
        (interface(attribute(3, b"tap0\0")), Link(5, "tap0", True, 0, None)),
        (interface(attribute(3, b"tap0\0"), flags=0x1003), Link(5, "tap0", False, 0, None)),
        (
            interface(attribute(3, b"tap0\0"), attribute(10, b"\3\0\0\0"), port_of(b"bridge", 2)),
            Link(5, "tap0", True, 3, 2),
        ),
        (
            interface(attribute(10, b"\3\0\0\0"), port_of(b"bond", 2)),
            Link(5, "", True, 3, None),
        ),
        (interface(port_of(b"bridge", None)), Link(5, "", True, 0, None)),
        (interface(attribute(18, attribute(1, b"tun\0"))), Link(5, "", True, 0, None)),
    ],
    ids=["plain", "no carrier", "bridge", "bond", "bridge without state", "no port"],
)
def test_a_link(monkeypatch: pytest.MonkeyPatch, answer: bytes, link: Link) -> None:
    fake = kernel(monkeypatch, answer)
    assert rtnetlink.link("tap0") == link
    (request,) = fake.requests
    length, kind, flags = struct.unpack_from("=IHH", request)
    assert (length, kind, flags) == (len(request), 18, 1)
    assert request[16 + 16 :] == attribute(3, b"tap0\0")


def test_no_such_link_and_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, message(ERROR, struct.pack("=i", -errno.ENODEV) + bytes(16)))
    assert rtnetlink.link("tap0") is None
    kernel(monkeypatch, message(ERROR, struct.pack("=i", -errno.EPERM) + bytes(16)))
    with pytest.raises(PermissionError):
        rtnetlink.link("tap0")
    kernel(monkeypatch)
    with pytest.raises(TimeoutError):
        rtnetlink.link("tap0")


# --- the forwarding database ----------------------------------------------------------------------
def test_a_dump_of_several_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = kernel(
        monkeypatch,
        neighbour(MAC, 100, 5) + neighbour(MAC, 1, 5) + neighbour(OTHER, None, 4),
        neighbour(b"\1\2\3\4\5\6", 1, 5, flags=2)  # NTF_SELF: the card's own
        + neighbour(MAC[:4], 1, 5)  # an IPv4 tunnel's
        + neighbour(MAC, 7, 5, family=2)
        + message(99, bytes(40))
        + message(NEWNEIGH, bytes(8)),
        neighbour(OTHER, 4094, 6, flags=0x10) + message(DONE, bytes(4)),
    )
    assert rtnetlink.forwarding(3) == [
        Forwarding(MAC, 100, 5),
        Forwarding(MAC, 1, 5),
        Forwarding(OTHER, 0, 4),
        Forwarding(OTHER, 4094, 6),
    ]
    (request,) = fake.requests
    length, kind, flags = struct.unpack_from("=IHH", request)
    assert (length, kind, flags) == (len(request), 30, 0x301)
    assert request[16] == 7  # AF_BRIDGE
    assert request[16 + 16 :] == attribute(10, struct.pack("=I", 3))


def test_a_dump_may_end_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, neighbour(MAC, 1, 5), message(DONE, struct.pack("=i", -errno.ENODEV)))
    with pytest.raises(OSError, match="No such device"):
        rtnetlink.forwarding(3)
    kernel(monkeypatch, message(ERROR, struct.pack("=i", -errno.EBUSY) + bytes(16)))
    with pytest.raises(OSError, match="busy"):
        rtnetlink.forwarding(3)
    kernel(monkeypatch, neighbour(MAC, 1, 5))  # and then nothing
    with pytest.raises(TimeoutError):
        rtnetlink.forwarding(3)


# --- garbage --------------------------------------------------------------------------------------
words = st.integers(0, 40).map(lambda n: struct.pack("=H", n)) | st.binary(max_size=12)
bodies = st.lists(words, max_size=30).map(b"".join)
headed = st.tuples(
    st.integers(0, 80) | st.integers(0, 0xFFFFFFFF),
    st.sampled_from([NEWLINK, NEWNEIGH, ERROR, DONE, 0]),
    bodies,
).map(lambda one: struct.pack("=IHHII", one[0], one[1], 0, 0, 0) + one[2])
whole = st.tuples(st.sampled_from([NEWLINK, NEWNEIGH, ERROR, DONE]), bodies).map(
    lambda one: message(*one)
)
datagrams = st.lists(st.lists(headed | whole | bodies, max_size=4).map(b"".join), max_size=4)


@given(datagrams)
def test_whatever_comes_it_ends_and_raises_nothing_but_oserror(found: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for ask in (lambda: rtnetlink.link("tap0"), lambda: rtnetlink.forwarding(3)):
            kernel(monkeypatch, *found)
            try:
                ask()
            except OSError:
                pass


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 4))
def test_any_error_number_is_an_oserror_or_none(number: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        kernel(monkeypatch, message(ERROR, struct.pack("=i", number)[:size]))
        raised = 0
        try:
            assert rtnetlink.link("tap0") is None
        except OSError as error:
            raised = error.errno or -1
        assert 0 <= raised < 4096


# --- events ---------------------------------------------------------------------------------------
class Sock:
    def __init__(self, *what: Any) -> None:
        self.what = [*what, BlockingIOError()]

    def recv(self, size: int) -> bytes:
        one = self.what.pop(0)
        if isinstance(one, BaseException):
            raise one
        assert isinstance(one, bytes)
        return one


def changed(*what: Any) -> bool:
    events = LinkEvents()
    events.close()
    events.sock = Sock(*what)  # type: ignore[assignment]
    return events.changed()


def test_all_events_that_wait_are_one_change() -> None:
    assert not changed()
    assert changed(b"x", b"y")
    # Too many at once: some are lost, so all has to be asked anew.
    assert changed(OSError(errno.ENOBUFS, "No buffer space available"))
    with pytest.raises(OSError, match="broken"):
        changed(OSError(errno.EBADF, "broken"))
