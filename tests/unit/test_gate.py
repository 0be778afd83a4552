"""The gate of a copied guest's NIC: what of each kind of frame may leave."""

from __future__ import annotations

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6MLReport2, IPv6
from scapy.layers.l2 import Dot1Q, Ether

from godwit.announce import frames, gate

OLD, OLD_MORE, NEW = (bytes.fromhex(f"52540000000{n}") for n in (1, 2, 9))
OLD4, NEW4, PEER4 = bytes((10, 0, 0, 2)), bytes((10, 0, 0, 77)), bytes((10, 0, 0, 1))
OLD6, NEW6, PEER6 = (bytes.fromhex("fd" + "00" * 14 + n) for n in ("02", "77", "01"))
VLAN = ((0x8100, 100),)
DOUBLE = ((0x88A8, 7), (0x8100, 100))


class Watched:
    """A gate, and what it said."""

    def __init__(self) -> None:
        self.own: list[bytes] = []
        self.now = 1000.0
        self.original = gate.Original((OLD, OLD_MORE), (OLD4, OLD6))
        self.gate = gate.Gate(self.original, self.own.append, lambda: self.now)

    def passes(self, frame: bytes) -> bool:
        return self.gate.passes(frame)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def _ip(mac: bytes, source: str, tag: int | None = None) -> bytes:
    ether = Ether(src=mac.hex(":"), dst="02:00:00:00:00:01")
    layers = ether if tag is None else ether / Dot1Q(vlan=tag)
    kind = IPv6 if ":" in source else IP
    target = "fd00::1" if ":" in source else "10.0.0.1"
    return bytes(layers / kind(src=source, dst=target) / UDP() / b"data")


@pytest.mark.parametrize("tags", [(), VLAN, DOUBLE], ids=["untagged", "vlan", "double"])
@pytest.mark.parametrize("mac", [OLD, OLD_MORE])
def test_nothing_leaves_by_an_old_mac(watched: Watched, mac: bytes, tags: frames.Tags) -> None:
    for frame in (
        frames.rarp(mac, tags),
        frames.gratuitous_arp(mac, NEW4, tags),
        frames.gratuitous_arp(mac, OLD4, tags),
        frames.unsolicited_na(mac, NEW6, tags),
        frames.arp_probe(mac, NEW4, tags),
        frames.solicitation(mac, None, NEW6, tags),
        frames.layer2_update(mac, tags),
    ):
        assert not watched.passes(frame)
    assert watched.gate.held == 7
    assert not watched.gate.open


@pytest.mark.parametrize("tags", [(), VLAN, DOUBLE], ids=["untagged", "vlan", "double"])
def test_nothing_claims_an_old_ip(watched: Watched, tags: frames.Tags) -> None:
    for frame in (
        frames.gratuitous_arp(NEW, OLD4, tags),
        frames.arp_request(NEW, OLD4, PEER4, tags),
        frames.unsolicited_na(NEW, OLD6, tags),
        frames.solicitation(NEW, OLD6, PEER6, tags),
    ):
        assert not watched.passes(frame)
    assert not watched.own


def test_nor_does_data(watched: Watched) -> None:
    assert not watched.passes(_ip(NEW, "10.0.0.2"))
    assert not watched.passes(_ip(NEW, "10.0.0.2", 100))
    assert not watched.passes(_ip(NEW, "fd00::2"))
    assert not watched.passes(_ip(NEW, "fd00::2", 200))


def test_an_old_mac_inside_a_new_ones_frame(watched: Watched) -> None:
    arp = frames.gratuitous_arp(NEW, NEW4).replace(NEW, OLD, 2).replace(OLD, NEW, 1)
    assert arp[6:12] == NEW
    assert OLD in arp[14:]
    assert not watched.passes(arp)
    na = frames.unsolicited_na(NEW, NEW6)
    assert not watched.passes(na[:14] + na[14:].replace(NEW, OLD))
    rarp = frames.rarp(NEW)
    assert not watched.passes(rarp[:14] + rarp[14:].replace(NEW, OLD))


def test_asking_for_an_address_does_not_open(watched: Watched) -> None:
    dhcp = (
        Ether(src=NEW.hex(":"), dst="ff:ff:ff:ff:ff:ff")
        / IP(src="0.0.0.0", dst="255.255.255.255")
        / UDP(sport=68, dport=67)
        / BOOTP(chaddr=NEW)
        / DHCP(options=[("message-type", "discover"), "end"])
    )
    assert watched.passes(bytes(dhcp))
    assert watched.passes(frames.arp_probe(NEW, NEW4))
    assert watched.passes(frames.arp_probe(NEW, OLD4)), "a question, which the original answers"
    assert watched.passes(frames.solicitation(NEW, None, NEW6))
    assert not watched.gate.open


@pytest.mark.parametrize(
    "frame",
    [
        frames.gratuitous_arp(NEW, NEW4),
        frames.unsolicited_na(NEW, NEW6, VLAN),
        _ip(NEW, "10.0.0.77"),
        _ip(NEW, "fd00::77", 100),
    ],
)
def test_an_identity_of_its_own_opens_once(watched: Watched, frame: bytes) -> None:
    assert watched.passes(frame)
    assert watched.passes(frame)
    assert watched.own == [NEW]
    assert watched.gate.open
    assert not watched.passes(frames.gratuitous_arp(NEW, OLD4)), "the old ones stay the original's"
    assert not watched.passes(frames.rarp(OLD))


def test_old_addresses_are_learned_from_what_is_held_back(watched: Watched) -> None:
    silent = bytes((10, 0, 5, 5))
    assert not watched.passes(frames.arp_request(OLD, silent, PEER4, VLAN))
    assert not watched.passes(frames.arp_request(NEW, silent, PEER4, VLAN))
    for number in range(3000):
        ip = bytes((10, 9, number >> 8, number & 255))
        assert not watched.passes(frames.gratuitous_arp(OLD, ip))
    last = bytes((10, 9, 2999 >> 8, 2999 & 255))
    assert watched.passes(frames.gratuitous_arp(NEW, last)), "a bound: the guest chose these"


@pytest.mark.parametrize("length", range(64))
def test_cut_off_frames(watched: Watched, length: int) -> None:
    watched.passes(frames.unsolicited_na(NEW, OLD6, DOUBLE)[:length])
    assert not watched.own
    assert not watched.passes(bytes(12)[:length])
    assert not watched.passes((b"\xff" * 6 + b"\x01" + bytes(5) + b"\x08\x00")[:length])


def test_link_local_is_no_identity(watched: Watched) -> None:
    link = frames.link_local(NEW)
    assert watched.passes(frames.unsolicited_na(NEW, link))
    assert watched.passes(frames.solicitation(NEW, link, PEER6))
    assert watched.passes(frames.gratuitous_arp(NEW, bytes((169, 254, 3, 4))))
    assert not watched.gate.open


def test_a_copy_is_settled_after_a_quiet_minute(watched: Watched) -> None:
    assert not watched.gate.settled
    assert watched.passes(frames.gratuitous_arp(NEW, NEW4))
    assert watched.gate.settled
    assert not watched.passes(frames.gratuitous_arp(NEW, OLD4))
    assert not watched.gate.settled
    watched.now += gate.QUIET_S
    assert watched.gate.settled


def test_gates_of_one_copy_share_what_they_know(watched: Watched) -> None:
    other = gate.Gate(watched.original, lambda mac: None, lambda: 0.0)
    third = bytes((10, 0, 7, 7))
    assert not other.passes(frames.gratuitous_arp(OLD, third))
    assert not watched.passes(frames.gratuitous_arp(NEW, third))


def test_a_copy_talks_to_its_original(watched: Watched) -> None:
    reply = frames.ethernet(OLD, NEW, (), 0x0806, _arp_reply(NEW, NEW4, OLD, OLD4))
    assert watched.passes(reply)
    assert watched.passes(_ip(NEW, "10.0.0.77"))
    assert watched.passes(frames.solicitation(NEW, NEW6, OLD6, VLAN))


def _arp_reply(sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    return bytes.fromhex("0001080006040002") + sha + spa + tha + tpa


def _behind(frame: bytes, kind: int, length: int = 0) -> bytes:
    """The IPv6 packet of an untagged frame, behind an extension header."""
    at = 14
    size = int.from_bytes(frame[at + 4 : at + 6], "big") + 8 * (length + 1)
    head = frame[: at + 4] + size.to_bytes(2, "big") + bytes((kind,)) + frame[at + 7 : at + 40]
    return head + bytes((frame[at + 6], length)) + bytes(6 + 8 * length) + frame[at + 40 :]


@pytest.mark.parametrize("kind", [0, 43, 60])
def test_an_advertisement_does_not_hide(watched: Watched, kind: int) -> None:
    assert not watched.passes(_behind(frames.unsolicited_na(NEW, OLD6), kind))
    assert not watched.passes(_behind(frames.unsolicited_na(NEW, OLD6), kind, 3))
    assert not watched.passes(_behind(_behind(frames.unsolicited_na(NEW, OLD6), kind), 0))
    assert not watched.passes(_behind(frames.unsolicited_na(NEW, NEW6), kind)), "nobody sends that"
    report = bytes(Ether(src=NEW.hex(":")) / IPv6(src="::", dst="ff02::16") / ICMPv6MLReport2())
    assert watched.passes(_behind(report, 0))


def test_an_option_far_behind(watched: Watched) -> None:
    na = frames.unsolicited_na(NEW, NEW6)
    nonces = bytes((14, 1, *range(6))) * 60
    longer = na[:18] + (len(na) - 54 + 480 + 8).to_bytes(2, "big") + na[20:78]
    assert not watched.passes(longer + nonces + bytes((2, 1)) + OLD)


@pytest.mark.parametrize(
    ("frame", "good", "bad"),
    [
        (_ip(NEW, "10.0.0.77"), 14 + 20 + 6, 14 + 12),
        (_ip(NEW, "10.0.0.77", 100), 18 + 20 + 6, 18 + 14),
        (_ip(NEW, "fd00::77"), 14 + 40 + 6, 14 + 22),
        (frames.gratuitous_arp(NEW, NEW4), None, 28),
        (frames.unsolicited_na(NEW, NEW6), None, 14 + 40 + 8 + 14),
    ],
)
def test_a_checksum_is_not_stored_into_an_address(
    watched: Watched, frame: bytes, good: int | None, bad: int
) -> None:
    """The tap's header has the kernel store two bytes of the guest's making after the look."""
    assert watched.gate.passes(frame, good)
    assert not watched.gate.passes(frame, bad)
    assert not watched.gate.passes(frame, 6)
