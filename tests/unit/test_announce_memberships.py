"""Multicast memberships: scapy's reports are understood, and scapy understands ours."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.contrib.igmp import IGMP
from scapy.contrib.igmpv3 import IGMPv3, IGMPv3gr, IGMPv3mr
from scapy.layers.inet import IP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6MLDMultAddrRec,
    ICMPv6MLDone,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    IPv6,
    IPv6ExtHdrHopByHop,
    RouterAlert,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet

from announce_bench import VLAN
from godwit.announce.addresses import AddressBook
from godwit.announce.dissect import Malformed
from godwit.announce.memberships import Membership, Memberships, report
from godwit.announce.saved import MAX_MEMBERSHIPS, MAX_SOURCES, AddressBookState, SavedMembership
from godwit.errors import StreamError
from godwit.spec.saved import decode

TEXT = "52:54:00:12:34:56"
MAC = bytes.fromhex(TEXT.replace(":", ""))
GROUP4, SENDER4 = "239.1.2.3", "192.0.2.7"
GROUP6, SENDER6 = "ff05::1234", "fe80::7"


def ip(text: str) -> bytes:
    import ipaddress

    return ipaddress.ip_address(text).packed


def igmp(message: Packet, dst: str = GROUP4, vlan: int | None = None) -> bytes:
    frame = Ether(src=TEXT, dst="01:00:5e:01:02:03")
    if vlan:
        frame /= Dot1Q(vlan=vlan)
    options = [IPOption_Router_Alert()]
    return bytes(frame / IP(src=SENDER4, dst=dst, ttl=1, options=options) / message)


def mld(message: Packet, dst: str = "ff02::16") -> bytes:
    alert = IPv6ExtHdrHopByHop(options=RouterAlert())
    return bytes(Ether(src=TEXT) / IPv6(src=SENDER6, dst=dst, hlim=1) / alert / message)


def v3(kind: int, *sources: str, group: str = GROUP4) -> bytes:
    records = [IGMPv3gr(rtype=kind, maddr=group, srcaddrs=list(sources))]
    return igmp(IGMPv3mr(records=records), "224.0.0.22")


def v2of6(kind: int, *sources: str) -> bytes:
    record = ICMPv6MLDMultAddrRec(rtype=kind, dst=GROUP6, sources=list(sources))
    return mld(ICMPv6MLReport2(records=[record]))


def learned(*frames: bytes) -> list[Membership]:
    known = Memberships()
    for frame in frames:
        assert known.learn(frame, None, 5.0)
    return list(known)


@pytest.mark.parametrize(
    ("frame", "group", "sender", "version"),
    [
        (igmp(IGMP(type=0x12, gaddr=GROUP4)), GROUP4, SENDER4, 1),
        (igmp(IGMP(type=0x16, gaddr=GROUP4)), GROUP4, SENDER4, 2),
        (v3(4), GROUP4, SENDER4, 3),
        (v3(2), GROUP4, SENDER4, 3),
        (mld(ICMPv6MLReport(mladdr=GROUP6), GROUP6), GROUP6, SENDER6, 1),
        (v2of6(4), GROUP6, SENDER6, 2),
    ],
)
def test_a_report_is_a_membership(frame: bytes, group: str, sender: str, version: int) -> None:
    expected = Membership(MAC, (), ip(sender), ip(group), version, (), 5.0)
    assert learned(frame) == [expected]
    # What the host sends is the same to the guest's side: it is understood again.
    assert learned(report(expected)) == [expected]


def test_what_the_host_sends_is_whole_to_scapy() -> None:
    for frame in (igmp(IGMP(type=0x16, gaddr=GROUP4)), v3(4), v2of6(4)):
        (one,) = learned(frame)
        packet = Ether(report(one))
        for layer in (IP, IGMP, IGMPv3):
            if layer in packet:
                whole = packet.copy()
                del whole[layer].chksum
                assert Ether(bytes(whole))[layer].chksum == packet[layer].chksum
        if IPv6 in packet:
            whole = packet.copy()
            del whole[ICMPv6MLReport2].cksum
            assert Ether(bytes(whole))[ICMPv6MLReport2].cksum == packet[ICMPv6MLReport2].cksum
            assert packet.dst == "33:33:00:00:00:16"
            assert packet[ICMPv6MLReport2].records[0].dst == GROUP6
        else:
            assert packet[IP].ttl == 1
    (one,) = learned(igmp(IGMP(type=0x16, gaddr="239.129.2.3")))
    assert Ether(report(one)).dst == "01:00:5e:01:02:03"


def test_each_network_has_its_own() -> None:
    known = learned(
        igmp(IGMP(type=0x16, gaddr=GROUP4)), igmp(IGMP(type=0x16, gaddr=GROUP4), vlan=100)
    )
    assert [one.tags for one in known] == [(), VLAN]
    assert Ether(report(known[1]))[Dot1Q].vlan == 100


@pytest.mark.parametrize(
    "leave",
    [
        igmp(IGMP(type=0x17, gaddr=GROUP4), "224.0.0.2"),
        v3(3),
    ],
)
def test_a_group_that_was_left_is_not_reported(leave: bytes) -> None:
    assert learned(igmp(IGMP(type=0x16, gaddr=GROUP4)), leave) == []
    assert learned(leave) == []


def test_a_group_of_ipv6_that_was_left_is_not_reported() -> None:
    join = mld(ICMPv6MLReport(mladdr=GROUP6), GROUP6)
    assert learned(join, mld(ICMPv6MLDone(mladdr=GROUP6), "ff02::2")) == []
    assert learned(join, v2of6(3)) == []


def test_sources_come_and_go() -> None:
    one, two = "198.51.100.1", "198.51.100.2"

    def sources(*frames: bytes) -> list[tuple[bytes, ...]]:
        return [membership.sources for membership in learned(*frames)]

    assert sources(v3(3, one)) == [(ip(one),)]
    assert sources(v3(5, one), v3(5, two)) == [(ip(one), ip(two))]
    assert sources(v3(5, one), v3(5, two), v3(6, one)) == [(ip(two),)]
    assert sources(v3(5, one), v3(6, one)) == []
    assert sources(v3(4), v3(6, one)) == [()], "any but one is reported as any"
    many = [f"198.51.100.{number}" for number in range(1, MAX_SOURCES + 2)]
    assert sources(v3(1, *many)) == [()], "too many are reported as any"
    (known,) = learned(v3(3, one, two))
    assert learned(report(known)) == [known]
    source6 = "2001:db8::9"
    (known,) = learned(v2of6(3, source6))
    assert known.sources == (ip(source6),)
    assert learned(report(known)) == [known]


def test_what_was_reported_long_ago_is_forgotten() -> None:
    known = Memberships()
    known.learn(v3(4), None, 5.0)
    known.learn(v2of6(4), None, 7.0)
    known.forget_old(6.0)
    assert len(known) == 1


def test_one_interfaces_leave_is_not_anothers() -> None:
    join = igmp(IGMP(type=0x16, gaddr=GROUP4))
    other = join[:6] + b"\2\0\0\0\0\7" + join[12:]
    leave = igmp(IGMP(type=0x17, gaddr=GROUP4), "224.0.0.2")
    assert [one.mac for one in learned(join, other, leave)] == [b"\2\0\0\0\0\7"]


@pytest.mark.parametrize("odd", ["240.0.0.1", "255.1.1.1"])
def test_what_is_learned_can_migrate(odd: str) -> None:
    book = AddressBook(MAC)
    join = v3(3, odd)
    at = join.index(ip(SENDER4))
    book.memberships.learn(join[:at] + ip(odd) + join[at + 4 :], None, 5.0)
    wire = msgspec.msgpack.encode(book.save(10.0))
    AddressBook(MAC).load(decode(wire, AddressBookState), 100.0)
    with pytest.raises(Malformed):
        Memberships().learn(v3(3, "255.255.255.255"), None, 1.0)


def test_a_guest_that_joins_everything_is_bounded() -> None:
    known = Memberships()
    for number in range(3 * MAX_MEMBERSHIPS):
        group = f"239.1.{number // 250}.{number % 250}"
        known.learn(igmp(IGMP(type=0x16, gaddr=group)), None, float(number))
    assert len(known) == MAX_MEMBERSHIPS


@pytest.mark.parametrize(
    "frame",
    [
        igmp(IGMP(type=0x16, gaddr="192.0.2.1")),  # no group
        v3(4)[:-2],
        v3(9),
        v2of6(4)[:-3],
        igmp(IGMP(type=0x16, gaddr=GROUP4))[:40],
        b"\xff" * 12 + igmp(IGMP(type=0x16, gaddr=GROUP4))[12:],
    ],
)
def test_what_no_honest_host_reports(frame: bytes) -> None:
    known = Memberships()
    with pytest.raises(Malformed):
        known.learn(frame, None, 1.0)
    assert len(known) == 0


@given(st.binary(max_size=120), st.sampled_from([v3(4), v2of6(4), b""]))
def test_anything_may_come(data: bytes, start: bytes) -> None:
    for frame in (start[:30] + data, start[: len(start) // 2] + data, data + start):
        try:
            Memberships().learn(frame, None, 1.0)
        except Malformed:
            pass


# --- the saved state ------------------------------------------------------------------------------
def test_memberships_migrate_with_the_book() -> None:
    book = AddressBook(MAC)
    book.memberships.learn(v3(3, "198.51.100.1"), None, 5.0)
    book.memberships.learn(v2of6(4), None, 6.0)
    there = AddressBook(MAC)
    wire = msgspec.msgpack.encode(book.save(10.0))
    there.load(decode(wire, AddressBookState), 100.0)
    assert [(one.group, one.last_seen) for one in there.memberships] == [
        (ip(GROUP4), 95.0),
        (ip(GROUP6), 96.0),
    ]
    assert [report(one) for one in there.memberships] == [report(one) for one in book.memberships]


def test_memberships_that_are_too_old_do_not_arrive() -> None:
    book = AddressBook(MAC)
    book.memberships.learn(v3(4), None, 5.0)
    book.memberships.learn(v2of6(4), None, 50.0)
    there = AddressBook(MAC, max_age_s=60)
    there.load(book.save(100.0), 1000.0)
    there.forget_old(1000.0)
    assert [one.group for one in there.memberships] == [ip(GROUP6)]


GOOD = SavedMembership(MAC, [], ip(SENDER4), ip(GROUP4), 3, 1.0)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (r"memberships\[0\]\.mac", {"mac": bytes(6)}),
        (r"memberships\[0\]\.group", {"group": ip("192.0.2.1")}),
        ("is not a sender", {"ip": ip(SENDER6)}),
        ("is not a sender", {"ip": ip(GROUP4)}),
        ("is not a sender", {"sources": [ip(SENDER6)]}),
        (">= 1", {"version": 0}),
        ("<= 3", {"version": 4}),
        ("length <= 8", {"sources": [ip("198.51.100.1")] * 9}),
        (">= 0.0", {"age": -1.0}),
    ],
)
def test_a_hostile_state_is_refused(message: str, fields: dict[str, object]) -> None:
    state = AddressBookState([], [], [], [msgspec.structs.replace(GOOD, **fields)])
    with pytest.raises(StreamError, match=message):
        AddressBook(MAC).load(decode(msgspec.msgpack.encode(state), AddressBookState), 1.0)
