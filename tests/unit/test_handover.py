"""The handover of frames: order, ends, bounds, and what a peer may send. No network, no KVM."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from handover_bench import MARK, OTHER, Handover, to

from godwit.announce.frames import BROADCAST, TPID_8021Q, gratuitous_arp, layer2_update, read_note
from godwit.errors import LinkLost
from godwit.migration import arrival as arrival_module
from godwit.migration import codec
from godwit.migration import forwarder as forwarder_module
from godwit.migration.arrival import Hold
from godwit.migration.codec import Kind
from godwit.migration.forwarder import Road
from godwit.nic import ahead
from godwit.nic.tap import HEADER
from godwit.testing.tap import FakeTap

TAG_100 = b"\x81\0\0\x64"
MINUTE = 60.0


@pytest.fixture
def handover() -> Iterator[Handover]:
    handover = Handover()
    yield handover
    handover.close()


@pytest.fixture(autouse=True)
def _no_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test waits for ends a wait; a test of a time-out sets it to nothing."""
    for name in ("MARKS_S", "LONGEST_S", "QUIET_S", "PATIENCE_S", "LATE_S"):
        monkeypatch.setattr(forwarder_module, name, MINUTE)
    for name in ("HOLD_S", "LONGEST_S", "SETTLE_S"):
        monkeypatch.setattr(arrival_module, name, MINUTE)


def _until() -> float:
    return time.monotonic() + MINUTE


def _word(handover: Handover) -> Kind:
    """Wait for the destination's next word, forwarding meanwhile."""
    assert handover.forwarder.serve(_until())
    kind, payload = handover.near.expect_one(Kind.DRAWN, Kind.STARTED)
    if kind is Kind.DRAWN:
        handover.forwarder.drawn(codec.decode(payload, codec.Drawn).marks)
    return kind


def _draw(handover: Handover) -> None:
    handover.arrival.draw(lambda phase: None)


def _finish(handover: Handover, number: int = 0) -> None:
    """The marks come back, and the road ends."""
    handover.flood(number)
    handover.forwarder.serve(time.monotonic())  # takes what is there
    handover.far.send(Kind.STARTED, codec.Started({}, []))
    assert handover.forwarder.serve(_until())
    handover.near.expect_struct(Kind.STARTED, codec.Started)


def test_what_came_to_the_old_host_goes_before_what_came_to_the_new(handover: Handover) -> None:
    guest, source, target = handover.source.nics[0].mac, *_taps(handover)
    source.put(to(guest, 1))
    _draw(handover)
    assert _word(handover) is Kind.DRAWN
    source.put(to(guest, 2))
    target.put(to(guest, 3))  # the switch has learned
    _finish(handover)
    target.put(to(guest, 4))
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(guest, number) for number in (1, 2, 3, 4)]
    assert handover.arrival.info()["frames"] == 2
    info = handover.forwarder.info()
    (road,) = info.pop("roads")
    assert road["first-mark"] == road["last-mark"] <= road["end"]
    assert info == {
        "frames": 2, "bytes": 2 * (HEADER + 60), "late": 0, "left-behind": 0,
        "marks-seen": 1, "marks-sent": 1,
    }  # fmt: skip


def test_the_tap_waits_until_the_old_road_ends(handover: Handover) -> None:
    guest, _, target = handover.source.nics[0].mac, *_taps(handover)
    _draw(handover)
    target.put(to(guest, 3))
    assert handover.target.nics[0].given() == []


def test_frames_flooded_to_both_before_the_draw_come_once(handover: Handover) -> None:
    source, target = _taps(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    _draw(handover)
    assert handover.target.nics[0].drained == 1
    _word(handover)
    _finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, 1)]


def test_broadcasts_on_the_way_during_the_draw_come_once(handover: Handover) -> None:
    source, target = _taps(handover)
    _draw(handover)
    _word(handover)
    for tap in (source, target):  # before the switch heard the mark, after the new tap was drained
        tap.put(to(BROADCAST, 1))
    handover.flood()
    for tap in (source, target):
        tap.put(to(BROADCAST, 2))  # after the mark
    _finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, number) for number in (1, 2)]
    assert handover.arrival.info()["repeated"] == 1


def test_the_same_broadcast_sent_twice_comes_twice(handover: Handover) -> None:
    """Once before the draw, to both taps; once after the mark, which the new tap alone gives."""
    source, target = _taps(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    handover.forwarder.serve(time.monotonic())
    handover.arrival.keep(bytearray(_frames_on(handover)))
    _draw(handover)
    _word(handover)
    _finish(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    handover.arrival.abandon()
    assert handover.target.nics[0].given() == [to(BROADCAST, 1)] * 2


def _frames_on(handover: Handover) -> bytes:
    """The payload of the FRAMES that wait at the destination."""
    kind, length = handover.far.receive()
    assert kind is Kind.FRAMES
    return bytes(handover.far.read(length))


def test_each_network_has_its_own_mark(handover: Handover) -> None:
    guest = handover.source.nics[0].mac
    tags = ((TPID_8021Q, 100),)
    for side in (handover.source, handover.target):
        frame = gratuitous_arp(guest, bytes([192, 0, 2, 7]), tags)
        side.stations[0].observer.frame(frame, None, 1000.0)
    handover.arrival.prepare()
    source, _ = _taps(handover)
    _draw(handover)
    _word(handover)
    sent = [frame for _, frame in handover.target.nics[0].sent]
    assert sent == [
        layer2_update(guest, (), MARK + b"\0\0\0\0"),
        layer2_update(guest, tags, MARK + b"\0\0\0\1"),
    ]
    source.put(sent[0])
    source.put(to(BROADCAST, 1))  # the new tap has it: its network is drawn
    source.put(to(BROADCAST, 2, TAG_100))  # and this one not yet
    source.put(sent[1])
    handover.target.nics[0].sent.clear()
    _finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, 2, TAG_100)]


def test_stragglers_come_though_late_and_those_for_others_do_not(handover: Handover) -> None:
    guest, source, target = handover.source.nics[0].mac, *_taps(handover)
    _draw(handover)
    _word(handover)
    _finish(handover)
    handover.arrival.settle()
    for frame in (to(OTHER, 1), to(BROADCAST, 2), to(guest, 3)):
        source.put(frame)
    handover.forwarder.serve(time.monotonic())
    handover.near.close()
    handover.arrival.listen()
    assert handover.target.nics[0].given() == [to(guest, 3)]
    assert handover.arrival.info()["late"] == handover.forwarder.info()["late"] == 1
    assert target.get() is None


@pytest.mark.parametrize("seen", [False, True])
def test_a_mark_that_does_not_come_is_waited_for_only_so_long(
    handover: Handover, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    monkeypatch.setattr(forwarder_module, "QUIET_S" if seen else "MARKS_S", 0.0)
    _draw(handover)
    _word(handover)
    handover.forwarder.drawn([2])  # on a network that nobody carries
    if seen:
        handover.flood()
    handover.forwarder.serve(time.monotonic())
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False
    assert handover.forwarder.info()["marks-seen"] == int(seen)


def test_only_frames_to_the_guest_tell_of_a_mark_that_is_late(handover: Handover) -> None:
    source, _ = _taps(handover)
    source.put(to(BROADCAST, 1))
    _draw(handover)
    _word(handover)
    handover.forwarder.serve(time.monotonic())
    assert "last-frame" not in handover.forwarder.info()["roads"][0]
    source.put(to(handover.source.nics[0].mac, 2))
    handover.forwarder.serve(time.monotonic())
    assert "last-frame" in handover.forwarder.info()["roads"][0]


def test_a_mark_that_is_late_ends_the_road_and_nothing_is_late(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(forwarder_module, "time", SimpleNamespace(monotonic=lambda: now))
    for name, seconds in (("MARKS_S", 0.25), ("LONGEST_S", 2.0), ("QUIET_S", 0.05)):
        monkeypatch.setattr(forwarder_module, name, seconds)
    guest, source, target = handover.source.nics[0].mac, *_taps(handover)
    _draw(handover)
    _word(handover)
    target.put(to(guest, 4))
    for number, at in enumerate((100.2, 100.4, 100.47), 1):
        now = at
        source.put(to(guest, number))
        handover.forwarder.serve(now)
    now = 100.48
    handover.flood()
    handover.forwarder.serve(now)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(guest, number) for number in (1, 2, 3, 4)]
    assert handover.forwarder.info()["late"] == 0
    assert handover.forwarder.info()["roads"] == [
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
        both.arrival.draw(lambda phase: None)
        _word(both)
        both.flood(0)
        assert not both.forwarder.serve(time.monotonic())
        polls = Polls(both.forwarder._poll)
        monkeypatch.setattr(both.forwarder, "_poll", polls)
        assert not both.forwarder.serve(time.monotonic() + 0.1)
        assert polls.count < 10
    finally:
        both.close()


def test_a_second_draw_begins_nothing_anew(handover: Handover) -> None:
    _draw(handover)
    _word(handover)
    handover.forwarder.drawn([])
    assert handover.forwarder.info()["marks-sent"] == 1


def test_a_nic_of_which_no_count_is_given_waits_for_none() -> None:
    both = Handover(nics=2)
    try:
        both.arrival.draw(lambda phase: None)
        both.forwarder.drawn([1])
        both.forwarder.serve(time.monotonic())
        first, second = both.forwarder.info()["roads"]
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
        ((9.9,), 0.0, 10.05),  # one came before the source heard of the draw
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
    hold.heard(99.0)  # before the draw they say nothing
    assert not hold.over(200.0)
    hold.begin(100.0)
    assert [hold.over(now) for now in (100.9, 101.0)] == [False, True]
    for now in (100.9, 101.8, 102.7):
        hold.heard(now)
        assert not hold.over(now + 0.2)
    assert hold.over(103.0)


def test_a_source_that_says_nothing_is_waited_for_only_so_long(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "HOLD_S", 0.0)
    _, target = _taps(handover)
    _draw(handover)
    target.put(to(OTHER, 1))
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(OTHER, 1)]


def test_the_announcement_waits_only_so_long_and_the_tap_waits_on(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, (source, target) = handover.source.nics[0].mac, _taps(handover)
    monkeypatch.setattr(arrival_module, "SETTLE_S", 0.0)
    _draw(handover)
    target.put(to(guest, 2))
    assert not handover.arrival.settle()
    assert handover.target.nics[0].given() == []
    _word(handover)
    source.put(to(guest, 1))
    _finish(handover)
    handover.near.close()
    handover.arrival.listen()
    assert handover.target.nics[0].given() == [to(guest, 1), to(guest, 2)]


def test_a_lost_line_ends_the_wait(handover: Handover) -> None:
    _draw(handover)
    handover.near.close()
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False
    assert not handover.arrival.heard
    with pytest.raises(LinkLost):
        handover.arrival.send(Kind.STARTED, codec.Started({}, []))


def test_a_guest_that_stays_gets_its_frames_back_in_order(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *_taps(handover)
    source.put(to(guest, 1))
    _draw(handover)
    _word(handover)
    source.put(to(guest, 2))
    handover.forwarder.serve(time.monotonic())
    handover.forwarder.give_back()
    assert handover.source.nics[0].given() == [to(guest, 1), to(guest, 2)]


def test_a_guest_that_is_there_for_good_gets_nothing_here(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *_taps(handover)
    source.put(to(guest, 1))
    handover.forwarder.serve(time.monotonic())
    handover.forwarder.settled()
    handover.forwarder.give_back()
    assert handover.source.nics[0].given() == []


def test_more_than_the_bound_is_left_behind_and_said(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder_module, "MAX_FRAMES", 40)
    guest, source, _ = handover.source.nics[0].mac, *_taps(handover)
    for number in range(80):
        source.put(to(guest, number))
    for _ in range(4):  # a batch each time
        handover.forwarder.serve(time.monotonic())
    info = handover.forwarder.info()
    assert (info["frames"], info["left-behind"]) == (64, 16)  # whole batches
    # What ends the road is still heard.
    _draw(handover)
    _word(handover)
    _finish(handover)
    handover.arrival.settle()
    assert handover.forwarder.info()["marks-seen"] == 1


def test_a_draw_that_fails_is_no_failure(handover: Handover) -> None:
    handover.target.nics[0].error = OSError("down")
    _draw(handover)
    _word(handover)
    handover.forwarder.serve(time.monotonic())
    handover.arrival.settle()
    assert handover.arrival.info()["marks-sent"] == 0


def test_it_is_drawn_once(handover: Handover) -> None:
    _draw(handover)
    _draw(handover)
    assert len(handover.target.nics[0].sent) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Kind.FRAMES, codec.Frames(1, [bytes(64)])),
        (Kind.FRAMES, SimpleNamespace(frames="no")),
        (Kind.ROAD_ENDS, codec.RoadEnds(7)),
        (Kind.RAM, None),
    ],
)
def test_nonsense_from_the_source_ends_the_line_and_the_wait(
    handover: Handover, kind: Kind, value: object
) -> None:
    _draw(handover)
    payload = codec.encode(value) if isinstance(value, (codec.Frames, codec.RoadEnds)) else b"\xc1"
    handover.near.send_parts([codec.frame(kind, payload)])
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False


@pytest.mark.parametrize("size", [0, HEADER, HEADER + 13, 1 << 17])
def test_what_is_no_frame_is_refused(handover: Handover, size: int) -> None:
    _draw(handover)
    handover.near.send(Kind.FRAMES, codec.Frames(0, [bytes(size)]))
    handover.near.send(Kind.ROAD_ENDS, codec.RoadEnds(0))
    handover.arrival.settle()
    assert handover.target.nics[0].given() == []
    assert handover.arrival.info()["refused"] == 1


def test_a_peer_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", 1000)
    both = Handover()
    try:
        frames = [bytes(HEADER) + to(OTHER, number) for number in range(100)]
        both.near.send(Kind.FRAMES, codec.Frames(0, frames))
        both.near.send(Kind.ROAD_ENDS, codec.RoadEnds(0))
        _draw(both)
        both.arrival.settle()
        assert len(both.target.nics[0].given()) == 1000 // (HEADER + 60)
        assert both.arrival.info()["refused"] == 100 - 1000 // (HEADER + 60)
    finally:
        both.close()


def test_only_the_moves_own_marks_are_marks(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *_taps(handover)
    _draw(handover)
    _word(handover)
    stranger = layer2_update(guest, (), bytes(16))
    source.put(stranger)
    handover.forwarder.serve(time.monotonic())
    assert handover.forwarder.info()["marks-seen"] == 0
    assert read_note(stranger) is not None


def test_a_mark_of_one_nic_is_none_of_anothers() -> None:
    """Two NICs in one network: each mark floods to both old taps."""
    both = Handover(2)
    try:
        first, second = both.source.nics
        _draw(both)
        _word(both)
        marks = [[frame for _, frame in nic.sent] for nic in both.target.nics]
        for nic in (first, second):
            nic.tap.put(marks[0][0])
        second.tap.put(to(BROADCAST, 1))  # the second NIC's new tap did not get it: not drawn yet
        second.tap.put(to(second.mac, 2))
        for nic in (first, second):
            nic.tap.put(marks[1][0])
        for _ in range(3):
            both.forwarder.serve(time.monotonic())
        both.arrival.settle()
        assert both.target.nics[1].given() == [to(BROADCAST, 1), to(second.mac, 2)]
        assert both.forwarder.info()["marks-seen"] == 2
        assert both.forwarder.info()["late"] == 0
    finally:
        both.close()


def test_a_frame_that_does_not_end_holds_nothing(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival_module, "HOLD_S", 0.0)
    handover.near.send_parts([codec.header(Kind.FRAMES, 1 << 20), b"a little of it"])
    _draw(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False


def test_each_nic_has_its_own_road() -> None:
    both = Handover(2)
    try:
        guests = [nic.mac for nic in both.source.nics]
        for nic, mac in zip(both.source.nics, guests, strict=True):
            nic.tap.put(to(mac, 1))
        _draw(both)
        _word(both)
        both.flood(0)
        both.flood(1)
        both.forwarder.serve(time.monotonic())
        both.arrival.settle()
        assert [nic.given() for nic in both.target.nics] == [[to(mac, 1)] for mac in guests]
    finally:
        both.close()


def _taps(handover: Handover) -> tuple[FakeTap, FakeTap]:
    """The source's and the destination's."""
    return handover.source.nics[0].tap, handover.target.nics[0].tap
