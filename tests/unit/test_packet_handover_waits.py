"""How long a handover waits: for markers, for the old host, and for neither too long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest

from godwit.host.net.ethernet import BROADCAST
from godwit.migration.packets.destination import Hold
from godwit.migration.packets.source import OldPath
from godwit.migration.times import Times
from godwit.migration.wire.sockets import SocketConnection
from packet_handover_bench import (
    OTHER,
    PATIENT,
    Handover,
    finish,
    next_message,
    switch_over,
    taps,
    to,
)
from tests.fakes.clock import FakeClock


@pytest.fixture
def impatient(request: pytest.FixtureRequest) -> Iterator[Handover]:
    """Both hosts of a migration, with the times of the test's parameter."""
    handover = Handover(times=PATIENT._replace(**request.param))
    yield handover
    handover.close()


@pytest.mark.parametrize(
    ("impatient", "seen"),
    [({"marker": 0.0}, False), ({"quiet": 0.0}, True)],
    indirect=["impatient"],
)
def test_a_marker_that_does_not_come_is_waited_for_only_so_long(
    impatient: Handover, seen: bool
) -> None:
    handover = impatient
    switch_over(handover)
    next_message(handover)
    handover.sender.switched([2])  # on a network that nobody carries
    if seen:
        handover.flood()
    handover.sender.serve(time.monotonic())
    handover.receiver.settle()
    assert handover.target.nics[0].rx_backlog.held is False
    assert handover.sender.info()["markers-seen"] == int(seen)


def test_only_frames_to_the_guest_show_a_marker_that_is_late(handover: Handover) -> None:
    source, _ = taps(handover)
    source.put(to(BROADCAST, 1))
    switch_over(handover)
    next_message(handover)
    handover.sender.serve(time.monotonic())
    assert "last-packet" not in handover.sender.info()["old-paths"][0]
    source.put(to(handover.source.nics[0].mac, 2))
    handover.sender.serve(time.monotonic())
    assert "last-packet" in handover.sender.info()["old-paths"][0]


def test_a_marker_that_is_late_ends_the_old_path_and_nothing_is_late() -> None:
    clock = FakeClock(100.0)
    times = Times(now=clock.now, silence=60.0, hold=60.0, hold_longest=60.0, settle=60.0)
    handover = Handover(times=times)
    try:
        _late_marker(handover, clock)
    finally:
        handover.close()


def _late_marker(handover: Handover, clock: FakeClock) -> None:
    guest, source, target = handover.source.nics[0].mac, *taps(handover)
    switch_over(handover)
    next_message(handover)
    target.put(to(guest, 4))
    for number, passes in enumerate((0.2, 0.2, 0.07), 1):
        clock.advance(passes)
        source.put(to(guest, number))
        handover.sender.serve(clock.now())
    clock.advance(0.01)
    handover.flood()
    handover.sender.serve(clock.now())
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(guest, number) for number in (1, 2, 3, 4)]
    assert handover.sender.info()["late"] == 0
    assert handover.sender.info()["old-paths"] == [
        {"last-packet": 470.0, "first-marker": 480.0, "last-marker": 480.0, "drained": 480.0}
    ]


class Counting(SocketConnection):
    """Counts how often something is waited for."""

    waits = 0

    def wait(self, timeout: float, others: Iterable[int] = ()) -> tuple[bool, set[int]]:
        self.waits += 1
        return super().wait(timeout, others)


def test_an_old_path_that_is_over_keeps_nobody_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packet_handover_bench.SocketConnection", Counting)
    both = Handover(nics=2, times=PATIENT._replace(late=0.0))
    try:
        switch_over(both)
        next_message(both)
        both.flood(0)
        assert not both.sender.serve(time.monotonic())
        assert isinstance(both.near, Counting)
        both.near.waits = 0
        assert not both.sender.serve(time.monotonic() + 0.1)
        assert 0 < both.near.waits < 10
    finally:
        both.close()


def test_a_second_switchover_begins_nothing_anew(handover: Handover) -> None:
    switch_over(handover)
    next_message(handover)
    handover.sender.switched([])
    assert handover.sender.info()["markers-sent"] == 1


def test_a_nic_of_which_no_count_is_given_waits_for_none() -> None:
    both = Handover(nics=2)
    try:
        both.receiver.switch_over(lambda phase: None)
        both.sender.switched([1])
        both.sender.serve(time.monotonic())
        first, second = both.sender.info()["old-paths"]
        assert "drained" not in first
        assert "drained" in second
    finally:
        both.close()


@pytest.mark.parametrize(
    ("markers", "last_frame", "due"),
    [
        ((), 0.0, 10.25),  # none came: the network may carry none
        ((), 9.0, 10.25),
        ((), 10.2, 10.45),  # frames on the old path still come: they are late
        ((), 11.99, 12.0),  # within reason
        ((9.9,), 0.0, 10.05),  # one came before the source acknowledged of the switch_over
        ((10.1,), 0.0, 10.15),
        ((10.1, 10.12), 0.0, 10.17),
        ((10.1, 10.12), 10.16, 10.21),
        ((11.9,), 11.99, 12.0),
        ((10.4,), 10.64, 10.65),  # the other one's network is not waited for beyond that
        ((10.4, 10.41, 10.42), 10.64, 10.0),  # all are here
    ],
)
def test_until_when_a_marker_is_waited_for(
    handover: Handover, markers: tuple[float, ...], last_frame: float, due: float
) -> None:
    path = OldPath(0, cast(Any, handover.source.nics[0]), frozenset(), Times())
    assert path.due(10.0) is None  # the destination has not sent how many
    path.expected = 3
    assert path.due(None) is None
    for number, at in enumerate(markers):
        path.note_marker(number, b"", at)
    path.last_packet = last_frame
    assert path.due(10.0) == pytest.approx(due)


def test_the_tap_waits_longer_while_the_old_hosts_packets_come() -> None:
    clock = FakeClock(99.0)
    hold = Hold(Times(now=clock.now, hold=1.0, hold_longest=3.0))
    hold.received()  # before the switchover they mean nothing
    clock.advance(101.0)
    assert not hold.over
    hold.begin()
    began = clock.now()
    for passes, over in ((0.9, False), (0.0, False), (0.9, False), (0.9, False)):
        clock.advance(passes)
        assert hold.over is over
        hold.received()
    clock.advance(began + 3.0 - clock.now() - 0.01)
    assert not hold.over
    clock.advance(0.01)
    assert hold.over


def test_the_tap_waits_only_so_long_for_the_first_packet() -> None:
    clock = FakeClock(100.0)
    hold = Hold(Times(now=clock.now, hold=1.0, hold_longest=3.0))
    hold.begin()
    clock.advance(0.9)
    assert not hold.over
    clock.advance(0.1)
    assert hold.over


@pytest.mark.parametrize("impatient", [{"hold": 0.0}], indirect=True)
def test_a_source_that_sends_nothing_is_waited_for_only_so_long(impatient: Handover) -> None:
    _, target = taps(impatient)
    switch_over(impatient)
    target.put(to(OTHER, 1))
    impatient.receiver.settle()
    assert impatient.target.nics[0].given() == [to(OTHER, 1)]


@pytest.mark.parametrize("impatient", [{"settle": 0.0}], indirect=True)
def test_what_is_there_is_taken_however_long_the_start_took(impatient: Handover) -> None:
    handover = impatient
    guest, (source, target) = handover.source.nics[0].mac, taps(handover)
    source.put(to(guest, 1))
    switch_over(handover)
    next_message(handover)
    target.put(to(guest, 2))
    finish(handover)
    assert handover.receiver.holding
    assert handover.receiver.settle()
    assert not handover.receiver.holding
    assert handover.target.nics[0].given() == [to(guest, 1), to(guest, 2)]


def test_frames_are_expected_from_the_switchover_to_the_end_of_the_old_path(
    handover: Handover,
) -> None:
    assert not handover.sender.expecting, "nobody knows when, or whether, the guest starts"
    switch_over(handover)
    next_message(handover)
    assert handover.sender.expecting
    finish(handover)
    assert not handover.sender.expecting


@pytest.mark.parametrize("impatient", [{"settle": 0.0}], indirect=True)
def test_the_announcement_waits_only_so_long_and_the_tap_waits_on(impatient: Handover) -> None:
    handover = impatient
    guest, (source, target) = handover.source.nics[0].mac, taps(handover)
    switch_over(handover)
    target.put(to(guest, 2))
    assert not handover.receiver.settle()
    assert handover.target.nics[0].given() == []
    next_message(handover)
    source.put(to(guest, 1))
    finish(handover)
    handover.near.close()
    handover.receiver.listen()
    assert handover.target.nics[0].given() == [to(guest, 1), to(guest, 2)]
