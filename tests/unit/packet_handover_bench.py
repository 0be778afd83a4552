"""Both ends of a handover over a pair of sockets; taps that are socket pairs, NICs that note."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace
from typing import cast

from announce_bench import Nic as Announced
from godwit.announce.uplink import Uplink
from godwit.host.net.tap import HEADER
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.machine.machine import Machine
from godwit.migration.guest import Guest
from godwit.migration.packets.destination import PacketDestination
from godwit.migration.packets.source import PacketSource
from godwit.migration.times import Times
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec import saved
from tests.fakes.clock import FakeClock
from tests.fakes.tap import FakeTap

COOKIE = bytes(range(16))
OTHER = bytes.fromhex("020000000099")
MINUTE = 60.0
#: Only what a test waits for ends a wait; a test of a time-out replaces one of them.
PATIENT = Times(
    marker=MINUTE,
    old_path=MINUTE,
    quiet=MINUTE,
    start=MINUTE,
    late=MINUTE,
    hold=MINUTE,
    hold_longest=MINUTE,
    settle=MINUTE,
)


class Backlog(RxBacklog):
    """Counts how often the tap was drained."""

    drained = 0

    def drain(self) -> int:
        self.drained += 1
        return super().drain()


class Nic(Announced):
    """A NIC whose guest gets whatever may be given to it, at once."""

    def __init__(self, name: str) -> None:
        super().__init__(FakeClock(), name)
        self.fake_tap = FakeTap()
        self.tap, self.tap_fd = "tap0", self.fake_tap.fd
        self.rx_backlog: Backlog = Backlog(self.fake_tap, threading.RLock())

    def given(self) -> list[bytes]:
        """What its guest would get now, without the tap's header."""
        frames = []
        while (frame := self.rx_backlog.next()) is not None:
            frames.append(frame[HEADER:])
        return frames


class Side:
    """A host: its NICs, and what the handover asks of a machine."""

    def __init__(self, count: int) -> None:
        self.nics = [Nic(f"nic{number}") for number in range(count)]
        self.uplinks = [Uplink(nic, FakeClock()) for nic in self.nics]
        machine = cast(Machine, SimpleNamespace(nics=self.nics))
        self.guest = Guest(machine, self.uplinks, FakeClock().now)


class Handover:
    """Both hosts, at the moment of the commit."""

    def __init__(self, nics: int = 1, times: Times = PATIENT) -> None:
        near, far = socket.socketpair()
        self.source, self.target = Side(nics), Side(nics)
        self.near, self.far = SocketConnection(near), SocketConnection(far)
        self.sender = PacketSource(self.source.guest, self.near, COOKIE, times)
        self.receiver = PacketDestination(self.target.guest, self.far, COOKIE, times)
        self.receiver.prepare()

    def flood(self, number: int = 0) -> None:
        """What the target's NIC has sent reaches the source's tap, as broadcasts do."""
        sent = self.target.nics[number].sent
        for _, frame in sent:
            self.source.nics[number].fake_tap.put(frame)
        sent.clear()

    def close(self) -> None:
        for side in (self.source, self.target):
            for nic in side.nics:
                nic.fake_tap.close()
        self.near.close()
        self.far.close()


def to(mac: bytes, number: int, tags: bytes = b"") -> bytes:
    """A frame from a peer."""
    return mac + OTHER + tags + b"\x08\0" + number.to_bytes(2, "big") + bytes(44)


def until() -> float:
    return time.monotonic() + MINUTE


def next_message(handover: Handover) -> Kind:
    """Wait for the destination's next message, sending packets meanwhile."""
    assert handover.sender.serve(until())
    kind, payload = handover.near.expect_one(Kind.SWITCHED, Kind.STARTED)
    if kind is Kind.SWITCHED:
        handover.sender.switched(saved.decode(payload, messages.Switched).markers)
    return kind


def switch_over(handover: Handover) -> None:
    handover.receiver.switch_over(lambda phase: None)


def finish(handover: Handover, number: int = 0) -> None:
    """The markers come back, and the old path is drained."""
    handover.flood(number)
    handover.sender.serve(time.monotonic())  # takes what is there
    handover.far.send(Kind.STARTED, messages.Started({}, []))
    assert handover.sender.serve(until())
    handover.near.expect_struct(Kind.STARTED, messages.Started)


def taps(handover: Handover) -> tuple[FakeTap, FakeTap]:
    """The source's and the destination's."""
    return handover.source.nics[0].fake_tap, handover.target.nics[0].fake_tap
