"""The uplink of a NIC, and what is reported of its guest."""

from __future__ import annotations

import pytest

from announce_bench import IP4, IP6, VLAN, Bench, Nic, Port, S
from godwit.announce.dissect import Kind, Sighting
from godwit.announce.entries import Source
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.policy import parse_policy
from godwit.announce.uplink import Uplink
from godwit.host.net.ethernet import TPID_8021Q
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters
from tests.fakes.clock import FakeClock

OTHER = bytes.fromhex("5254000000aa")


class Place:
    def __init__(self, allow: str | None = None) -> None:
        self.clock = FakeClock()
        self.nic = Nic(self.clock)
        self.uplink = Uplink(self.nic, self.clock, parse_policy(allow) if allow else None)
        self.uplink.watched = True
        self.seen: list[Sighting] = []
        self.uplink.on_seen = self.seen.append

    def guest_sends(self, *frames: bytes) -> None:
        for frame in frames:
            self.uplink.observer.frame(frame, None, self.clock.now())

    def sent(self) -> list[bytes]:
        return [frame for _, frame in self.nic.sent]


# --- frames ---------------------------------------------------------------------------------------
def test_the_observer_knows_of_a_frame_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place()
    # The watch may see it before the write has returned.
    monkeypatch.setattr(place.nic, "send_from_host", place.guest_sends)
    place.guest_sends(gratuitous_arp(place.nic.mac, IP4))
    place.seen.clear()
    place.uplink.begin()
    assert place.uplink.announce(place.uplink.entries()) == (2, None)
    assert (place.uplink.observer.host_frames, place.seen) == (2, [])
    assert len(place.uplink.missing()) == 2


def test_all_entries_are_announced_and_remembered() -> None:
    place = Place()
    mac = place.nic.mac
    place.guest_sends(gratuitous_arp(mac, IP4), unsolicited_na(OTHER, IP6))
    place.uplink.begin()
    entries = place.uplink.entries()
    assert place.uplink.announce(iter(entries)) == (4, None)
    assert place.sent() == [
        rarp(mac), rarp(OTHER), gratuitous_arp(mac, IP4), unsolicited_na(OTHER, IP6),
    ]  # fmt: skip
    place.clock.advance(1)
    place.uplink.announce(entries)
    assert [place.uplink.host_announced_at(entry) for entry in entries] == [1000.0] * 3
    place.uplink.begin()
    assert [place.uplink.host_announced_at(entry) for entry in entries] == [None] * 3


def test_nothing_to_announce_sends_nothing() -> None:
    place = Place()
    assert place.uplink.announce([]) == (0, None)
    assert place.sent() == []


def test_a_frame_that_fails_costs_no_other() -> None:
    place = Place()
    mac = place.nic.mac
    place.guest_sends(gratuitous_arp(mac, IP4))
    send = place.nic.send_from_host

    def fails(frame: bytes) -> None:
        if frame == rarp(mac):
            raise OSError(105, "No buffer space available")
        send(frame)

    place.nic.send_from_host = fails  # type: ignore[method-assign]
    sent = place.uplink.announce(place.uplink.entries())
    assert (sent.frames, str(sent.error)) == (1, "[Errno 105] No buffer space available")
    assert place.sent() == [gratuitous_arp(mac, IP4)]
    assert place.uplink.host_announced_at(place.uplink.entries()[0]) is None


# --- policy ---------------------------------------------------------------------------------------
def test_the_policy_decides_what_the_host_may_announce() -> None:
    place = Place("192.0.2.0/24")
    mac = place.nic.mac
    place.guest_sends(
        gratuitous_arp(mac, IP4),
        gratuitous_arp(mac, b"\xc6\x33\x64\1", VLAN),
        unsolicited_na(mac, IP6),
    )
    place.uplink.begin()
    entries = place.uplink.entries()
    # The MAC address is announced in each VLAN, the IP addresses where they may be.
    assert [(entry.ip, entry.tags) for entry in entries] == [
        (None, ()), (None, VLAN), (IP4, ()),
    ]  # fmt: skip
    assert place.uplink.missing() == entries
    with place.uplink.observer.book(place.clock.now()) as book:
        known = book.entries()
    place.uplink.announce(known)
    assert place.sent() == [rarp(mac), rarp(mac, VLAN), gratuitous_arp(mac, IP4)]


def test_a_policy_of_mac_addresses_may_forbid_the_nics_own() -> None:
    place = Place(OTHER.hex(":"))
    place.guest_sends(gratuitous_arp(place.nic.mac, IP4))
    assert place.uplink.entries() == []
    place.guest_sends(gratuitous_arp(OTHER, IP4))
    assert [entry.mac for entry in place.uplink.entries()] == [OTHER]


# --- what the driver has set ----------------------------------------------------------------------
def test_entries_follow_the_drivers_filter_and_mac() -> None:
    place = Place()
    mac = place.nic.mac
    assert [(e.mac, e.tags) for e in place.uplink.entries()] == [(mac, ())]
    place.nic.filter.unicast.append(OTHER)
    place.nic.filter.vlans += [0, 100]
    found = [(entry.mac, entry.tags) for entry in place.uplink.entries()]
    assert found == [(mac, ()), (mac, VLAN), (OTHER, ()), (OTHER, VLAN)]
    assert place.uplink.entries()[-1].source is Source.FILTER
    place.nic.mac = changed = b"\x02\0\0\0\0\1"
    place.nic.filter.unicast.clear()
    place.nic.filter.vlans.clear()
    assert [entry.mac for entry in place.uplink.entries()] == [changed]


def test_a_beginning_takes_over_the_filter_and_forgets_what_was_seen() -> None:
    place = Place()
    place.uplink.begin()
    place.guest_sends(gratuitous_arp(place.nic.mac, IP4))
    assert place.uplink.missing() == []
    place.nic.filter.vlans.append(100)
    place.uplink.begin()
    assert [(entry.tags, entry.ip) for entry in place.uplink.missing()] == [
        ((), None), ((), IP4), (VLAN, None),
    ]  # fmt: skip


def test_without_a_watch_nothing_is_missing() -> None:
    place = Place()
    place.uplink.watched = False
    place.uplink.begin()
    assert place.uplink.missing() == []
    assert len(place.uplink.entries()) == 1


def test_a_port_that_nobody_can_be_asked_about_is_ready() -> None:
    port = Place().uplink.port
    port.refresh()
    assert (port.not_ready_reason, port.index, port.bridge) == (None, 0, 0)


# --- what the announcer reports -------------------------------------------------------------------
def test_an_address_is_reported_once() -> None:
    bench = Bench(nic0=True)
    bench.watched()
    bench.guest_sends(gratuitous_arp(bench.nics[0].mac, IP4))
    assert bench.events == []  # no announcement yet
    bench.go(S.RUNNING)
    mac = bench.nics[0].mac
    bench.clock.advance(0.003)
    for _ in range(3):
        bench.guest_sends(gratuitous_arp(mac, IP4))
        bench.guest_sends(unsolicited_na(mac, IP6, VLAN))
        bench.guest_sends(rarp(mac))
    vlans = [{"tpid": TPID_8021Q, "vid": 100}]
    common = {"nic": "nic0", "mac": mac.hex(":"), "ms": 3.0}
    assert bench.data(Event.ANNOUNCE_SEEN) == [
        {**common, "vlans": [], "ip": "192.0.2.7", "kind": Kind.ARP.value},
        {**common, "vlans": vlans, "ip": "2001:db8::7", "kind": Kind.NA.value},
        {**common, "vlans": [], "ip": None, "kind": Kind.RARP.value},
    ]
    bench.announcer.announce_self(AnnounceParameters(rounds=1))
    bench.guest_sends(gratuitous_arp(mac, IP4))
    assert len(bench.data(Event.ANNOUNCE_SEEN)) == 4


def test_a_guest_that_makes_addresses_up_is_reported_up_to_a_limit() -> None:
    bench = Bench(nic0=True)
    bench.watched()
    bench.go(S.RUNNING)
    for number in range(2000):
        address = (0xC0000000 + number).to_bytes(4, "big")
        bench.guest_sends(gratuitous_arp(bench.nics[0].mac, address))
    assert len(bench.data(Event.ANNOUNCE_SEEN)) == 1024


def test_the_hosts_own_frames_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(nic0=False)
    bench.watched()
    monkeypatch.setattr(bench.nics[0], "send_from_host", bench.guest_sends)
    bench.go(S.RUNNING)
    assert bench.data(Event.ANNOUNCE_HOST)[0]["frames"] == 2
    assert bench.data(Event.ANNOUNCE_SEEN) == []


def test_info_of_a_nic_that_never_was_announced() -> None:
    bench = Bench(nic0=True)
    mac = bench.nics[0].mac.hex(":")
    assert bench.announcer.info() == [
        {
            "nic": "nic0", "id": "", "mac": mac, "method": None, "rounds": 0, "asked": 0,
            "acks": 0, "ack-ms": None, "timeouts": 0, "rarp-sent": 0, "host-sent": 0,
            "reports-sent": 0, "host-ms": None, "held": None, "ready-ms": None, "questions": 0,
            "answers": 0,
            "proof": None, "proved-ms": None, "unproved": [], "claims": 0,
            "verified-ms": None, "unverified": [],
            "error": None, "watched": False, "malformed": 0, "quarantined": False, "held-back": 0,
            "addresses": [{"mac": mac, "vlans": [], "ip": None, "seen-ms": None, "host-ms": None}],
        }
    ]  # fmt: skip


def test_info_has_what_guest_and_host_announced() -> None:
    bench = Bench(nic0=True, nic1=True)
    bench.watched()
    mac = bench.nics[0].mac
    bench.guest_sends(unsolicited_na(mac, IP6))
    bench.guest_sends(b"\xff" * 12 + b"\x08\x06")
    port = bench.uplinks[0].port = Port("down")
    bench.go(S.RUNNING)
    bench.clock.advance(1)
    held = bench.announcer.info()[0]
    assert (held["held"], held["ready-ms"], held["rounds"]) == ("down", None, 0)
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    bench.clock.advance(0.003)
    bench.guest_sends(gratuitous_arp(mac, IP4))
    bench.clock.advance(60)
    first, second = bench.announcer.info()
    assert (first["id"], first["method"], first["held"]) == ("migration", "guest", None)
    assert (first["ready-ms"], first["ack-ms"], first["acks"]) == (1000.0, 5.0, 5)
    assert (first["host-ms"], first["watched"], first["malformed"]) == (1105.0, True, 1)
    addresses = {entry["ip"]: entry for entry in first["addresses"]}  # type: ignore
    assert addresses[None]["seen-ms"] == addresses["192.0.2.7"]["seen-ms"] == 1003.0
    assert addresses["192.0.2.7"]["host-ms"] is None
    assert addresses["2001:db8::7"]["seen-ms"] is None
    assert addresses["2001:db8::7"]["host-ms"] == 1105.0
    assert (second["nic"], second["watched"], second["host-sent"]) == ("nic1", False, 0)


def test_the_ids_that_clients_give_are_shown_as_given() -> None:
    bench = Bench(S.PRELAUNCH, nic0=True)
    bench.go(S.RUNNING)
    for name in ("migration", "id:x", ""):
        bench.announcer.announce_self(AnnounceParameters(rounds=1), id=name)
        assert bench.announcer.info()[0]["id"] == name
        assert bench.data(Event.ANNOUNCE_STARTED)[-1]["id"] == name


def test_a_guest_that_stays_after_all_is_announced_where_it_is() -> None:
    bench = Bench(S.PRELAUNCH, nic0=True)
    bench.announcer.returned()
    assert bench.events == []
    bench.go(S.RUNNING)
    bench.announcer.returned()
    assert bench.data(Event.ANNOUNCE_STARTED) == [{"id": "returned", "nics": ["nic0"], "rounds": 5}]
    bench.clock.advance(60)
    assert len(bench.nics[0].asked) == 5
