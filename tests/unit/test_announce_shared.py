"""Multicast memberships, NICs that share an address, and what other hosts claim."""

from __future__ import annotations

import pytest

from announce_bench import (
    GATEWAY,
    IP4,
    STRANGER,
    Bench,
    Port,
    S,
    bench_of,
    reply,
    wanted,
)
from godwit.announce import frames
from godwit.announce.dissect import Kind, Sighting
from godwit.announce.frames import (
    arp_request,
    gratuitous_arp,
    rarp,
)
from godwit.announce.memberships import Memberships, report
from godwit.spec.parameters import Rarp


# --- multicast ------------------------------------------------------------------------------------
def join(bench: Bench) -> bytes:
    mac = bench.nics[0].mac
    record = b"\4\0\0\0" + bytes([239, 1, 2, 3])
    head = bytes.fromhex("46c000280000400001020000") + IP4 + bytes([224, 0, 0, 22])
    body = bytes.fromhex("940400002200000000000001") + record
    frame = frames.ethernet(bytes.fromhex("01005e000016"), mac, (), 0x0800, head + body)
    known = Memberships()
    assert known.learn(frame, None, 0.0)
    bench.guest_sends(frame)
    return report(next(iter(known)))


def test_memberships_are_reported_again_where_the_host_announces() -> None:
    bench = bench_of(accepts=False)
    again = join(bench)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.sent().count(again) == 2


def test_memberships_of_a_mac_address_that_is_elsewhere_are_not_reported() -> None:
    bench = bench_of(accepts=False)
    nic = bench.nics[0]
    own, nic.mac = nic.mac, bytes.fromhex("00005e000107")
    again = join(bench)
    nic.mac = own
    uplink = bench.uplinks[0]
    nic.filter.unicast.append(bytes.fromhex("00005e000107"))
    nic.filter.vlans.append(100)  # where the MAC address may be as well
    uplink.entries()
    uplink.observer.guest_here(True)
    bench.clock.advance(5)
    bench.network_sends(gratuitous_arp(bytes.fromhex("00005e000107"), b"\xc0\0\2\x63"))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert again not in bench.sent()


def test_memberships_are_reported_again_once_the_network_passes_frames() -> None:
    bench = bench_of(accepts=False, ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    again = join(bench)
    bench.go(S.RUNNING)
    bench.clock.advance(10)
    assert bench.sent().count(again) == 2
    bench.network_sends(reply(GATEWAY, to=IP4))
    bench.clock.advance(60)
    assert again in bench.sent()


@pytest.mark.parametrize("shown", [True, False])
def test_memberships_the_guest_does_not_report_are_reported(shown: bool) -> None:
    bench = bench_of()
    mac = bench.nics[0].mac
    again = join(bench)
    bench.clock.advance(1)
    nic = bench.nics[0]

    def during() -> None:
        bench.guest_sends(gratuitous_arp(mac, IP4))
        if shown:
            join(bench)

    nic.during = during
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.sent().count(again) == (0 if shown else 2)


# --- NICs that share an address -------------------------------------------------------------------
class Bond:
    """Two NICs of a guest in one bridge, with one MAC address."""

    def __init__(self, bridges: tuple[int, int] = (3, 3)) -> None:
        self.bench = Bench(nic0=False, nic1=False)
        self.bench.parameters = wanted(rarp=Rarp.ALWAYS)
        first, second = self.bench.nics
        second.mac = first.mac
        self.mac = first.mac
        for uplink, bridge in zip(self.bench.uplinks, bridges, strict=True):
            port = Port()
            port.bridge = bridge
            uplink.port = port
            uplink.watched = True

    def move(self) -> tuple[int, int]:
        self.bench.go(S.RUNNING)
        self.bench.clock.advance(60)
        return len(self.bench.nics[0].sent), len(self.bench.nics[1].sent)


@pytest.mark.parametrize("bridges", [(3, 3), (3, 4), (0, 0)])
@pytest.mark.parametrize("active", [0, 1])
def test_a_bonds_sleeping_nic_says_nothing(active: int, bridges: tuple[int, int]) -> None:
    bond = Bond(bridges)
    bond.bench.guest_sends(gratuitous_arp(bond.mac, IP4), 1 - active)
    bond.bench.clock.advance(5)
    bond.bench.guest_sends(gratuitous_arp(bond.mac, IP4), active)
    markers = [len(uplink.layer2_updates(lambda number: b"", 64)) for uplink in bond.bench.uplinks]
    assert markers[1 - active] == 0
    assert markers[active] == 1
    sent = bond.move()
    assert sent[1 - active] == 0
    assert sent[active] > 0


def test_of_nics_that_were_never_used_the_first_announces() -> None:
    sent = Bond().move()
    assert (sent[0] > 0, sent[1]) == (True, 0)


def test_an_ip_address_on_two_nics_of_one_bridge_is_announced_at_the_later() -> None:
    for bridges, both in (((3, 3), False), ((3, 4), True), ((0, 0), True)):
        bond = Bond(bridges)
        second = bond.bench.nics[1]
        second.mac = b"\x52\x54\0\0\0\x77"
        bond.bench.guest_sends(gratuitous_arp(bond.mac, IP4), 0)
        bond.bench.clock.advance(5)
        bond.bench.guest_sends(gratuitous_arp(second.mac, IP4), 1)
        bond.move()
        assert (gratuitous_arp(bond.mac, IP4) in bond.bench.sent(0)) == both
        assert gratuitous_arp(second.mac, IP4) in bond.bench.sent(1)


def test_what_a_guest_answers_at_another_nic_is_no_claim() -> None:
    """Linux answers for its addresses on each interface in the network (arp_ignore is 0)."""
    bond = Bond()
    bench = bond.bench
    bench.nics[1].mac = second = b"\x52\x54\0\0\0\x77"
    bench.parameters = wanted()
    bench.guest_sends(gratuitous_arp(bond.mac, IP4), 0)
    bench.nics[1].filter.unicast.append(b"\2\0\0\0\0\1")  # a macvlan's there
    bench.uplinks[1].entries()
    bench.listens()
    bench.go(S.RUNNING)
    for mac in (second, b"\2\0\0\0\0\1"):
        bench.network_sends(reply(IP4, mac))
    bench.clock.advance(60)
    assert gratuitous_arp(bond.mac, IP4) in bench.sent(0)
    assert bench.announcer.info()[0]["claims"] == 0


def test_a_guest_that_was_loaded_is_here_before_it_runs() -> None:
    """Another host takes a MAC address of a guest that waits for its operator's cont."""
    bench = Bench(S.INMIGRATE, nic0=False)
    uplink, virtual = bench.uplinks[0], bytes.fromhex("00005e000107")
    with uplink.observer.book(bench.clock.now()) as book:
        book.learn(Sighting(virtual, (), Kind.ARP, IP4, True, None), bench.clock.now() - 10)
    uplink.observer.guest_here(True)
    bench.go(S.PRELAUNCH_MIGRATE)
    bench.network_sends(gratuitous_arp(virtual, b"\xc0\0\2\x63"))
    assert [entry.mac for entry in uplink.entries()] == [bench.nics[0].mac]
    bench.go(S.RUNNING, S.FINISH_MIGRATE)
    with uplink.observer.book(bench.clock.now()) as book:
        book.learn(Sighting(virtual, (), Kind.ARP, IP4, True, None), bench.clock.now())
    bench.clock.advance(5)
    bench.network_sends(gratuitous_arp(virtual, b"\xc0\0\2\x63"))  # itself, at its new host
    assert len(uplink.entries()) == 2


def test_a_guest_that_bridges_two_networks_leaves_their_hosts_their_claims() -> None:
    """Each host of the one network is behind the NIC in the other."""
    bond = Bond((3, 4))
    bench = bond.bench
    bench.nics[1].mac = b"\x52\x54\0\0\0\x77"
    bench.parameters = wanted()
    bench.guest_sends(gratuitous_arp(bond.mac, IP4), 0)
    bench.guest_sends(arp_request(STRANGER, GATEWAY, b"\xc0\0\2\x09"), 1)
    bench.listens()
    bench.go(S.RUNNING)
    bench.network_sends(reply(IP4, STRANGER))
    bench.clock.advance(60)
    assert gratuitous_arp(bond.mac, IP4) not in bench.sent(0)


def test_a_mac_address_that_left_the_guest_claims_like_any_other() -> None:
    bench = bench_of(accepts=False)
    uplink, now = bench.uplinks[0], bench.clock.now
    bench.guest_sends(gratuitous_arp(STRANGER, b"\xc0\0\2\x08"))
    uplink.observer.guest_here(True)
    bench.clock.advance(10)
    bench.network_sends(gratuitous_arp(STRANGER, b"\xc0\0\2\x08"))
    bench.network_sends(gratuitous_arp(STRANGER, IP4))
    assert {entry.ip for entry in uplink.entries()} == {None}, now()


def test_a_frame_on_another_hosts_behalf_shows_where_its_mac_address_is() -> None:
    """VRRP's master may send from its own address for the virtual one."""
    bench = bench_of(accepts=False)
    virtual = bytes.fromhex("00005e000107")
    bench.guest_sends(gratuitous_arp(virtual, b"\xc0\0\2\x08"))
    bench.uplinks[0].observer.guest_here(True)
    bench.clock.advance(10)
    frame = gratuitous_arp(virtual, b"\xc0\0\2\x08")
    bench.network_sends(frame[:6] + STRANGER + frame[12:])
    assert virtual not in {entry.mac for entry in bench.uplinks[0].entries()}


def test_the_hosts_own_frames_that_come_back_are_nobodys() -> None:
    bench = bench_of(accepts=False)
    bench.guest_sends(gratuitous_arp(STRANGER, b"\xc0\0\2\x08"))
    bench.clock.advance(120)
    bench.go(S.RUNNING)
    assert rarp(STRANGER) in bench.sent()
    bench.network_sends(rarp(STRANGER))
    bench.clock.advance(60)
    assert gratuitous_arp(STRANGER, b"\xc0\0\2\x08") in bench.sent()


def test_reports_are_from_nobody_where_the_address_is_anothers() -> None:
    bench = bench_of(accepts=False)
    again = join(bench)
    bench.network_sends(gratuitous_arp(STRANGER, IP4))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    sent = bench.sent()
    assert again not in sent
    reports = [frame for frame in sent if frame[12:14] == b"\x08\0"]
    assert len(reports) == 2
    assert all(IP4 not in frame for frame in reports)
