"""The tap's watch: how much it reads, and what it does when the interface is gone.

Its socket is one end of a pair here; tests/vm/test_tap_watch.py has a real tap.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from godwit.errors import HostError
from godwit.host.net import packet
from godwit.host.net import tap_watch as watch
from godwit.host.net.tap_watch import INTERVAL_S, MAX_FRAMES, TapWatch
from tests.fakes.clock import FakeClock


class HandLoop(FakeClock):
    """A loop whose descriptors are served by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        self.watched[fd] = readable

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def serve(self) -> None:
        """Call for each that is watched, once."""
        for readable in list(self.watched.values()):
            readable()


class Ends:
    """Opens pairs of sockets; :attr:`far` is the tap's side of the last."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.error: OSError | None = None
        self.far: socket.socket
        self._all: list[socket.socket] = []

    def __call__(self, tap: str, network: bool) -> socket.socket:
        self.asked.append((tap, network))
        if self.error is not None:
            raise self.error
        near, self.far = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        )
        self._all += [near, self.far]
        return near

    def close(self) -> None:
        for one in self._all:
            one.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def make(ends: Ends, **more: object) -> tuple[TapWatch, HandLoop, list[bytes], list[OSError]]:
    loop = HandLoop()
    frames: list[bytes] = []
    errors: list[OSError] = []

    def on_frame(frame: bytes, outer: object) -> None:
        frames.append(frame)

    return (
        TapWatch("tap0", on_frame, loop, errors.append, opener=ends, **more),  # type: ignore
        loop,
        frames,
        errors,
    )


def test_frames_are_handed_on(ends: Ends) -> None:
    tap, loop, frames, _ = make(ends)
    ends.far.send(b"one")
    ends.far.send(b"two")
    loop.serve()
    assert frames == [b"one", b"two"]
    loop.serve()
    tap.close()
    tap.close()
    assert tap.closed
    assert (loop.watched, loop.pending) == ({}, [])


def test_a_flood_is_read_some_frames_an_interval(ends: Ends) -> None:
    tap, loop, frames, _ = make(ends)
    for number in range(2 * MAX_FRAMES + 10):
        ends.far.send(b"%d" % number)
    for interval in (1, 2):
        loop.serve()
        loop.serve()
        assert len(frames) == interval * MAX_FRAMES
        assert loop.watched == {}
        loop.advance(INTERVAL_S)
    loop.serve()
    assert len(frames) == 2 * MAX_FRAMES + 10
    assert len(loop.watched) == 1
    tap.close()


def test_a_steady_flood_is_limited_too(ends: Ends) -> None:
    tap, loop, frames, _ = make(ends)
    for _ in range(4):
        for _ in range(100):
            with suppress(BlockingIOError):  # full: the kernel drops what comes to a packet socket
                ends.far.send(b"x")
            loop.serve()  # wakes up for each
            loop.advance(INTERVAL_S / 100)
    assert len(frames) == 4 * MAX_FRAMES
    tap.close()


def test_a_slow_guest_is_never_put_off(ends: Ends) -> None:
    tap, loop, frames, _ = make(ends)
    for _ in range(10 * MAX_FRAMES):
        ends.far.send(b"x")
        loop.serve()
        loop.advance(INTERVAL_S / MAX_FRAMES * 1.1)
    assert len(frames) == 10 * MAX_FRAMES
    assert loop.pending == []
    tap.close()


def test_a_listener_that_fails_does_not_stop_the_watch(ends: Ends) -> None:
    loop, calls = HandLoop(), []

    def on_frame(frame: bytes, outer: object) -> None:
        calls.append(frame)
        raise RuntimeError

    tap = TapWatch("tap0", on_frame, loop, opener=ends)
    for _ in range(MAX_FRAMES + 1):
        ends.far.send(b"x")
    for _ in range(MAX_FRAMES):
        with pytest.raises(RuntimeError):
            loop.serve()
    loop.serve()
    assert (len(calls), loop.watched) == (MAX_FRAMES, {})
    loop.advance(INTERVAL_S)
    with pytest.raises(RuntimeError):
        loop.serve()
    tap.close()


def test_a_listener_may_close_the_watch(ends: Ends) -> None:
    loop, calls = HandLoop(), []

    def on_frame(frame: bytes, outer: object) -> None:
        calls.append(frame)
        tap.close()

    tap = TapWatch("tap0", on_frame, loop, opener=ends)
    for _ in range(3):
        ends.far.send(b"x")
    loop.serve()
    assert (len(calls), loop.watched, loop.pending) == (1, {}, [])


def test_closed_while_it_pauses(ends: Ends) -> None:
    tap, loop, _, _ = make(ends)
    for _ in range(MAX_FRAMES):
        ends.far.send(b"x")
    loop.serve()
    assert len(loop.pending) == 1
    tap.close()
    loop.advance(1)
    assert loop.watched == {}


class Broken(socket.socket):
    """Fails once, as a packet socket does whose interface went down."""

    errors: list[int]
    name = "tap0"

    def recvmsg(self, *_: object) -> object:  # type: ignore[override]
        if self.errors:
            raise OSError(self.errors.pop(0), "no more")
        raise BlockingIOError

    def getsockname(self) -> tuple[str]:
        return (self.name,)


def broken(*errors: int, name: str = "tap0") -> Broken:
    sock = Broken(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.errors, sock.name = list(errors), name
    return sock


def test_an_interface_that_is_gone_ends_the_watch_and_it_is_said_once(ends: Ends) -> None:
    sock = broken(errno.ENETDOWN, name="")
    loop, errors = HandLoop(), []
    tap = TapWatch("tap0", print, loop, errors.append, opener=lambda *_: sock)
    loop.serve()
    loop.serve()
    assert [error.errno for error in errors] == [errno.ENETDOWN]
    assert (tap.closed, loop.watched, loop.pending, sock.fileno()) == (True, {}, [], -1)
    with pytest.raises(OSError, match="'tap0' is not watched"):
        tap.inject(b"x")


def test_an_interface_that_is_down_is_waited_for() -> None:
    sock = broken(errno.ENETDOWN)
    loop, errors = HandLoop(), []
    tap = TapWatch("tap0", print, loop, errors.append, opener=lambda *_: sock)
    loop.serve()
    assert (errors, tap.closed, len(loop.watched)) == ([], False, 1)
    tap.close()


def test_an_error_that_does_not_go_away_does_not_hold_the_loop() -> None:
    sock = broken(*[errno.ENETDOWN] * 10_000)
    loop = HandLoop()
    tap = TapWatch("tap0", print, loop, opener=lambda *_: sock)
    loop.serve()
    assert len(sock.errors) == 10_000 - MAX_FRAMES
    assert loop.watched == {}
    tap.close()


def test_another_error_ends_it() -> None:
    loop, errors = HandLoop(), []
    tap = TapWatch("tap0", print, loop, errors.append, opener=lambda *_: broken(errno.ENOMEM))
    loop.serve()
    assert ([error.errno for error in errors], tap.closed) == ([errno.ENOMEM], True)


def test_it_can_be_opened_again(ends: Ends) -> None:
    tap, loop, frames, _ = make(ends, network=True)
    tap.close()
    tap.reopen()
    ends.far.send(b"x")
    loop.serve()
    assert frames == [b"x"]
    assert ends.asked == [("tap0", True)] * 2
    tap.reopen()  # without having been closed
    assert len(loop.watched) == 1
    tap.close()


def test_a_frame_is_sent_to_the_guest(ends: Ends) -> None:
    tap, _, _, _ = make(ends)
    tap.inject(b"frame")
    assert ends.far.recv(100) == b"frame"
    assert tap.dropped == 0
    tap.close()
    assert tap.dropped == 0


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENODEV, "cannot watch tap 'tap0': there is no such interface"),
        (errno.EPERM, "not permitted; run as root or with CAP_NET_RAW"),
        (errno.ENOBUFS, "No buffer space"),
    ],
)
def test_why_it_cannot_watch_is_said(ends: Ends, number: int, message: str) -> None:
    ends.error = OSError(number, "No buffer space")
    with pytest.raises(HostError, match=message):
        make(ends)


@pytest.mark.parametrize(
    ("status", "tci", "tpid", "outer"),
    [
        (0, 0, 0, None),
        (1, 100, 0x8100, None),
        (packet.STATUS_VLAN_VALID, 100, 0, (0x8100, 100)),
        (packet.STATUS_VLAN_VALID | packet.STATUS_VLAN_TPID_VALID, 0xF00A, 0x88A8, (0x88A8, 10)),
        (packet.STATUS_VLAN_VALID | packet.STATUS_VLAN_TPID_VALID, 0xE000, 0x8100, (0x8100, 0)),
    ],
)
def test_the_tag_that_the_kernel_took_off(
    status: int, tci: int, tpid: int, outer: tuple[int, int] | None
) -> None:
    data = packet.AUXDATA.pack(status, 60, 60, 0, 14, tci, tpid)
    assert watch._outer([(1, 2, b""), (packet.SOL_PACKET, packet.PACKET_AUXDATA, data)]) == outer
    assert watch._outer([]) is None
