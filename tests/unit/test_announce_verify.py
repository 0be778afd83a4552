"""Verification: the bridge's database, the peers' answers, and what the guest gets of those."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from announce_bench import GATEWAY, IP4, IP6, VLAN, Nic, Port
from godwit.announce import frames
from godwit.announce.frames import Tag, arp_probe, arp_request, gratuitous_arp, solicitation
from godwit.announce.policy import parse_policy
from godwit.announce.uplink import Uplink
from godwit.announce.verify import PEERS_ASKED, Verification
from godwit.host.net import rtnetlink
from godwit.host.net.ethernet import TPID_8021Q
from godwit.host.net.rtnetlink import Forwarding
from godwit.spec.parameters import Verify
from tests.fakes.clock import FakeClock

OTHER, PEER = bytes.fromhex("5254000000aa"), bytes.fromhex("5254000000bb")
GATEWAY6 = bytes.fromhex("20010db8" + "00" * 11 + "01")


def reply(mac: bytes, ip: bytes, tags: tuple[Tag, ...] = ()) -> bytes:
    """Return an ARP reply of ``ip`` to the guest."""
    return frames.ethernet(
        b"\x52\x54\0\0\0\x30", mac, tags, 0x0806, frames._arp(2, mac, ip, OTHER, IP4)
    )


def advertisement(
    mac: bytes, ip: bytes, tags: tuple[Tag, ...] = (), flags: int = 0x6000_0000
) -> bytes:
    """Return a solicited neighbour advertisement of ``ip`` to the guest."""
    body = flags.to_bytes(4, "big") + ip + b"\2\1" + mac
    packet = frames._icmpv6(ip, IP6, 136, body)
    return frames.ethernet(b"\x52\x54\0\0\0\x30", mac, tags, 0x86DD, packet)


class Place:
    def __init__(self, how: Verify = Verify.PROBE, refresh: bool = False, allow: str = "") -> None:
        self.clock = FakeClock()
        self.nic = Nic(self.clock)
        self.uplink = Uplink(self.nic, self.clock, parse_policy(allow) if allow else None)
        self.port = self.uplink.port = Port()
        self.injected: list[bytes] = []
        self.verification = Verification(
            self.uplink, how, self.injected.append if refresh else None
        )

    @property
    def mac(self) -> bytes:
        return self.nic.mac

    def guest_sends(self, *sent: bytes) -> None:
        for frame in sent:
            self.uplink.observer.frame(frame, None, self.clock.now())

    def talks(self) -> None:
        """Have the guest ask its gateway, untagged in both families and in a VLAN."""
        self.guest_sends(
            arp_request(self.mac, IP4, GATEWAY),
            arp_request(self.mac, IP4, GATEWAY, VLAN),
            solicitation(self.mac, IP6, GATEWAY6),
        )

    def sent(self) -> list[bytes]:
        return [frame for _, frame in self.nic.sent]


# --- fdb ------------------------------------------------------------------------------------------
def bridge(monkeypatch: pytest.MonkeyPatch, *known: Forwarding) -> list[int]:
    asked: list[int] = []

    def forwarding(index: int) -> list[Forwarding]:
        asked.append(index)
        return list(known)

    monkeypatch.setattr(rtnetlink, "forwarding", forwarding)
    return asked


def test_each_address_has_to_be_at_the_tap_in_its_vlan(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Verify.FDB)
    place.guest_sends(
        gratuitous_arp(place.mac, IP4, VLAN),
        gratuitous_arp(OTHER, b"\xc0\0\2\x09", VLAN),
    )
    mac, other = place.mac.hex(":"), OTHER.hex(":")
    asked = bridge(monkeypatch)
    assert place.verification.wanted
    assert place.verification.missing() == [mac, f"{mac} in VLAN 100", f"{other} in VLAN 100"]
    assert (asked, place.port.refreshes) == ([3], 1)
    # Untagged is whatever the port's own VLAN is; another port, another VLAN: elsewhere.
    bridge(
        monkeypatch,
        Forwarding(place.mac, 1, 5),
        Forwarding(OTHER, 100, 4),
        Forwarding(OTHER, 200, 5),
    )
    assert place.verification.missing() == [f"{mac} in VLAN 100", f"{other} in VLAN 100"]
    bridge(
        monkeypatch,
        Forwarding(place.mac, 1, 5),
        Forwarding(place.mac, 100, 5),
        Forwarding(OTHER, 100, 5),
    )
    assert place.verification.missing() == []
    assert place.nic.sent == []


def test_a_tagged_address_does_not_stand_for_the_untagged_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place(Verify.FDB)
    place.guest_sends(gratuitous_arp(place.mac, IP4, VLAN))
    # Untagged, the bridge still has it at its old place.
    bridge(monkeypatch, Forwarding(place.mac, 100, 5), Forwarding(place.mac, 1, 4))
    assert place.verification.missing() == [place.mac.hex(":")]


def test_a_bridge_without_vlans_has_all_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Verify.FDB)
    place.guest_sends(gratuitous_arp(place.mac, IP4, VLAN))
    bridge(monkeypatch, Forwarding(place.mac, 0, 5))
    assert place.verification.missing() == []


def test_an_address_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Verify.FDB)
    place.guest_sends(gratuitous_arp(place.mac, IP4), frames.unsolicited_na(place.mac, IP6))
    bridge(monkeypatch)
    assert place.verification.missing() == [place.mac.hex(":")]


def test_without_a_bridge_or_an_answer_nothing_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Verify.FDB)

    def fails(index: int) -> list[Forwarding]:
        raise OSError(19, "No such device")

    monkeypatch.setattr(rtnetlink, "forwarding", fails)
    assert "cannot be read" in place.verification.missing()[0]
    place.port.bridge = 0
    assert "no bridge's port" in place.verification.missing()[0]


def test_what_may_not_be_announced_need_not_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Verify.FDB, allow=OTHER.hex(":"))
    bridge(monkeypatch)
    assert place.verification.missing() == []


# --- probe ----------------------------------------------------------------------------------------
def test_known_peers_are_asked_in_the_guests_name() -> None:
    place = Place()
    place.talks()
    place.verification.begin()
    assert place.sent() == []  # nothing is to be refreshed
    place.verification.ask()
    # From nobody: whether the addresses are still the guest's is not known.
    assert sorted(place.sent()) == sorted(
        [
            arp_probe(place.mac, GATEWAY),
            arp_probe(place.mac, GATEWAY, VLAN),
            solicitation(place.mac, None, GATEWAY6),
        ]
    )
    assert sorted(place.verification.missing()) == [
        "no answer in VLAN 100 over IPv4",
        "no answer over IPv4",
        "no answer over IPv6",
    ]


def test_peers_are_asked_from_addresses_that_were_announced() -> None:
    place = Place()
    place.talks()
    place.uplink.begin()
    place.guest_sends(gratuitous_arp(place.mac, IP4))  # the guest's
    (entry,) = [one for one in place.uplink.entries() if one.ip == IP6]
    place.uplink.announce([entry])  # the host's
    place.nic.sent.clear()
    place.verification.ask()
    assert sorted(place.sent()) == sorted(
        [
            arp_request(place.mac, IP4, GATEWAY),
            arp_probe(place.mac, GATEWAY, VLAN),
            solicitation(place.mac, IP6, GATEWAY6),
        ]
    )


def test_answers_prove_their_vlan_and_family() -> None:
    place = Place()
    place.talks()
    place.verification.ask()
    place.verification.answer(reply(PEER, GATEWAY), None)
    assert sorted(place.verification.missing()) == [
        "no answer in VLAN 100 over IPv4",
        "no answer over IPv6",
    ]
    # The kernel takes the tag off; a bridge may leave it in.
    place.verification.answer(reply(PEER, GATEWAY), VLAN[0])
    place.verification.answer(advertisement(PEER, GATEWAY6), None)
    assert place.verification.missing() == []
    before = len(place.sent())
    place.verification.ask()  # who answered is not asked again
    assert len(place.sent()) == before


def test_who_did_not_answer_is_asked_again() -> None:
    place = Place()
    place.talks()
    place.verification.ask()
    place.verification.answer(reply(PEER, GATEWAY, VLAN), None)
    place.nic.sent.clear()
    place.verification.ask()
    assert sorted(place.sent()) == sorted(
        [arp_probe(place.mac, GATEWAY), solicitation(place.mac, None, GATEWAY6)]
    )


def test_one_of_several_peers_is_enough_and_few_are_asked() -> None:
    place = Place()
    peers = [bytes([192, 0, 2, number]) for number in range(20, 30)]
    for peer in peers:
        place.guest_sends(arp_request(place.mac, IP4, peer))
    place.guest_sends(arp_request(place.mac, IP4, peers[3]))
    place.verification.ask()
    assert len(place.sent()) == PEERS_ASKED
    assert place.sent()[0] == arp_probe(place.mac, peers[3])
    place.verification.answer(reply(PEER, peers[3]), None)
    assert place.verification.missing() == []


def test_who_knows_nobody_proves_nothing() -> None:
    place = Place()
    place.guest_sends(gratuitous_arp(place.mac, IP4))
    place.verification.ask()
    assert place.sent() == []
    assert place.verification.missing() == ["no peer of the guest's is known that could be asked"]


def test_nothing_is_asked_from_an_address_that_may_not_be_announced() -> None:
    place = Place(allow="2001:db8::/64")
    place.talks()
    place.verification.ask()
    assert place.sent() == [solicitation(place.mac, None, GATEWAY6)]


def test_a_question_that_cannot_be_sent_stays_without_an_answer() -> None:
    place = Place()
    place.guest_sends(arp_request(place.mac, IP4, GATEWAY))
    place.nic.error = OSError(100, "Network is down")
    place.verification.ask()
    assert place.verification.missing() == ["no answer over IPv4"]


def test_the_questions_are_not_taken_for_the_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place()
    place.talks()
    monkeypatch.setattr(place.nic, "send_from_host", place.guest_sends)
    place.verification.ask()
    assert place.uplink.observer.host_frames == 3


# --- hostile answers ------------------------------------------------------------------------------
def test_only_who_was_asked_counts() -> None:
    place = Place(refresh=True)
    place.talks()
    place.verification.ask()
    for frame, outer in (
        (reply(PEER, b"\xc0\0\2\x63"), None),  # another
        (reply(PEER, GATEWAY), (TPID_8021Q, 200)),  # in another VLAN
        (reply(PEER, GATEWAY)[:30], None),
        (reply(b"\1" + PEER[1:], GATEWAY), None),  # a multicast address
        (arp_request(PEER, GATEWAY, IP4)[:30], None),
        (arp_request(PEER, GATEWAY, IP4), None),  # a question of the gateway's own
        (arp_request(PEER, GATEWAY, b"\xc0\0\2\x63"), None),
        (b"", None),
        (b"\0" * 60, None),
    ):
        place.verification.answer(frame, outer)
    assert len(place.verification.missing()) == 3
    assert place.injected == []


def test_an_answer_before_the_question_does_not_count() -> None:
    place = Place(refresh=True)
    place.talks()
    place.verification.answer(reply(PEER, GATEWAY), None)
    place.verification.ask()
    assert len(place.verification.missing()) == 3
    assert place.injected == []


@given(st.binary(max_size=120), st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 4095)))
def test_anything_may_come_as_an_answer(data: bytes, outer: Tag | None) -> None:
    place = Place(refresh=True)
    place.talks()
    place.verification.begin()
    for start in (b"", PEER + PEER + b"\x08\x06\0\1\x08\0\6\4\0\2" + PEER):
        place.verification.answer(start + data, outer)
    assert len(place.injected) <= 3


# --- refresh --------------------------------------------------------------------------------------
def test_the_guest_is_shown_once_where_its_peers_are() -> None:
    place = Place(Verify.OFF, refresh=True)
    assert not place.verification.wanted
    place.talks()
    place.verification.begin()
    assert len(place.sent()) == 3
    for _ in range(3):
        place.verification.answer(reply(PEER, GATEWAY), None)
        place.verification.answer(reply(PEER, GATEWAY, VLAN), None)
        place.verification.answer(advertisement(OTHER, GATEWAY6), None)
        place.verification.answer(reply(OTHER, GATEWAY), None)  # late, and of another
    assert place.injected == [
        gratuitous_arp(PEER, GATEWAY),
        gratuitous_arp(PEER, GATEWAY, VLAN),
        frames.unsolicited_na(OTHER, GATEWAY6),
    ]


def test_the_guest_is_told_what_its_router_said_of_itself() -> None:
    place = Place(Verify.OFF, refresh=True)
    place.talks()
    place.verification.begin()
    place.verification.answer(advertisement(OTHER, GATEWAY6, flags=0xE000_0000), None)
    assert place.injected == [frames.unsolicited_na(OTHER, GATEWAY6, router=True)]


def test_a_tap_that_is_down_is_no_error() -> None:
    place = Place(refresh=True)
    place.talks()

    def fails(frame: bytes) -> None:
        raise OSError(100, "Network is down")

    place.verification._inject = fails
    place.verification.ask()
    place.verification.answer(reply(PEER, GATEWAY), None)
    assert len(place.verification.missing()) == 2
