"""The handover of frames: order, ends, bounds, and what a peer may send. No network, no KVM."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from godwit.announce.dissect import Kind as Sighted
from godwit.announce.dissect import Sighting
from godwit.announce.frames import gratuitous_arp, layer2_update, read_cookie
from godwit.errors import LinkLost
from godwit.host.net.ethernet import BROADCAST, TPID_8021Q
from godwit.host.net.tap import HEADER
from godwit.hw.nic import rx_backlog
from godwit.migration.packets import source as packet_source
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.spec import saved
from packet_handover_bench import (
    COOKIE,
    OTHER,
    PATIENT,
    Handover,
    finish,
    next_message,
    switch_over,
    taps,
    to,
)

TAG_100 = b"\x81\0\0\x64"


def test_what_came_to_the_old_host_goes_before_what_came_to_the_new(handover: Handover) -> None:
    guest, source, target = handover.source.nics[0].mac, *taps(handover)
    source.put(to(guest, 1))
    switch_over(handover)
    assert next_message(handover) is Kind.SWITCHED
    source.put(to(guest, 2))
    target.put(to(guest, 3))  # the switch has learned
    finish(handover)
    target.put(to(guest, 4))
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(guest, number) for number in (1, 2, 3, 4)]
    assert handover.receiver.info()["packets"] == 2
    info = handover.sender.info()
    (path,) = info.pop("old-paths")
    assert path["first-marker"] == path["last-marker"] <= path["drained"]
    assert info == {
        "packets": 2, "bytes": 2 * (HEADER + 60), "late": 0, "left-behind": 0,
        "markers-seen": 1, "markers-sent": 1,
    }  # fmt: skip


def test_the_tap_waits_until_the_old_path_ends(handover: Handover) -> None:
    guest, _, target = handover.source.nics[0].mac, *taps(handover)
    switch_over(handover)
    target.put(to(guest, 3))
    assert handover.target.nics[0].given() == []


def test_frames_flooded_to_both_before_the_switchover_come_once(handover: Handover) -> None:
    source, target = taps(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    switch_over(handover)
    assert handover.target.nics[0].rx_backlog.drained == 1
    next_message(handover)
    finish(handover)
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, 1)]


def test_broadcasts_on_the_way_during_the_switchover_come_once(handover: Handover) -> None:
    source, target = taps(handover)
    switch_over(handover)
    next_message(handover)
    for tap in (
        source,
        target,
    ):  # before the switch acknowledged the marker, after the new tap was drained
        tap.put(to(BROADCAST, 1))
    handover.flood()
    for tap in (source, target):
        tap.put(to(BROADCAST, 2))  # after the marker
    finish(handover)
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, number) for number in (1, 2)]
    assert handover.receiver.info()["repeated"] == 1


def test_the_same_broadcast_sent_twice_comes_twice(handover: Handover) -> None:
    """Once before the switchover, to both taps; once after the marker, which one tap gives."""
    source, target = taps(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    handover.sender.serve(time.monotonic())
    handover.receiver.inject(bytearray(_frames_on(handover)))
    switch_over(handover)
    next_message(handover)
    finish(handover)
    for tap in (source, target):
        tap.put(to(BROADCAST, 1))
    handover.receiver.abandon()
    assert handover.target.nics[0].given() == [to(BROADCAST, 1)] * 2


def _frames_on(handover: Handover) -> bytes:
    """The payload of the FRAMES that wait at the destination."""
    kind, length = handover.far.receive()
    assert kind is Kind.PACKETS
    return bytes(handover.far.read(length))


def test_each_network_has_its_own_marker(handover: Handover) -> None:
    guest = handover.source.nics[0].mac
    tags = ((TPID_8021Q, 100),)
    for side in (handover.source, handover.target):
        frame = gratuitous_arp(guest, bytes([192, 0, 2, 7]), tags)
        side.uplinks[0].observer.frame(frame, None, 1000.0)
    handover.receiver.prepare()
    source, _ = taps(handover)
    switch_over(handover)
    next_message(handover)
    sent = [frame for _, frame in handover.target.nics[0].sent]
    assert sent == [
        layer2_update(guest, (), COOKIE + b"\0\0\0\0"),
        layer2_update(guest, tags, COOKIE + b"\0\0\0\1"),
    ]
    source.put(sent[0])
    source.put(to(BROADCAST, 1))  # the new tap has it: its network is switched over
    source.put(to(BROADCAST, 2, TAG_100))  # and this one not yet
    source.put(sent[1])
    handover.target.nics[0].sent.clear()
    finish(handover)
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(BROADCAST, 2, TAG_100)]


def test_what_the_guest_sends_does_not_follow_it(handover: Handover) -> None:
    """Where the markers are filtered, its announcement floods to the old tap."""
    guest, source = handover.source.nics[0].mac, taps(handover)[0]
    switch_over(handover)
    next_message(handover)
    source.put(gratuitous_arp(guest, bytes([192, 0, 2, 7]), ()))
    source.put(to(guest, 1))
    finish(handover)
    handover.receiver.settle()
    assert handover.target.nics[0].given() == [to(guest, 1)]


def test_stragglers_come_though_late_and_those_for_others_do_not(handover: Handover) -> None:
    guest, source, target = handover.source.nics[0].mac, *taps(handover)
    switch_over(handover)
    next_message(handover)
    finish(handover)
    handover.receiver.settle()
    for frame in (to(OTHER, 1), to(BROADCAST, 2), to(BROADCAST, 4, TAG_100), to(guest, 3)):
        source.put(frame)
    handover.sender.serve(time.monotonic())
    handover.near.close()
    handover.receiver.listen()
    assert handover.target.nics[0].given() == [to(guest, 3)]
    assert handover.receiver.info()["late"] == handover.sender.info()["late"] == 1
    assert target.get() is None


def test_a_lost_connection_ends_the_wait(handover: Handover) -> None:
    switch_over(handover)
    handover.near.close()
    handover.receiver.settle()
    assert handover.target.nics[0].rx_backlog.held is False
    assert not handover.receiver.acknowledged
    with pytest.raises(LinkLost):
        handover.receiver.send(Kind.STARTED, messages.Started({}, []))


def test_a_guest_that_stays_gets_its_frames_back_in_order(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    source.put(to(guest, 1))
    switch_over(handover)
    next_message(handover)
    source.put(to(guest, 2))
    handover.sender.serve(time.monotonic())
    handover.sender.requeue()
    assert handover.source.nics[0].given() == [to(guest, 1), to(guest, 2)]


def test_a_guest_that_is_there_for_good_gets_nothing_here(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    source.put(to(guest, 1))
    handover.sender.serve(time.monotonic())
    handover.sender.settled()
    handover.sender.requeue()
    assert handover.source.nics[0].given() == []


def test_more_than_the_bound_is_left_behind_and_reported(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packet_source, "MAX_FRAMES", 40)
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    for number in range(80):
        source.put(to(guest, number))
    for _ in range(4):  # a chunk each time
        handover.sender.serve(time.monotonic())
    info = handover.sender.info()
    assert (info["packets"], info["left-behind"]) == (64, 16)  # whole batches
    # What ends the path is still acknowledged.
    switch_over(handover)
    next_message(handover)
    finish(handover)
    handover.receiver.settle()
    assert handover.sender.info()["markers-seen"] == 1


def test_a_switchover_that_fails_is_no_failure(handover: Handover) -> None:
    handover.target.nics[0].error = OSError("down")
    switch_over(handover)
    next_message(handover)
    handover.sender.serve(time.monotonic())
    handover.receiver.settle()
    assert handover.receiver.info()["markers-sent"] == 0


def test_the_traffic_is_switched_over_once(handover: Handover) -> None:
    switch_over(handover)
    switch_over(handover)
    assert len(handover.target.nics[0].sent) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Kind.PACKETS, messages.Packets(1, [bytes(64)])),
        (Kind.PACKETS, SimpleNamespace(frames="no")),
        (Kind.PATH_DRAINED, messages.PathDrained(7)),
        (Kind.RAM, None),
    ],
)
def test_nonsense_from_the_source_ends_the_connection_and_the_wait(
    handover: Handover, kind: Kind, value: object
) -> None:
    switch_over(handover)
    payload = (
        saved.encode(value)
        if isinstance(value, (messages.Packets, messages.PathDrained))
        else b"\xc1"
    )
    handover.near.send_parts([messages.message(kind, payload)])
    handover.receiver.settle()
    assert handover.target.nics[0].rx_backlog.held is False


@pytest.mark.parametrize("size", [0, HEADER, HEADER + 13, 1 << 17])
def test_what_is_no_frame_is_refused(handover: Handover, size: int) -> None:
    switch_over(handover)
    handover.near.send(Kind.PACKETS, messages.Packets(0, [bytes(size)]))
    handover.near.send(Kind.PATH_DRAINED, messages.PathDrained(0))
    handover.receiver.settle()
    assert handover.target.nics[0].given() == []
    assert handover.receiver.info()["refused"] == 1


def test_a_peer_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rx_backlog, "MAX_BYTES", 1000)
    both = Handover()
    try:
        frames = [bytes(HEADER) + to(OTHER, number) for number in range(100)]
        both.near.send(Kind.PACKETS, messages.Packets(0, frames))
        both.near.send(Kind.PATH_DRAINED, messages.PathDrained(0))
        switch_over(both)
        both.receiver.settle()
        assert len(both.target.nics[0].given()) == 1000 // (HEADER + 60)
        assert both.receiver.info()["refused"] == 100 - 1000 // (HEADER + 60)
    finally:
        both.close()


def test_only_the_migrations_own_markers_are_markers(handover: Handover) -> None:
    guest, source, _ = handover.source.nics[0].mac, *taps(handover)
    switch_over(handover)
    next_message(handover)
    stranger = layer2_update(guest, (), bytes(16))
    source.put(stranger)
    handover.sender.serve(time.monotonic())
    assert handover.sender.info()["markers-seen"] == 0
    assert read_cookie(stranger) is not None


def test_a_marker_of_one_nic_is_none_of_anothers() -> None:
    """Two NICs in one network: each marker floods to both old taps."""
    both = Handover(2)
    try:
        first, second = both.source.nics
        switch_over(both)
        next_message(both)
        markers = [[frame for _, frame in nic.sent] for nic in both.target.nics]
        for nic in (first, second):
            nic.fake_tap.put(markers[0][0])
        second.fake_tap.put(
            to(BROADCAST, 1)
        )  # the second NIC's new tap did not get it: not switched over yet
        second.fake_tap.put(to(second.mac, 2))
        for nic in (first, second):
            nic.fake_tap.put(markers[1][0])
        for _ in range(3):
            both.sender.serve(time.monotonic())
        both.receiver.settle()
        assert both.target.nics[1].given() == [to(BROADCAST, 1), to(second.mac, 2)]
        assert both.sender.info()["markers-seen"] == 2
        assert both.sender.info()["late"] == 0
    finally:
        both.close()


def test_a_message_that_does_not_end_holds_nothing() -> None:
    handover = Handover(times=PATIENT._replace(hold=0.0))
    try:
        handover.near.send_parts([messages.header(Kind.PACKETS, 1 << 20), b"a little of it"])
        switch_over(handover)
        handover.receiver.settle()
        assert handover.target.nics[0].rx_backlog.held is False
    finally:
        handover.close()


def test_each_nic_has_its_own_path() -> None:
    both = Handover(2)
    try:
        guests = [nic.mac for nic in both.source.nics]
        for nic, mac in zip(both.source.nics, guests, strict=True):
            nic.fake_tap.put(to(mac, 1))
        switch_over(both)
        next_message(both)
        both.flood(0)
        both.flood(1)
        both.sender.serve(time.monotonic())
        both.receiver.settle()
        assert [nic.given() for nic in both.target.nics] == [[to(mac, 1)] for mac in guests]
    finally:
        both.close()


def test_a_mac_address_that_another_took_during_the_stop_gets_no_marker(
    handover: Handover,
) -> None:
    """VRRP's, which a backup takes over when its master stands still."""
    uplink = handover.target.uplinks[0]
    now = uplink._clock.now()
    virtual = bytes.fromhex("00005e000107")
    with uplink.observer.book(now) as book:
        book.learn(Sighting(virtual, (), Sighted.ARP, bytes([192, 0, 2, 9]), True, None), now - 10)
    uplink.observer.guest_here(True)
    handover.receiver.prepare()
    assert len(handover.receiver._markers[0]) == 2
    advertisement = b"\x01\x00\x5e\x00\x00\x12" + virtual + b"\x08\x00" + bytes(46)
    uplink.observer.network_frame(advertisement, None, now)
    handover.receiver.switch_over(lambda phase: None)
    assert handover.receiver.info()["markers-sent"] == 1
