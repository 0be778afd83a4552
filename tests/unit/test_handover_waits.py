"""How long a handover waits: for marks, for the old host, and for neither too long."""

from __future__ import annotations

import select
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from godwit.host.net.ethernet import BROADCAST
from godwit.migration.packets import destination as arrival_module
from godwit.migration.packets import source as forwarder_module
from godwit.migration.packets.destination import Hold
from godwit.migration.packets.source import Road
from handover_bench import OTHER, Handover, switch_over, finish, taps, to, next_message


@pytest.mark.parametrize("seen", [False, True])
def test_a_mark_that_does_not_come_is_waited_for_only_so_long(
    handover: Handover, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    monkeypatch.setattr(forwarder_module, "QUIET_S" if seen else "MARKS_S", 0.0)
    switch_over(handover)
    next_message(handover)
    handover.sender.switched([2])  # on a network that nobody carries
    if seen:
        handover.flood()
    handover.sender.serve(time.monotonic())
    handover.receiver.settle()
    assert handover.target.nics[0].rx_backlog.held is False
    assert handover.sender.info()["marks-seen"] == int(seen)


def test_only_frames_to_the_guest_tell_of_a_mark_that_is_late(handover: Handover) -> None:
    source, _ = taps(handover)
    source.put(to(BROADCAST, 1))
    switch_over(handover)
    next_message(handover)
    handover.sender.serve(time.monotonic())
    assert "last-frame" not in handover.sender.info()["roads"][0]
    source.put(to(handover.source.nics[0].mac, 2))
    handover.sender.serve(time.monotonic())
    assert "last-frame" in handover.sender.info()["roads"][0]


def test_a_mark_that_is_late_ends_the_road_and_nothing_is_late(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(forwarder_module, "time", SimpleNamespace(monotonic=lambda: now))
    for name, seconds in (("MARKS_S", 0.25), ("LONGEST_S", 2.0), ("QUIET_S", 0.05)):
        monkeypatch.setattr(forwarder_module, name, seconds)
    guest, source, target = handover.source.nics[0].mac, *taps(handover)
    switch_over(handover)
    next_message(handover)
    target.put(to(guest, 4))
    for number, at in enumerate((100.2, 100.4, 100.47), 1):
        now = at
        source.put(to(guest, number))
        handover.sender.serve(now)
    now = 100.48
    handover.flood()
    handover.sender.serve(now)
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(guest, number) for number in (1, 2, 3, 4)]
    assert handover.sender.info()["late"] == 0
    assert handover.sender.info()["roads"] == [
        {"last-frame": 470.0, "first-mark": 480.0, "last-mark": 480.0, "end": 480.0}
    ]


class Polls:
    """Counts how often it is asked."""

    def __init__(self, poll: select.poll) -> None:
        self._poll, self.count = poll, 0

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.count += 1
        return self._poll.poll(timeout)


def test_a_road_that_is_over_keeps_nobody_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder_module, "LATE_S", 0.0)
    both = Handover(nics=2)
    try:
        both.receiver.switch_over(lambda phase: None)
        next_message(both)
        both.flood(0)
        assert not both.sender.serve(time.monotonic())
        polls = Polls(both.sender._poll)
        monkeypatch.setattr(both.forwarder, "_poll", polls)
        assert not both.sender.serve(time.monotonic() + 0.1)
        assert polls.count < 10
    finally:
        both.close()


def test_a_second_draw_begins_nothing_anew(handover: Handover) -> None:
    switch_over(handover)
    next_message(handover)
    handover.sender.switched([])
    assert handover.sender.info()["marks-sent"] == 1


def test_a_nic_of_which_no_count_is_given_waits_for_none() -> None:
    both = Handover(nics=2)
    try:
        both.receiver.switch_over(lambda phase: None)
        both.sender.switched([1])
        both.sender.serve(time.monotonic())
        first, second = both.sender.info()["roads"]
        assert "end" not in first
        assert "end" in second
    finally:
        both.close()


@pytest.mark.parametrize(
    ("marks", "last_frame", "due"),
    [
        ((), 0.0, 10.25),  # none came: the network may carry none
        ((), 9.0, 10.25),
        ((), 10.2, 10.45),  # frames on the old road still come: they are late
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
def test_until_when_a_mark_is_waited_for(
    handover: Handover,
    monkeypatch: pytest.MonkeyPatch,
    marks: tuple[float, ...],
    last_frame: float,
    due: float,
) -> None:
    for name, seconds in (("MARKS_S", 0.25), ("LONGEST_S", 2.0), ("QUIET_S", 0.05)):
        monkeypatch.setattr(forwarder_module, name, seconds)
    road = Road(0, cast(Any, handover.source.nics[0]), frozenset())
    assert road.due(10.0) is None  # the destination has not said how many
    road.expected = 3
    assert road.due(None) is None
    for number, at in enumerate(marks):
        road.marked(number, b"", at)
    road.last_frame = last_frame
    assert road.due(10.0) == pytest.approx(due)


def test_the_tap_waits_longer_while_the_old_hosts_frames_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrival_module, "HOLD_S", 1.0)
    monkeypatch.setattr(arrival_module, "LONGEST_S", 3.0)
    hold = Hold()
    hold.acknowledged(99.0)  # before the switch_over they say nothing
    assert not hold.over(200.0)
    hold.begin(100.0)
    assert [hold.over(now) for now in (100.9, 101.0)] == [False, True]
    for now in (100.9, 101.8, 102.7):
        hold.acknowledged(now)
        assert not hold.over(now + 0.2)
    assert hold.over(103.0)


def test_a_source_that_says_nothing_is_waited_for_only_so_long(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "HOLD_S", 0.0)
    _, target = taps(handover)
    switch_over(handover)
    target.put(to(OTHER, 1))
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(OTHER, 1)]


def test_what_is_there_is_taken_however_long_the_start_took(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, (source, target) = handover.source.nics[0].mac, taps(handover)
    source.put(to(guest, 1))
    switch_over(handover)
    next_message(handover)
    target.put(to(guest, 2))
    finish(handover)
    monkeypatch.setattr(arrival_module, "SETTLE_S", 0.0)
    assert handover.receiver.holding
    assert handover.receiver.settle()
    assert not handover.receiver.holding
    assert handover.target.nics[0].given() == [to(guest, 1), to(guest, 2)]


def test_frames_are_expected_from_the_draw_to_the_roads_end(handover: Handover) -> None:
    assert not handover.sender.expecting, "nobody knows when, or whether, the guest starts"
    switch_over(handover)
    next_message(handover)
    assert handover.sender.expecting
    finish(handover)
    assert not handover.sender.expecting


def test_the_announcement_waits_only_so_long_and_the_tap_waits_on(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, (source, target) = handover.source.nics[0].mac, taps(handover)
    monkeypatch.setattr(arrival_module, "SETTLE_S", 0.0)
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
