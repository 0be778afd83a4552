"""The frames, judged by scapy: the same bytes, and the same meaning."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    in6_chksum,
)
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q, Dot3, Ether
from scapy.packet import Packet, Padding
from scapy.utils6 import in6_getnsma, in6_getnsmac

from godwit.announce.dissect import Kind, dissect
from godwit.announce.frames import (
    arp_request,
    gratuitous_arp,
    layer2_update,
    rarp,
    read_cookie,
    solicitation,
    stack_of,
    unsolicited_na,
)
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q

MAC = bytes.fromhex("525400123456")
MAC_TEXT = "52:54:00:12:34:56"
IP4 = bytes([192, 0, 2, 7])
IP6 = bytes.fromhex("20010db8000000000000000000000007")

macs = st.binary(min_size=6, max_size=6)
tag_stacks = st.lists(
    st.tuples(st.sampled_from([TPID_8021Q, TPID_8021AD]), st.integers(1, 4094)), max_size=3
)


def _text(mac: bytes) -> str:
    return mac.hex(":")


def _judge(
    dst: str, src: bytes, tags: list[tuple[int, int]], ethertype: int, body: Packet
) -> bytes:
    """Return scapy's frame, with tags and type given one by one, padded as if untagged."""
    types = [tpid for tpid, _ in tags] + [ethertype]
    frame: Packet = Ether(dst=dst, src=_text(src), type=types[0])
    for (tpid, vid), following in zip(tags, types[1:], strict=True):
        layer = Dot1AD if tpid == TPID_8021AD else Dot1Q
        frame = frame / layer(prio=0, vlan=vid, type=following)
    data = bytes(frame / body)
    return data + b"\0" * max(0, 60 + 4 * len(tags) - len(data))


@given(macs, tag_stacks)
def test_rarp(mac: bytes, tags: list[tuple[int, int]]) -> None:
    body = ARP(
        hwtype=1, ptype=0x0800, hwlen=6, plen=4, op=3,
        hwsrc=_text(mac), psrc="0.0.0.0", hwdst=_text(mac), pdst="0.0.0.0",
    )  # fmt: skip
    assert rarp(mac, tags) == _judge("ff:ff:ff:ff:ff:ff", mac, tags, 0x8035, body)


def test_rarp_is_what_qemu_sends() -> None:
    # net/announce.c, announce_self_create, written out by hand.
    expected = (
        "ffffffffffff" + MAC.hex() + "8035"
        "0001" "0800" "06" "04" "0003" + MAC.hex() + "00000000" + MAC.hex() + "00000000"
    ) + "00" * 18  # fmt: skip
    assert rarp(MAC).hex() == expected
    assert len(rarp(MAC)) == 60


@given(macs, st.ip_addresses(v=4), tag_stacks)
def test_gratuitous_arp(mac: bytes, ip: object, tags: list[tuple[int, int]]) -> None:
    body = ARP(op=1, hwsrc=_text(mac), psrc=str(ip), hwdst="00:00:00:00:00:00", pdst=str(ip))
    frame = gratuitous_arp(mac, ip.packed, tags)  # type: ignore[attr-defined]
    assert frame == _judge("ff:ff:ff:ff:ff:ff", mac, tags, 0x0806, body)


@given(macs, st.ip_addresses(v=6), tag_stacks)
def test_unsolicited_na(mac: bytes, ip: object, tags: list[tuple[int, int]]) -> None:
    body = (
        IPv6(src=str(ip), dst="ff02::1", hlim=255)
        / ICMPv6ND_NA(R=0, S=0, O=1, tgt=str(ip))
        / ICMPv6NDOptDstLLAddr(lladdr=_text(mac))
    )
    frame = unsolicited_na(mac, ip.packed, tags)  # type: ignore[attr-defined]
    assert frame == _judge("33:33:00:00:00:01", mac, tags, 0x86DD, body)


@given(macs, st.ip_addresses(v=4), st.ip_addresses(v=4), tag_stacks)
def test_arp_request(mac: bytes, ip: object, target: object, tags: list[tuple[int, int]]) -> None:
    body = ARP(op=1, hwsrc=_text(mac), psrc=str(ip), hwdst="00:00:00:00:00:00", pdst=str(target))
    frame = arp_request(mac, ip.packed, target.packed, tags)  # type: ignore[attr-defined]
    assert frame == _judge("ff:ff:ff:ff:ff:ff", mac, tags, 0x0806, body)


@given(macs, st.ip_addresses(v=6), st.ip_addresses(v=6), tag_stacks)
def test_solicitation(mac: bytes, ip: object, target: object, tags: list[tuple[int, int]]) -> None:
    raw: bytes = target.packed  # type: ignore[attr-defined]
    group = in6_getnsma(raw)
    body = (
        IPv6(src=str(ip), dst=socket.inet_ntop(socket.AF_INET6, group), hlim=255)
        / ICMPv6ND_NS(tgt=str(target))
        / ICMPv6NDOptSrcLLAddr(lladdr=_text(mac))
    )
    frame = solicitation(mac, ip.packed, raw, tags)  # type: ignore[attr-defined]
    assert frame == _judge(in6_getnsmac(group), mac, tags, 0x86DD, body)


def test_the_questions_bind_and_do_not_announce() -> None:
    tags = ((TPID_8021AD, 10), (TPID_8021Q, 200))
    for frame, kind, ip in (
        (arp_request(MAC, IP4, bytes([192, 0, 2, 1]), tags), Kind.ARP, IP4),
        (solicitation(MAC, IP6, IP6[:15] + b"\1", tags), Kind.NS, IP6),
    ):
        found = dissect(frame)
        assert found is not None
        assert (found.mac, found.kind, found.ip, found.tags) == (MAC, kind, ip, tags)
        assert not found.announces
        assert found.peer == ip[:-1] + b"\1"


def test_the_nas_checksum_is_right_to_a_receiver() -> None:
    ip = Ether(unsolicited_na(MAC, IP6))[IPv6]
    # A sum over a message that holds its own checksum comes to zero.
    assert in6_chksum(58, ip, bytes(ip.payload)) in (0, 0xFFFF)
    assert (ip.hlim, ip.plen, ip[ICMPv6ND_NA].tgt) == (255, 32, "2001:db8::7")


def test_a_receiver_reads_the_tags_from_the_outside_in() -> None:
    frame = Ether(gratuitous_arp(MAC, IP4, ((TPID_8021AD, 10), (TPID_8021Q, 200))))
    assert (frame.type, frame[Dot1AD].vlan, frame[Dot1AD].type) == (0x88A8, 10, 0x8100)
    assert (frame[Dot1Q].vlan, frame[ARP].psrc, frame[ARP].hwsrc) == (200, "192.0.2.7", MAC_TEXT)
    assert len(frame) == 68
    assert set(frame[Padding].load) == {0}


@pytest.mark.parametrize("vid", [-1, 0, 4095, 4096])
def test_a_vlan_that_does_not_exist_is_refused(vid: int) -> None:
    with pytest.raises(ValueError, match=f"VLAN id {vid} "):
        rarp(MAC, ((TPID_8021Q, vid),))


def test_wrong_lengths_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="MAC address"):
        rarp(MAC[:5])
    with pytest.raises(ValueError, match="MAC address"):
        unsolicited_na(MAC + b"\0", IP6)
    with pytest.raises(ValueError, match="IPv4 address"):
        gratuitous_arp(MAC, IP6)
    with pytest.raises(ValueError, match="IPv6 address"):
        unsolicited_na(MAC, IP4)
    for ip, target in ((IP6, IP4), (IP4, IP6)):
        with pytest.raises(ValueError, match="IPv4 address"):
            arp_request(MAC, ip, target)
        with pytest.raises(ValueError, match="IPv6 address"):
            solicitation(MAC, ip, target)
    with pytest.raises(ValueError, match="MAC address"):
        arp_request(MAC[:5], IP4, IP4)
    with pytest.raises(ValueError, match="MAC address"):
        solicitation(MAC[:5], IP6, IP6)
    with pytest.raises(ValueError, match="0x5dc is not an ethertype"):
        rarp(MAC, ((1500, 7),))


# --- layer 2 updates ------------------------------------------------------------------------------
def test_a_layer2_update_is_an_xid_that_nobody_answers() -> None:
    frame = Dot3(layer2_update(MAC, (), b"cookie"))
    assert (frame.dst, frame.src, frame.len) == ("ff:ff:ff:ff:ff:ff", MAC_TEXT, 6)
    # IEEE 802.2: null SAPs, the source's with the response bit; XID with its final bit clear.
    assert (frame[LLC].dsap, frame[LLC].ssap, frame[LLC].ctrl) == (0, 1, 0xAF)
    assert bytes(frame[LLC].payload)[:3] == b"\x81\1\0"
    assert len(layer2_update(MAC, (), bytes(40))) == 60


@given(macs, tag_stacks, st.binary(max_size=40))
def test_the_cookie_and_the_tags_of_a_layer2_update_are_found(
    mac: bytes, tags: list[tuple[int, int]], cookie: bytes
) -> None:
    frame = layer2_update(mac, tags, cookie)
    assert read_cookie(frame) == cookie.ljust(40, b"\0")
    assert stack_of(frame) == b"".join(struct.pack("!HH", *tag) for tag in tags)
    if len(tags) < 3:
        assert dissect(frame) is None


@given(st.binary(max_size=80))
def test_no_other_frame_has_a_cookie(data: bytes) -> None:
    assert read_cookie(data) is None
    assert read_cookie(b"\xff" * 6 + data[6:]) is None or data[12:14] == b"\0\6"


def test_a_cookie_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="41 bytes: use at most 40"):
        layer2_update(MAC, (), bytes(41))
