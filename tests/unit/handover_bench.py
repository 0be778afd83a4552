"""Both ends of a handover over a pair of sockets; taps that are socket pairs, NICs that note."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import cast

import pytest

from announce_bench import Nic as Announced
from godwit.announce.uplink import Uplink
from godwit.host.net.tap import HEADER
from godwit.hw.nic.rx_backlog import Ahead
from godwit.machine.machine import Machine
from godwit.migration.packets import destination as arrival_module
from godwit.migration.packets import source as forwarder_module
from godwit.migration.packets.destination import Arrival
from godwit.migration.packets.source import Forwarder
from godwit.migration.wire import messages as codec
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import Channel
from tests.fakes.clock import FakeClock
from tests.fakes.tap import FakeTap

MARK = bytes(range(16))
OTHER = bytes.fromhex("020000000099")
MINUTE = 60.0


class Nic(Announced):
    """A NIC whose guest gets whatever may be given to it, at once."""

    def __init__(self, name: str) -> None:
        super().__init__(FakeClock(), name)
        self.tap = FakeTap()
        self.tap_fd = self.tap.fd
        self.ahead = Ahead(self.tap)
        self.drained = 0

    def take(self, limit: int) -> list[bytes]:
        return self.ahead.take(limit)

    def hold(self) -> None:
        self.ahead.hold()

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        return self.ahead.put(frames)

    def release(self) -> int:
        return self.ahead.release()

    def drain(self) -> int:
        self.drained += 1
        return self.ahead.drain()

    def given(self) -> list[bytes]:
        """What its guest would get now, without the tap's header."""
        frames = []
        while (frame := self.ahead.next()) is not None:
            frames.append(frame[HEADER:])
        return frames


class Side:
    """A host: its NICs, and what the handover asks of a machine."""

    def __init__(self, count: int) -> None:
        self.nics = [Nic(f"nic{number}") for number in range(count)]
        self.uplinks = [Uplink(nic, FakeClock()) for nic in self.nics]
        self.machine = cast(Machine, SimpleNamespace(nics=self.nics, uplinks=self.uplinks))


class Handover:
    """Both hosts, at the moment of the commit."""

    def __init__(self, nics: int = 1) -> None:
        near, far = socket.socketpair()
        self.source, self.target = Side(nics), Side(nics)
        self.near, self.far = Channel(near), Channel(far)
        self.forwarder = Forwarder(self.source.machine, self.near, MARK)
        self.arrival = Arrival(self.target.machine, self.far, MARK)
        self.arrival.prepare()

    def flood(self, number: int = 0) -> None:
        """What the target's NIC has sent reaches the source's tap, as broadcasts do."""
        sent = self.target.nics[number].sent
        for _, frame in sent:
            self.source.nics[number].tap.put(frame)
        sent.clear()

    def close(self) -> None:
        for side in (self.source, self.target):
            for nic in side.nics:
                nic.tap.close()
        self.near.close()
        self.far.close()


def to(mac: bytes, number: int, tags: bytes = b"") -> bytes:
    """A frame from a peer."""
    return mac + OTHER + tags + b"\x08\0" + number.to_bytes(2, "big") + bytes(44)


def set_no_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test waits for ends a wait; a test of a time-out sets it to nothing."""
    for name in ("MARKS_S", "LONGEST_S", "QUIET_S", "PATIENCE_S", "LATE_S"):
        monkeypatch.setattr(forwarder_module, name, MINUTE)
    for name in ("HOLD_S", "LONGEST_S", "SETTLE_S"):
        monkeypatch.setattr(arrival_module, name, MINUTE)


def until() -> float:
    return time.monotonic() + MINUTE


def word(handover: Handover) -> Kind:
    """Wait for the destination's next word, forwarding meanwhile."""
    assert handover.forwarder.serve(until())
    kind, payload = handover.near.expect_one(Kind.DRAWN, Kind.STARTED)
    if kind is Kind.DRAWN:
        handover.forwarder.drawn(codec.decode(payload, codec.Drawn).marks)
    return kind


def draw(handover: Handover) -> None:
    handover.arrival.draw(lambda phase: None)


def finish(handover: Handover, number: int = 0) -> None:
    """The marks come back, and the road ends."""
    handover.flood(number)
    handover.forwarder.serve(time.monotonic())  # takes what is there
    handover.far.send(Kind.STARTED, codec.Started({}, []))
    assert handover.forwarder.serve(until())
    handover.near.expect_struct(Kind.STARTED, codec.Started)


def taps(handover: Handover) -> tuple[FakeTap, FakeTap]:
    """The source's and the destination's."""
    return handover.source.nics[0].tap, handover.target.nics[0].tap
