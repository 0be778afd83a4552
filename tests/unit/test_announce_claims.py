"""What others claim leaves the address book, and what the guest announced has one owner."""

from __future__ import annotations

import msgspec
import pytest

from announce_bench import GATEWAY, IP4, IP6, VLAN
from godwit.announce.addresses import CLAIM_MARGIN_S, MAX_CLAIMS, REFLECTED_S, AddressBook
from godwit.announce.dissect import Kind, Sighting
from godwit.announce.entries import announcements
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.observer import Observer
from godwit.announce.saved import MAX_ELSEWHERE, AddressBookState, SavedElsewhere
from godwit.errors import StreamError
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q
from godwit.spec.saved import decode

MAC, OTHER, STRANGER = (bytes.fromhex("5254001234" + end) for end in ("56", "57", "99"))
QINQ = ((TPID_8021AD, 10), (TPID_8021Q, 100))
Tags = tuple[tuple[int, int], ...]


def seen(
    ip: bytes | None,
    mac: bytes = MAC,
    tags: Tags = (),
    announces: bool = False,
    router: bool | None = None,
    peer: bytes | None = None,
) -> Sighting:
    return Sighting(mac, tags, Kind.ARP, ip, announces, peer, router)


def pairs(book: AddressBook) -> set[tuple[bytes, Tags, bytes | None]]:
    return {entry.address for entry in book.entries()}


@pytest.mark.parametrize("tags", [(), VLAN, QINQ])
@pytest.mark.parametrize("ip", [IP4, IP6])
def test_what_another_claims_leaves_at_once(ip: bytes, tags: Tags) -> None:
    book = AddressBook(MAC)
    book.learn(seen(ip, tags=tags), 1.0)
    assert not book.claim(seen(ip, STRANGER, (*tags, (TPID_8021Q, 9))[-1:]), 2.0), "another VLAN"
    assert book.claim(seen(ip, STRANGER, tags), 2.0)
    # The MAC address is still there.
    assert pairs(book) == {(MAC, (), None), (MAC, tags, None)}
    assert book.claims == 1
    book.learn(seen(ip, tags=tags), 3.0)
    assert (MAC, tags, ip) in pairs(book), "the guest uses it again"


def test_a_mac_address_whose_ip_was_claimed_is_as_old_as_it_was() -> None:
    """It became the newest, and others went before it when space was needed."""
    third = bytes.fromhex("525400123458")
    book = AddressBook(MAC, limit=2)
    book.learn(seen(IP4, OTHER), 1.0)
    book.learn(seen(IP6, third), 2.0)
    assert book.claim(seen(IP4, STRANGER), 3.0)
    assert [entry.mac for entry in book.save(3.0).entries] == [OTHER, third]
    book.learn(seen(IP4, bytes.fromhex("525400123459")), 4.0)
    assert (third, (), IP6) in pairs(book)
    assert (OTHER, (), None) not in pairs(book)


def test_the_guests_own_mac_addresses_claim_nothing() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4), 1.0)
    book.learn(seen(IP6, OTHER), 1.0)
    assert not book.claim(seen(IP4, OTHER), 2.0)
    assert not book.claim(seen(IP6, MAC), 2.0)
    assert not book.claim(seen(None, STRANGER), 2.0)
    assert {(MAC, (), IP4), (OTHER, (), IP6)} <= pairs(book)
    assert book.claims == 0


def test_claims_before_the_guest_arrives_count() -> None:
    source = AddressBook(MAC)
    addresses = [bytes([192, 0, 2, number]) for number in (1, 2, 3, 4)]
    for ip in addresses:
        source.learn(seen(ip), 100.0)
    state = source.save(110.0)
    book = AddressBook(MAC, 500.0)
    book.claim(seen(addresses[0], STRANGER), 506.0)  # later than the guest's last use
    book.claim(seen(addresses[1], STRANGER), 490.0 - CLAIM_MARGIN_S)  # earlier
    book.claim(seen(addresses[2], MAC), 506.0)  # the guest's own, from its old host
    book.claim(seen(addresses[3], STRANGER), 490.5 - CLAIM_MARGIN_S)  # perhaps later
    book.load(state, 500.0)
    assert pairs(book) == {(MAC, (), None), (MAC, (), addresses[1]), (MAC, (), addresses[2])}
    assert book.claims == 2


def test_early_claims_are_bounded_and_end_with_the_guests_first_frame() -> None:
    book = AddressBook(MAC)
    for number in range(3 * MAX_CLAIMS):
        book.claim(seen((0xC0000000 + number).to_bytes(4, "big"), STRANGER), 1.0)
    assert book._early_claims is not None
    assert len(book._early_claims) == MAX_CLAIMS
    assert book.expects_guest
    book.learn(seen(IP4), 2.0)
    assert not book.expects_guest
    book.claim(seen(IP6, STRANGER), 3.0)
    assert book._early_claims is None


def test_a_guest_that_starts_here_awaits_no_other() -> None:
    watcher = Observer(MAC, 0.0)
    assert watcher.version is None
    watcher.guest_here(False)
    assert watcher.version is None
    watcher.guest_here(True)
    assert watcher.version is not None


# --- one IP address, one owner --------------------------------------------------------------------
def test_the_pair_that_the_guest_announced_is_preferred() -> None:
    """Linux answers for an address on each interface, with that interface's MAC address."""
    book = AddressBook(MAC)
    book.learn(seen(IP4, OTHER, announces=True), 1.0)
    book.learn(seen(IP4, MAC), 2.0)
    assert (OTHER, (), IP4) in pairs(book)
    assert (MAC, (), IP4) not in pairs(book)
    book.learn(seen(IP4, MAC, announces=True), 3.0)
    assert (MAC, (), IP4) in pairs(book)
    assert (OTHER, (), IP4) not in pairs(book)


def test_a_reply_does_not_displace_what_the_guest_asks_from() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4, OTHER), 1.0)
    book.learn(seen(IP4, MAC)._replace(answers=True), 2.0)
    assert (OTHER, (), IP4) in pairs(book)
    book.learn(seen(IP4, MAC), 3.0)
    assert (MAC, (), IP4) in pairs(book), "of two alike, the later"


def test_the_preference_migrates_and_ends_with_the_announced_pair() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4, OTHER, announces=True), 1.0)
    book.learn(seen(IP4, OTHER), 5.0)  # only used
    there = AddressBook(MAC, max_age_s=60)
    there.load(arrived(book.save(10.0)), 100.0)
    there.learn(seen(IP4, MAC), 101.0)
    assert (OTHER, (), IP4) in pairs(there)
    there.forget_old(200.0)
    there.learn(seen(IP4, MAC), 201.0)
    assert (MAC, (), IP4) in pairs(there)


def test_a_pair_that_is_passed_over_shows_its_mac_address() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4, MAC, VLAN, announces=True), 1.0)
    book.learn(seen(IP4, OTHER, VLAN), 2.0)
    assert pairs(book) == {(MAC, (), None), (MAC, VLAN, IP4), (OTHER, VLAN, None)}


# --- MAC addresses that are elsewhere -------------------------------------------------------------
def test_a_mac_address_seen_elsewhere_is_not_announced_until_the_guest_uses_it() -> None:
    """VRRP's virtual MAC address moves from host to host; the filter keeps it."""
    book = AddressBook(MAC)
    book.set_filter([OTHER], [], 1.0)
    book.learn(seen(IP4, OTHER), 10.0)
    book.used_elsewhere(OTHER, (), 10.0 + REFLECTED_S / 2)  # the guest's own frame, reflected
    assert {(OTHER, (), None), (OTHER, (), IP4)} <= pairs(book)
    book.used_elsewhere(OTHER, VLAN, 20.0)  # in another network
    assert (OTHER, (), IP4) in pairs(book)
    book.used_elsewhere(OTHER, (), 20.0)
    assert pairs(book) == {(MAC, (), None)}
    there = AddressBook(MAC)
    there.set_filter([OTHER], [], 500.0)
    there.load(arrived(book.save(30.0)), 500.0)
    assert pairs(there) == {(MAC, (), None)}
    assert there.macs() == {MAC, OTHER}
    there.learn(seen(None, OTHER), 501.0)
    assert {(OTHER, (), None), (OTHER, (), IP4)} <= pairs(there)


def test_who_claims_by_a_mac_address_that_came_back_is_the_guest() -> None:
    book = AddressBook(MAC)
    book.set_filter([OTHER], [], 1.0)
    book.learn(seen(IP4), 10.0)
    book.used_elsewhere(OTHER, (), 20.0)
    book.learn(seen(None, OTHER), 30.0)
    assert not book.claim(seen(IP4, OTHER), 31.0), "the guest's own, reflected"
    book.used_elsewhere(OTHER, (), 40.0)
    assert book.claim(seen(IP4, OTHER), 41.0)
    assert pairs(book) == {(MAC, (), None)}


def test_the_configured_mac_address_and_strangers_are_no_matter() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4), 1.0)
    for mac in (MAC, STRANGER):
        book.used_elsewhere(mac, (), 100.0)
    assert pairs(book) == {(MAC, (), None), (MAC, (), IP4)}
    assert book.save(100.0).elsewhere == []


def test_what_is_elsewhere_is_bounded_and_ages() -> None:
    book = AddressBook(MAC, max_age_s=1000)
    macs = [b"\2\0\0\0" + number.to_bytes(2, "big") for number in range(3 * MAX_ELSEWHERE)]
    for mac in macs:
        book.learn(seen(None, mac), 1.0)
    for mac in macs:
        book.used_elsewhere(mac, (), 100.0)
    assert len(book.save(100.0).elsewhere) == MAX_ELSEWHERE
    assert book.save(1200.0).elsewhere == []


# --- routers --------------------------------------------------------------------------------------
def test_the_router_flag_is_as_the_guest_last_said() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP6, router=True), 1.0)
    book.learn(seen(IP6), 2.0)  # a solicitation says neither
    there = AddressBook(MAC)
    there.load(arrived(book.save(3.0)), 10.0)
    assert list(announcements(there.entries(), None, there.routers())) == [
        rarp(MAC),
        unsolicited_na(MAC, IP6, router=True),
    ]
    there.learn(seen(IP6, router=False), 11.0)
    assert unsolicited_na(MAC, IP6) in list(announcements(there.entries(), None, there.routers()))


def test_a_router_is_one_at_all_addresses_of_the_interface() -> None:
    book = AddressBook(MAC)
    link_local = bytes.fromhex("fe80" + "00" * 13 + "07")
    book.learn(seen(link_local, router=True), 1.0)
    book.learn(seen(IP6), 1.0)
    book.learn(seen(IP6, tags=VLAN), 1.0)
    book.learn(seen(IP4), 1.0)
    sent = list(announcements(book.entries(), None, book.routers()))
    assert unsolicited_na(MAC, link_local, router=True) in sent
    assert unsolicited_na(MAC, IP6, router=True) in sent
    assert unsolicited_na(MAC, IP6, VLAN) in sent


def test_a_peer_that_says_that_it_is_a_router_is_asked_first() -> None:
    book = AddressBook(MAC)
    other = IP6[:-1] + b"\x33"
    gateway = IP6[:-1] + b"\x01"
    for peer in (gateway, other, other, other):
        book.learn(seen(IP6, peer=peer), 1.0)
    assert book.peers()[0].ip == other
    book.claim(seen(gateway, STRANGER, router=True), 2.0)
    assert book.peers()[0].ip == gateway
    there = AddressBook(MAC)
    there.load(arrived(book.save(3.0)), 10.0)
    there.learn(seen(IP6, peer=gateway), 11.0)
    assert there.peers()[0] == book.peers()[0].__class__((), gateway, 11.0, 2, True)
    there.claim(seen(gateway, STRANGER, router=False), 12.0)
    assert there.peers()[0].ip == other
    # A stranger is no peer, whatever it says of itself.
    there.claim(seen(GATEWAY, STRANGER, router=True), 13.0)
    assert len(there.peers()) == 2


# --- the saved state ------------------------------------------------------------------------------
def arrived(state: AddressBookState) -> AddressBookState:
    """Return a state as a destination gets the state: encoded and decoded."""
    return decode(msgspec.msgpack.encode(state), AddressBookState)


def test_a_book_that_has_nothing_new_to_say_looks_as_ever() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4, peer=GATEWAY), 1.0)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(book.save(1.0)))
    assert wire.keys() == {"entries", "peers"}
    assert wire["entries"][0].keys() == {"mac", "tags", "ip", "age", "strength"}
    assert wire["peers"][0].keys() == {"tags", "ip", "age", "count"}


@pytest.mark.parametrize(
    ("message", "state"),
    [
        (r"elsewhere\[0\]\.mac", AddressBookState([], [], [SavedElsewhere(b"\1" * 6, [], 1.0)])),
        ("length <= 64", AddressBookState([], [], [SavedElsewhere(MAC, [], 1.0)] * 65)),
    ],
)
def test_a_hostile_state_is_refused(message: str, state: AddressBookState) -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4), 1.0)
    before = pairs(book)
    with pytest.raises(StreamError, match=message):
        book.load(arrived(state), 2.0)
    assert pairs(book) == before


def test_the_announced_frames_are_those_of_the_entries() -> None:
    book = AddressBook(MAC)
    book.learn(seen(IP4, router=True), 1.0)
    assert list(announcements(book.entries())) == [rarp(MAC), gratuitous_arp(MAC, IP4)]
