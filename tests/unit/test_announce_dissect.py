"""The dissection of a guest's frames, which scapy has written."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptMTU,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from godwit.announce.dissect import (
    Kind,
    Malformed,
    Sighting,
    dissect,
    is_host_ip,
    is_host_mac,
    tags_of,
)
from godwit.announce.frames import ethernet, gratuitous_arp, rarp, unsolicited_na
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q

MAC = bytes.fromhex("525400123456")
TEXT = "52:54:00:12:34:56"
OTHER = "52:54:00:aa:bb:cc"
IP4, PEER4 = bytes([192, 0, 2, 7]), bytes([192, 0, 2, 1])
IP6, PEER6 = bytes.fromhex("20010db8" + "00" * 11 + "07"), bytes.fromhex("fe80" + "00" * 13 + "01")
IP6_TEXT, PEER6_TEXT = "2001:db8::7", "fe80::1"
ALL = "ff:ff:ff:ff:ff:ff"

LINK_LOCAL = bytes.fromhex("fe80" + "00" * 13 + "07")
tag_stacks = st.lists(
    st.tuples(st.sampled_from([TPID_8021Q, TPID_8021AD]), st.integers(1, 4094)), max_size=2
).map(tuple)
macs = st.binary(min_size=6, max_size=6).filter(is_host_mac)
ip4s = st.ip_addresses(v=4).map(lambda ip: ip.packed).filter(is_host_ip)
ip6s = st.ip_addresses(v=6).map(lambda ip: ip.packed).filter(is_host_ip)


def arp(dst: str = ALL, src: str = TEXT, **fields: object) -> bytes:
    values = {"op": 1, "hwsrc": TEXT, "psrc": "192.0.2.7", "pdst": "192.0.2.1", **fields}
    return bytes(Ether(dst=dst, src=src) / ARP(**values))


def na(
    dst: str = "ff02::1", *, s: int = 0, r: int = 0, lladdr: str | None = TEXT, **fields: object
) -> bytes:
    ip = IPv6(**{"src": IP6_TEXT, "hlim": 255, **fields}, dst=dst)
    message = ip / ICMPv6ND_NA(R=r, S=s, O=1, tgt=IP6_TEXT)
    if lladdr:
        message /= ICMPv6NDOptDstLLAddr(lladdr=lladdr)
    to = "33:33:00:00:00:01" if dst.startswith("ff") else OTHER
    return bytes(Ether(dst=to, src=TEXT) / message)


def ra(lifetime: int = 1800, lladdr: str = TEXT) -> bytes:
    message = IPv6(src="fe80::7", dst="ff02::1", hlim=255) / ICMPv6ND_RA(routerlifetime=lifetime)
    message /= ICMPv6NDOptSrcLLAddr(lladdr=lladdr)
    return bytes(Ether(dst="33:33:00:00:00:01", src=TEXT) / message)


def ns(src: str = IP6_TEXT, dst: str = "ff02::1:ff00:1", tgt: str = PEER6_TEXT, **fields) -> bytes:
    message = IPv6(**{"hlim": 255, **fields}, src=src, dst=dst) / ICMPv6ND_NS(tgt=tgt)
    if src != "::":
        message /= ICMPv6NDOptSrcLLAddr(lladdr=TEXT)
    return bytes(Ether(dst="33:33:ff:00:00:01", src=TEXT) / message)


def sighting(
    kind: Kind,
    ip: bytes | None,
    announces: bool,
    peer: bytes | None = None,
    router: bool | None = None,
    answers: bool = False,
) -> Sighting:
    if kind is Kind.NA and router is None:
        router = False
    return Sighting(MAC, (), kind, ip, announces, peer, router, answers)


VALID = {
    "request": (arp(), sighting(Kind.ARP, IP4, False, PEER4)),
    "reply": (
        arp(OTHER, op=2, hwdst=OTHER),
        sighting(Kind.ARP, IP4, False, PEER4, answers=True),
    ),
    "answer to a probe": (
        arp(OTHER, op=2, pdst="0.0.0.0"),
        sighting(Kind.ARP, IP4, False, answers=True),
    ),
    "gratuitous request": (arp(pdst="192.0.2.7"), sighting(Kind.ARP, IP4, True)),
    "gratuitous reply": (
        arp(op=2, pdst="192.0.2.7", hwdst=ALL),
        sighting(Kind.ARP, IP4, True),
    ),
    "gratuitous, to one": (arp(OTHER, pdst="192.0.2.7"), sighting(Kind.ARP, IP4, False)),
    "probe": (arp(psrc="0.0.0.0"), sighting(Kind.ARP, None, False)),
    "RARP": (
        bytes(Ether(dst=ALL, src=TEXT, type=0x8035) / ARP(op=3, hwsrc=TEXT, hwdst=TEXT)),
        sighting(Kind.RARP, None, True),
    ),
    "RARP for another": (
        bytes(Ether(dst=ALL, src=TEXT, type=0x8035) / ARP(op=3, hwsrc=TEXT, hwdst=OTHER)),
        sighting(Kind.RARP, None, False),
    ),
    "unsolicited NA": (na(), sighting(Kind.NA, IP6, True)),
    "gratuitous NA to routers (RFC 9131)": (na("ff02::2"), sighting(Kind.NA, IP6, True)),
    "solicited NA": (na(PEER6_TEXT, s=1), sighting(Kind.NA, IP6, False, PEER6, answers=True)),
    "NA to one": (na(PEER6_TEXT), sighting(Kind.NA, IP6, False, PEER6, answers=True)),
    "NA without address": (na(lladdr=None), sighting(Kind.NA, IP6, False)),
    "NA of a router": (na(r=1), sighting(Kind.NA, IP6, True, router=True)),
    "RA": (ra(), sighting(Kind.RA, LINK_LOCAL, False, router=True)),
    "RA of no default router": (ra(0), sighting(Kind.RA, LINK_LOCAL, False)),
    "NS": (ns(), sighting(Kind.NS, IP6, False, PEER6)),
    "NS for DAD": (ns("::"), sighting(Kind.NS, None, False)),
}


@pytest.mark.parametrize("name", VALID)
def test_what_a_frame_shows(name: str) -> None:
    frame, expected = VALID[name]
    assert dissect(frame) == expected
    assert dissect(memoryview(frame)) == expected
    assert dissect(frame + bytes(30)) == expected, "padding is no matter"


@pytest.mark.parametrize("name", VALID)
def test_a_frame_that_is_cut_off_is_malformed(name: str) -> None:
    frame, _ = VALID[name]
    for length in range(len(frame)):
        with pytest.raises(Malformed):
            dissect(frame[:length])


@given(macs, ip4s, ip6s, tag_stacks)
def test_what_the_host_sends_is_an_announcement(
    mac: bytes, ip4: bytes, ip6: bytes, tags: tuple[tuple[int, int], ...]
) -> None:
    for frame, kind, ip in (
        (rarp(mac, tags), Kind.RARP, None),
        (gratuitous_arp(mac, ip4, tags), Kind.ARP, ip4),
        (unsolicited_na(mac, ip6, tags), Kind.NA, ip6),
        (unsolicited_na(mac, ip6, tags, router=True), Kind.NA, ip6),
    ):
        router = None if kind is not Kind.NA else bool(frame[58 + 4 * len(tags)] & 0x80)
        expected = Sighting(mac, tags, kind, ip, True, None, router)
        assert dissect(frame) == expected
        if tags:  # as the kernel hands it over
            assert dissect(frame[:12] + frame[16:], tags[0]) == expected


@given(tag_stacks, st.integers(0, 7))
def test_tags_as_scapy_writes_them(tags: tuple[tuple[int, int], ...], priority: int) -> None:
    frame: Packet = Ether(dst=ALL, src=TEXT)
    for tpid, vid in tags:
        if tpid == TPID_8021AD:
            frame.type = TPID_8021AD
        frame /= (Dot1AD if tpid == TPID_8021AD else Dot1Q)(vlan=vid, prio=priority)
    if len(tags) == 2:
        frame.getlayer(1).type = tags[1][0]
    frame.lastlayer().type = 0x0806
    frame /= ARP(op=1, hwsrc=TEXT, psrc="192.0.2.7", pdst="192.0.2.7")
    if tags:
        frame.type = tags[0][0]
    assert dissect(bytes(frame)) == Sighting(MAC, tags, Kind.ARP, IP4, True, None)


def test_a_priority_tag_is_no_tag() -> None:
    frame = arp(pdst="192.0.2.7")
    tagged = frame[:12] + bytes.fromhex("8100e000") + frame[12:]
    for seen in (
        dissect(frame, (TPID_8021Q, 0)),
        dissect(tagged),
        dissect(tagged, (TPID_8021AD, 0)),
    ):
        assert seen is not None
        assert seen.tags == ()
    seen = dissect(tagged, (TPID_8021AD, 10))
    assert seen is not None
    assert seen.tags == ((TPID_8021AD, 10),)


def test_three_tags_are_malformed() -> None:
    tags = ((TPID_8021AD, 1), (TPID_8021Q, 2), (TPID_8021Q, 3))
    frame = rarp(MAC, tags)
    with pytest.raises(Malformed, match="more than 2"):
        dissect(frame)
    with pytest.raises(Malformed, match="more than 2"):
        dissect(frame[:12] + frame[16:], tags[0])


def test_the_reserved_vlan_is_malformed() -> None:
    with pytest.raises(Malformed, match="4095"):
        dissect(arp(), (TPID_8021Q, 4095))


def _patched(frame: bytes, at: int, value: bytes) -> bytes:
    return frame[:at] + value + frame[at + len(value) :]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (arp(hwsrc=OTHER), "not the frame's source"),
        (arp(src=OTHER), "not the frame's source"),
        (arp(src="33:33:00:00:00:01", hwsrc="33:33:00:00:00:01"), "multicast or null"),
        (arp(src=ALL, hwsrc=ALL), "multicast or null"),
        (arp(src="00:00:00:00:00:00", hwsrc="00:00:00:00:00:00"), "multicast or null"),
        (_patched(arp(), 18, b"\x08"), "not Ethernet"),
        (_patched(arp(), 19, b"\x10"), "not IPv4"),
        (_patched(arp(), 14, b"\0\x06"), "not Ethernet"),
        (_patched(arp(), 16, b"\x86\xdd"), "not IPv4"),
        (arp(psrc="224.0.0.1"), "not a host's"),
        (arp(psrc="255.255.255.255"), "not a host's"),
        (arp(psrc="127.0.0.1"), "not a host's"),
        (arp(psrc="0.0.0.9"), "not a host's"),
        (na(hlim=254), "hop limit"),
        (ns(hlim=1), "hop limit"),
        (na(lladdr=OTHER), "link-layer"),
        (na(s=1), "solicited, and to many"),
        (na(src="::"), "NA: the sender"),
        (na(src="ff02::1"), "NA: the sender"),
        (na(plen=23), "bad length"),
        (na(plen=33), "truncated"),
        (na(plen=31), "option length"),
        (_patched(na(), 14 + 40 + 25, b"\0"), "option length"),
        (_patched(na(), 14 + 40 + 25, b"\2"), "option length"),
        (_patched(na(), 14 + 40 + 1, b"\1"), "code"),
        (_patched(na(), 14 + 40 + 8, b"\xff"), "the target"),
        (_patched(na(), 14 + 40 + 8, bytes(16)), "the target"),
        (_patched(na(), 14, b"\x40"), "another version"),
        (ns("::1"), "NS: the sender"),
        (ns("::", "ff02::1"), "duplicate address"),
        (ns("::", PEER6_TEXT), "duplicate address"),
    ],
)
def test_what_no_honest_host_sends(frame: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        dissect(frame)


def test_other_options_are_passed_over() -> None:
    frame = bytes(
        Ether(src=TEXT, dst="33:33:00:00:00:01")
        / IPv6(src=IP6_TEXT, dst="ff02::1", hlim=255)
        / ICMPv6ND_NA(R=0, S=0, O=1, tgt=IP6_TEXT)
        / ICMPv6NDOptMTU()
        / ICMPv6NDOptDstLLAddr(lladdr=TEXT)
    )
    assert dissect(frame) == sighting(Kind.NA, IP6, True)


@pytest.mark.parametrize(
    "frame",
    [
        Ether(src=TEXT, dst=OTHER) / IP() / UDP(),
        Ether(src=TEXT, dst=OTHER) / IP() / ICMP(),
        Ether(src=TEXT, dst=OTHER) / IPv6(hlim=1) / ICMPv6EchoRequest(),
        Ether(src=TEXT, dst=OTHER) / IPv6(hlim=255) / IPv6ExtHdrHopByHop() / ICMPv6ND_NA(),
        Ether(src=TEXT, dst=OTHER, type=0x88CC) / Raw(b"lldp"),
        Ether(src=TEXT, dst=OTHER) / Dot1Q(vlan=7) / IP() / UDP(),
        Ether(src=TEXT, dst=OTHER) / ARP(op=8, hwsrc=OTHER),  # inverse ARP
        Ether(src=TEXT, dst=OTHER, type=0x8035) / ARP(op=1),
    ],
)
def test_other_frames_are_none_of_ours(frame: Packet) -> None:
    assert dissect(bytes(frame)) is None


_heads = st.sampled_from(
    [b"", *(frame[:20] for frame, _ in VALID.values()), *(frame for frame, _ in VALID.values())]
)
_outer = st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 4095))


def _only_malformed(frame: bytes, outer: tuple[int, int] | None) -> None:
    try:
        seen = dissect(frame, outer)
    except Malformed:
        return
    if seen is not None:
        assert is_host_mac(seen.mac)
        assert seen.mac == frame[6:12]
        assert len(seen.tags) <= 2
        assert all(1 <= vid <= 4094 for _, vid in seen.tags)
        assert seen.ip is None or is_host_ip(seen.ip)
        assert seen.peer is None or (seen.ip is not None and len(seen.peer) == len(seen.ip))


@given(_heads, st.binary(max_size=128), _outer)
@example(b"", b"", None)
def test_arbitrary_bytes_raise_nothing_else(
    head: bytes, rest: bytes, outer: tuple[int, int] | None
) -> None:
    _only_malformed(head + rest, outer)


@given(st.sampled_from(list(VALID)), st.data())
def test_changed_frames_raise_nothing_else(name: str, data: st.DataObject) -> None:
    frame = bytearray(VALID[name][0])
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    _only_malformed(bytes(frame), None)


# --- frames of others -----------------------------------------------------------------------------
def test_others_frames_show_the_sender_within() -> None:
    """A frame sent on another's behalf: by VRRP, or by a proxy."""
    theirs = bytes.fromhex(OTHER.replace(":", ""))
    for frame in (arp(hwsrc=OTHER), na(lladdr=OTHER), ra(lladdr=OTHER)):
        with pytest.raises(Malformed):
            dissect(frame)
        seen = dissect(frame, own=False)
        assert seen is not None
        assert seen.mac == theirs
    for frame in (arp(hwsrc=ALL), na(lladdr="33:33:00:00:00:01")):
        with pytest.raises(Malformed, match="sender"):
            dissect(frame, own=False)


@pytest.mark.parametrize("name", VALID)
def test_honest_frames_show_the_same_whoever_sends(name: str) -> None:
    frame, expected = VALID[name]
    assert dissect(frame, own=False) == expected


@given(tag_stacks)
def test_tags_are_read_of_any_frame(tags: tuple[tuple[int, int], ...]) -> None:
    frame = ethernet(b"\xff" * 6, MAC, tags, 0x88CC, b"lldp")
    assert tags_of(frame) == tags
    if tags:
        assert tags_of(frame[:12] + frame[16:], tags[0]) == tags
    with pytest.raises(Malformed):
        tags_of(frame[:12])
