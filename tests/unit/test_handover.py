"""The handover of frames: order, ends, bounds, and what a peer may send. No network, no KVM."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from godwit.announce.frames import gratuitous_arp, layer2_update, read_cookie
from godwit.errors import LinkLost
from godwit.host.net.ethernet import BROADCAST, TPID_8021Q
from godwit.host.net.tap import HEADER
from godwit.hw.nic import rx_backlog as ahead
from godwit.migration.packets import destination as arrival_module
from godwit.migration.packets import source as forwarder_module
from godwit.migration.wire import messages as codec
from godwit.migration.wire.messages import Kind
from handover_bench import MARK, OTHER, Handover, draw, finish, taps, to, word

TAG_100 = b"\x81\0\0\x64"

pytestmark = pytest.mark.usefixtures("no_luck")


def test_what_came_to_the_old_host_goes_before_what_came_to_the_new(handover: Handover) -> None:
    guest, source, target = handover.source.nics[0].mac, *taps(handover)
    source.put(to(guest, 1))
    draw(handover)
    assert word(handover) is Kind.DRAWN
    source.put(to(guest, 2))
    target.put(to(guest, 3))  # the switch has learned
    finish(handover)
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
    guest, _, target = handover.source.nics[0].mac, *taps(handover)
    draw(handover)
    target.put(to(guest, 3))
    assert handover.target.nics[0].given() == []


def test_frames_flooded_to_both_before_the_draw_come_once(handover: Handover) -> None:
    source, target = taps(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    draw(handover)
    assert handover.target.nics[0].drained == 1
    word(handover)
    finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, 1)]


def test_broadcasts_on_the_way_during_the_draw_come_once(handover: Handover) -> None:
    source, target = taps(handover)
    draw(handover)
    word(handover)
    for tap in (source, target):  # before the switch heard the mark, after the new tap was drained
        tap.put(to(BROADCAST, 1))
    handover.flood()
    for tap in (source, target):
        tap.put(to(BROADCAST, 2))  # after the mark
    finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, number) for number in (1, 2)]
    assert handover.arrival.info()["repeated"] == 1


def test_the_same_broadcast_sent_twice_comes_twice(handover: Handover) -> None:
    """Once before the draw, to both taps; once after the mark, which the new tap alone gives."""
    source, target = taps(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    handover.forwarder.serve(time.monotonic())
    handover.arrival.keep(bytearray(_frames_on(handover)))
    draw(handover)
    word(handover)
    finish(handover)
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
        side.uplinks[0].observer.frame(frame, None, 1000.0)
    handover.arrival.prepare()
    source, _ = taps(handover)
    draw(handover)
    word(handover)
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
    finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, 2, TAG_100)]


def test_what_the_guest_sends_does_not_follow_it(handover: Handover) -> None:
    """Where the marks are filtered, its announcement floods to the old tap."""
    guest, source = handover.source.nics[0].mac, taps(handover)[0]
    draw(handover)
    word(handover)
    source.put(gratuitous_arp(guest, bytes([192, 0, 2, 7]), ()))
    source.put(to(guest, 1))
    finish(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].given() == [to(guest, 1)]


def test_stragglers_come_though_late_and_those_for_others_do_not(handover: Handover) -> None:
    guest, source, target = handover.source.nics[0].mac, *taps(handover)
    draw(handover)
    word(handover)
    finish(handover)
    handover.arrival.settle()
    for frame in (to(OTHER, 1), to(BROADCAST, 2), to(BROADCAST, 4, TAG_100), to(guest, 3)):
        source.put(frame)
    handover.forwarder.serve(time.monotonic())
    handover.near.close()
    handover.arrival.listen()
    assert handover.target.nics[0].given() == [to(guest, 3)]
    assert handover.arrival.info()["late"] == handover.forwarder.info()["late"] == 1
    assert target.get() is None


def test_a_lost_line_ends_the_wait(handover: Handover) -> None:
    draw(handover)
    handover.near.close()
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False
    assert not handover.arrival.heard
    with pytest.raises(LinkLost):
        handover.arrival.send(Kind.STARTED, codec.Started({}, []))


def test_a_guest_that_stays_gets_its_frames_back_in_order(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    source.put(to(guest, 1))
    draw(handover)
    word(handover)
    source.put(to(guest, 2))
    handover.forwarder.serve(time.monotonic())
    handover.forwarder.give_back()
    assert handover.source.nics[0].given() == [to(guest, 1), to(guest, 2)]


def test_a_guest_that_is_there_for_good_gets_nothing_here(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    source.put(to(guest, 1))
    handover.forwarder.serve(time.monotonic())
    handover.forwarder.settled()
    handover.forwarder.give_back()
    assert handover.source.nics[0].given() == []


def test_more_than_the_bound_is_left_behind_and_said(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder_module, "MAX_FRAMES", 40)
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    for number in range(80):
        source.put(to(guest, number))
    for _ in range(4):  # a batch each time
        handover.forwarder.serve(time.monotonic())
    info = handover.forwarder.info()
    assert (info["frames"], info["left-behind"]) == (64, 16)  # whole batches
    # What ends the road is still heard.
    draw(handover)
    word(handover)
    finish(handover)
    handover.arrival.settle()
    assert handover.forwarder.info()["marks-seen"] == 1


def test_a_draw_that_fails_is_no_failure(handover: Handover) -> None:
    handover.target.nics[0].error = OSError("down")
    draw(handover)
    word(handover)
    handover.forwarder.serve(time.monotonic())
    handover.arrival.settle()
    assert handover.arrival.info()["marks-sent"] == 0


def test_it_is_drawn_once(handover: Handover) -> None:
    draw(handover)
    draw(handover)
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
    draw(handover)
    payload = codec.encode(value) if isinstance(value, (codec.Frames, codec.RoadEnds)) else b"\xc1"
    handover.near.send_parts([codec.frame(kind, payload)])
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False


@pytest.mark.parametrize("size", [0, HEADER, HEADER + 13, 1 << 17])
def test_what_is_no_frame_is_refused(handover: Handover, size: int) -> None:
    draw(handover)
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
        draw(both)
        both.arrival.settle()
        assert len(both.target.nics[0].given()) == 1000 // (HEADER + 60)
        assert both.arrival.info()["refused"] == 100 - 1000 // (HEADER + 60)
    finally:
        both.close()


def test_only_the_moves_own_marks_are_marks(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    draw(handover)
    word(handover)
    stranger = layer2_update(guest, (), bytes(16))
    source.put(stranger)
    handover.forwarder.serve(time.monotonic())
    assert handover.forwarder.info()["marks-seen"] == 0
    assert read_cookie(stranger) is not None


def test_a_mark_of_one_nic_is_none_of_anothers() -> None:
    """Two NICs in one network: each mark floods to both old taps."""
    both = Handover(2)
    try:
        first, second = both.source.nics
        draw(both)
        word(both)
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
    draw(handover)
    handover.arrival.settle()
    assert handover.target.nics[0].ahead.held is False


def test_each_nic_has_its_own_road() -> None:
    both = Handover(2)
    try:
        guests = [nic.mac for nic in both.source.nics]
        for nic, mac in zip(both.source.nics, guests, strict=True):
            nic.tap.put(to(mac, 1))
        draw(both)
        word(both)
        both.flood(0)
        both.flood(1)
        both.forwarder.serve(time.monotonic())
        both.arrival.settle()
        assert [nic.given() for nic in both.target.nics] == [[to(mac, 1)] for mac in guests]
    finally:
        both.close()
