"""The address book: what is learned, what is forgotten, and that no guest can fill the host."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.announce.addresses import MAX_FILTER_ENTRIES, AddressBook
from godwit.announce.dissect import Kind, Sighting, dissect
from godwit.announce.entries import (
    MAX_SEEN,
    Entry,
    SeenAnnouncements,
    Source,
    Strength,
    announcements,
)
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.memberships import Membership, report
from godwit.announce.policy import parse_policy
from godwit.announce.saved import (
    MAX_ENTRIES,
    MAX_MEMBERSHIPS,
    MAX_PEERS,
    AddressBookState,
    SavedEntry,
    SavedPeer,
)
from godwit.errors import StreamError
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q
from godwit.spec.saved import decode

MAC, OTHER, THIRD = (bytes.fromhex("5254001234" + end) for end in ("56", "57", "58"))
IP4, GATEWAY = bytes([192, 0, 2, 7]), bytes([192, 0, 2, 1])
IP6 = bytes.fromhex("20010db8" + "00" * 11 + "07")
LINK_LOCAL = bytes.fromhex("fe80" + "00" * 13 + "07")
VLAN = ((TPID_8021Q, 100),)
QINQ = ((TPID_8021AD, 10), (TPID_8021Q, 100))


def sighting(
    ip: bytes | None = None,
    mac: bytes = MAC,
    tags: tuple[tuple[int, int], ...] = (),
    peer: bytes | None = None,
    announces: bool = False,
) -> Sighting:
    return Sighting(mac, tags, Kind.ARP, ip, announces, peer)


def keys(entries: list[Entry]) -> list[tuple[object, ...]]:
    return [(entry.mac, entry.tags, entry.ip) for entry in entries]


def test_the_configured_address_is_there_from_the_beginning() -> None:
    book = AddressBook(MAC, 5.0)
    assert book.entries() == [Entry(MAC, (), None, 5.0, None, Source.CONFIG)]
    book.forget_old(1e9)
    assert len(book) == 1


def test_what_is_seen_is_known_the_most_important_first() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP4, OTHER), 1.0)
    book.learn(sighting(IP4, tags=VLAN), 2.0)
    book.learn(sighting(None, THIRD), 3.0)
    book.learn(sighting(IP6), 4.0)
    book.learn(sighting(IP4, tags=QINQ), 5.0)
    book.learn(sighting(IP4, tags=VLAN), 6.0)
    book.learn(sighting(), 7.0)
    assert keys(book.entries()) == [
        (MAC, (), None),
        (MAC, VLAN, IP4),
        (MAC, QINQ, IP4),
        (MAC, (), IP6),
        (THIRD, (), None),
        (OTHER, (), IP4),
    ]
    assert book.entries()[0] == Entry(MAC, (), None, 7.0, 7.0, Source.FRAME, Strength.ASKED)
    assert book.entries()[1].confirmed == 6.0


def test_an_ip_address_has_one_owner_in_each_vlan() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP4), 1.0)
    book.learn(sighting(IP4, tags=VLAN), 1.0)
    book.learn(sighting(IP4, OTHER), 2.0)
    assert set(keys(book.entries())) == {
        (MAC, (), None),
        (OTHER, (), IP4),
        (MAC, VLAN, IP4),
    }
    book.learn(sighting(IP4), 3.0)
    assert (MAC, (), IP4) in keys(book.entries())
    assert len(book) == 3


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    book = AddressBook(MAC, max_age_s=60)
    book.learn(sighting(IP4, peer=GATEWAY), 0.0)
    book.learn(sighting(IP6, OTHER), 30.0)
    book.forget_old(60.0)
    assert len(book) == 3
    book.forget_old(61.0)
    assert keys(book.entries()) == [(MAC, (), None), (OTHER, (), IP6)]
    assert book.peers() == []


def test_peers_are_counted() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP4, peer=bytes([192, 0, 2, 9])), 1.0)
    book.learn(sighting(IP4, peer=GATEWAY), 2.0)
    book.learn(sighting(IP4, peer=GATEWAY), 3.0)
    book.learn(sighting(IP4, peer=bytes([192, 0, 2, 8])), 4.0)
    found = [(peer.ip[-1], peer.count, peer.last_seen) for peer in book.peers()]
    assert found == [(1, 2, 3.0), (8, 1, 4.0), (9, 1, 1.0)]


# --- what the driver sets -------------------------------------------------------------------------
def test_the_filter_has_addresses_without_ip() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP4, tags=VLAN), 1.0)
    # What is not one host's MAC address, or no VLAN, is passed over.
    macs = [OTHER, bytes.fromhex("333300000001"), bytes(6), b"\2"]
    book.set_filter(macs, [0, 100, 4095], 2.0)
    assert keys(book.entries()) == [
        (MAC, (), None),
        (MAC, VLAN, IP4),
        (MAC, VLAN, None),
        (OTHER, (), None),
        (OTHER, VLAN, None),
    ]
    assert {entry.source for entry in book.entries()[2:]} == {Source.FILTER}
    book.forget_old(1e6)
    assert len(book) == 4, "what the driver wants does not age"
    book.set_filter([], [], 3.0)
    assert keys(book.entries()) == [(MAC, (), None)]


def test_what_was_seen_of_a_filters_address_is_kept() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(None, OTHER), 1.0)
    book.set_filter([OTHER], [], 2.0)
    assert book.entries()[1] == Entry(OTHER, (), None, 1.0, 1.0, Source.FRAME, Strength.ASKED)
    book.learn(sighting(None, OTHER), 3.0)
    book.set_filter([OTHER], [100], 4.0)
    assert next(e for e in book.entries() if e.mac == OTHER).confirmed == 3.0
    assert len(book) == 4


def test_large_tables_are_cut_the_likely_first() -> None:
    book = AddressBook(MAC)
    macs = [bytes([2, 0, 0, 0, i // 256, i % 256]) for i in range(1000)]
    book.set_filter(macs, range(4096), 1.0)
    found = keys(book.entries())
    assert len(found) == 1 + MAX_FILTER_ENTRIES
    assert sum(mac == MAC for mac, _, _ in found) == 1 + MAX_FILTER_ENTRIES // 2
    assert sum(tags == () for _, tags, _ in found) == 1 + MAX_FILTER_ENTRIES // 2


def test_a_changed_mac_takes_the_place_of_the_old() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP4), 1.0)
    book.learn(sighting(IP6, OTHER), 1.0)
    book.set_configured(OTHER, 2.0)
    # The guest may not listen to the old one any more.
    assert keys(book.entries()) == [(OTHER, (), None), (OTHER, (), IP6)]
    assert book.mac == OTHER


def test_a_changed_mac_stays_if_the_filter_has_the_old() -> None:
    book = AddressBook(MAC)
    book.set_filter([MAC], [], 1.0)
    book.learn(sighting(IP4), 1.0)
    book.set_configured(OTHER, 2.0)
    assert keys(book.entries()) == [(OTHER, (), None), (MAC, (), None), (MAC, (), IP4)]


# --- bounds ---------------------------------------------------------------------------------------
def _noise(count: int, mac: bytes | None = None) -> Iterator[Sighting]:
    chance = random.Random(str(mac))
    for _ in range(count):
        bits = chance.getrandbits(256).to_bytes(32, "big")
        tags = ((TPID_8021AD, 1000 + bits[0]), (TPID_8021Q, 1000 + bits[1]))
        ip = b"\x20" + bits[2:17]
        yield Sighting(
            mac or bytes([bits[17] & 0xFE | 2]) + bits[18:23], tags, Kind.NS, ip, True,
            b"\x20" + bits[17:32],
        )  # fmt: skip


def test_a_flood_of_others_leaves_the_configured_addresses() -> None:
    book = AddressBook(MAC)
    mine = [sighting(IP4), sighting(IP6), sighting(LINK_LOCAL), sighting(IP4, tags=VLAN)]
    for _ in range(2):
        for one in mine:
            book.learn(one._replace(peer=GATEWAY), 1.0)
    most = 0
    for number, one in enumerate(_noise(100_000)):
        book.learn(one, 2.0 + number)
        most = max(most, len(book))
    assert most == len(book) == 1 + MAX_ENTRIES
    assert keys(book.entries())[0] == (MAC, (), None)
    assert {(one.mac, one.tags, one.ip) for one in mine} <= set(keys(book.entries()))
    peers = book.peers()
    assert len(peers) == MAX_PEERS
    assert peers[0].ip == GATEWAY


def test_a_flood_of_its_own_leaves_others_their_share() -> None:
    book = AddressBook(MAC)
    for number, one in enumerate(_noise(MAX_ENTRIES)):
        book.learn(one, float(number))
    for number, one in enumerate(_noise(20_000, MAC)):
        book.learn(one, 1000.0 + number)
    macs = [entry.mac for entry in book.entries()]
    assert macs.count(MAC) == 1 + MAX_ENTRIES * 3 // 4
    assert len(macs) == 1 + MAX_ENTRIES
    assert book.entries()[0].ip is None


def test_a_flood_of_known_peers_is_bounded() -> None:
    book = AddressBook(MAC)
    for one in _noise(2000, MAC):
        book.learn(one, 1.0)
        book.learn(one, 1.0)
    assert len(book.peers()) <= MAX_PEERS


def test_the_worst_memory_use_is_as_stated() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        book = AddressBook(MAC)
        book.set_filter([bytes([2, 0, 0, 0, 0, i]) for i in range(64)], list(range(1, 65)), 1.0)
        for number, one in enumerate(_noise(5000)):
            book.learn(one, float(number))
            book.used_elsewhere(one.mac, one.tags, number + 2.0)
        for number in range(2 * MAX_MEMBERSHIPS):
            one = Membership(MAC, QINQ, IP6, number.to_bytes(16, "big"), 2, (IP6,) * 8, 1.0)
            book.memberships.learn(report(one._replace(group=b"\xff" + one.group[1:])), None, 1.0)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used < 500_000


# --- the saved state ------------------------------------------------------------------------------
def _full_book() -> AddressBook:
    book = AddressBook(MAC)
    book.learn(sighting(IP4, peer=GATEWAY), 10.0)
    book.learn(sighting(IP4, peer=GATEWAY), 20.0)
    book.learn(sighting(IP6, OTHER, QINQ, LINK_LOCAL), 30.0)
    book.learn(sighting(None, THIRD), 40.0)
    return book


def test_a_book_migrates_to_another_hosts_clock() -> None:
    saved = _full_book().save(100.0)
    book = AddressBook(MAC, 7000.0)
    book.learn(sighting(IP6), 7000.0)
    book.load(arrived(saved), 7000.0)
    assert book.entries()[1:] == [
        Entry(MAC, (), IP4, 6920.0, None, Source.SAVED, Strength.ASKED),
        Entry(THIRD, (), None, 6940.0, None, Source.SAVED, Strength.ASKED),
        Entry(OTHER, QINQ, IP6, 6930.0, None, Source.SAVED, Strength.ASKED),
    ]
    assert [(peer.ip, peer.count, peer.last_seen) for peer in book.peers()] == [
        (GATEWAY, 2, 6920.0),
        (LINK_LOCAL, 1, 6930.0),
    ]
    assert book.save(7000.0) == saved


def test_what_is_too_old_is_neither_saved_nor_loaded() -> None:
    book = _full_book()
    saved = book.save(3635.0)
    assert [entry.mac for entry in saved.entries] == [THIRD]
    young = AddressBook(MAC, max_age_s=10)
    young.load(_full_book().save(41.0), 41.0)
    assert [entry.ip for entry in young.entries()] == [None, None]


def test_a_full_book_can_be_migrated() -> None:
    book = AddressBook(MAC)
    for one in _noise(2000):
        book.learn(one, 1.0)
    wire = msgspec.msgpack.encode(book.save(1.0))
    assert len(wire) < 100_000
    other = AddressBook(OTHER)
    other.load(msgspec.msgpack.decode(wire, type=AddressBookState), 1.0)
    assert len(other) == len(book)


ENTRY = SavedEntry(MAC, [(TPID_8021Q, 7)], IP4, 1.0)
PEER = SavedPeer([], GATEWAY, 1.0, 1)
_change = msgspec.structs.replace


def _with_entry(**fields: object) -> AddressBookState:
    return AddressBookState([_change(ENTRY, **fields)], [])


def _with_peer(**fields: object) -> AddressBookState:
    return AddressBookState([], [_change(PEER, **fields)])


def arrived(state: AddressBookState) -> AddressBookState:
    """Return a state as a destination gets the state: encoded and decoded."""
    return decode(msgspec.msgpack.encode(state), AddressBookState)


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ("length <= 512.*entries", AddressBookState([ENTRY] * 513, [])),
        ("length <= 128.*peers", AddressBookState([], [PEER] * 129)),
        (r"length >= 6.*entries.*\.mac", _with_entry(mac=bytes(5))),
        (r"length <= 6.*entries.*\.mac", _with_entry(mac=bytes([2] * 7))),
        (r"length >= 4.*entries.*\.ip", _with_entry(ip=b"\x20" * 3)),
        (r"length <= 16.*entries.*\.ip", _with_entry(ip=b"\x20" * 17)),
        (r">= 1.*entries.*\.tags", _with_entry(tags=[(TPID_8021Q, 0)])),
        (r"<= 4094.*entries.*\.tags", _with_entry(tags=[(TPID_8021Q, 4095)])),
        (r"37120.*entries.*\.tags", _with_entry(tags=[(0x9100, 1)])),
        (r"length <= 2.*entries.*\.tags", _with_entry(tags=[(TPID_8021Q, 1)] * 3)),
        (r"<= 1000000000\.0.*entries.*\.age", _with_entry(age=math.inf)),
        (r">= 0\.0.*entries.*\.age", _with_entry(age=-1.0)),
        (r">= 0\.0.*entries.*\.age", _with_entry(age=math.nan)),
        (r">= 1.*peers.*\.tags", _with_peer(tags=[(TPID_8021Q, 0)])),
        (r"length <= 16.*peers.*\.ip", _with_peer(ip=b"\x20" * 17)),
        (r"<= 1000000000\.0.*peers.*\.age", _with_peer(age=math.inf)),
        (r">= 0\.0.*peers.*\.age", _with_peer(age=math.nan)),
        (r">= 1.*peers.*\.count", _with_peer(count=0)),
        (r"<= 2147483647.*peers.*\.count", _with_peer(count=1 << 31)),
    ],
)
def test_a_state_that_breaks_a_range_is_refused_when_it_is_decoded(
    message: str, state: AddressBookState
) -> None:
    with pytest.raises(StreamError, match=message):
        arrived(state)


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ("entries[0].mac", _with_entry(mac=bytes.fromhex("333300000001"))),
        ("entries[0].mac", _with_entry(mac=bytes(6))),
        ("entries[0].ip", _with_entry(ip=bytes(4))),
        ("entries[0].ip", _with_entry(ip=bytes([127, 0, 0, 1]))),
        ("entries[0].ip", _with_entry(ip=b"\xff" * 16)),
        ("entries[0].ip", _with_entry(ip=b"\x20" * 7)),
        ("entries[1]: the address is there twice", AddressBookState([ENTRY, ENTRY], [])),
        ("peers[0].ip", _with_peer(ip=bytes(4))),
        ("peers[0].ip", _with_peer(ip=b"\x20" * 7)),
        ("peers[1]: the peer is there twice", AddressBookState([], [PEER, PEER])),
    ],
)
def test_what_decoding_cannot_know_is_refused_when_it_is_loaded(
    message: str, state: AddressBookState
) -> None:
    book = _full_book()
    before = book.entries(), book.peers()
    with pytest.raises(StreamError) as caught:
        book.load(arrived(state), 50.0)
    assert str(caught.value).startswith(message)
    assert (book.entries(), book.peers()) == before


_tags = st.lists(
    st.tuples(st.sampled_from([TPID_8021Q, TPID_8021AD, 0x9100]), st.integers(0, 4095)), max_size=3
)
_ip = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
_age = st.floats() | st.floats(0, 4000)
_states = st.builds(
    AddressBookState,
    st.lists(
        st.builds(
            SavedEntry, st.binary(min_size=6, max_size=6), _tags, st.none() | _ip, _age
        ),
        max_size=4,
    ),
    st.lists(st.builds(SavedPeer, _tags, _ip, _age, st.integers(-1, 1 << 32)), max_size=4),
)  # fmt: skip


@given(_states)
def test_any_state_is_taken_or_refused(state: AddressBookState) -> None:
    book = AddressBook(MAC)
    try:
        book.load(arrived(state), 100.0)
    except StreamError:
        return
    for frame in announcements(book.entries()):
        assert dissect(frame) is not None
    again = AddressBook(MAC)
    again.load(book.save(100.0), 100.0)
    assert {(e.mac, e.tags, e.ip) for e in again.entries()} == set(keys(book.entries()))


# --- announcing -----------------------------------------------------------------------------------
def test_each_address_is_announced_every_mac_first() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP6, OTHER, VLAN), 1.0)
    book.learn(sighting(IP4, tags=QINQ), 2.0)
    book.learn(sighting(IP4), 3.0)
    book.learn(sighting(LINK_LOCAL), 4.0)
    assert list(announcements(book.entries())) == [
        rarp(MAC),
        rarp(MAC, QINQ),
        rarp(OTHER, VLAN),
        unsolicited_na(MAC, LINK_LOCAL),
        gratuitous_arp(MAC, IP4),
        gratuitous_arp(MAC, IP4, QINQ),
        unsolicited_na(OTHER, IP6, VLAN),
    ]


def test_a_policy_restricts_what_is_announced() -> None:
    book = AddressBook(MAC)
    book.learn(sighting(IP6), 1.0)
    book.learn(sighting(IP4), 2.0)
    book.learn(sighting(bytes([192, 0, 2, 8]), OTHER), 2.0)
    policy = parse_policy("192.0.2.0/24;52:54:00:12:34:56")
    assert list(announcements(book.entries(), policy)) == [rarp(MAC), gratuitous_arp(MAC, IP4)]


def missing(seen: SeenAnnouncements, book: AddressBook, since: float | None = None) -> list[Entry]:
    return [entry for entry in book.entries() if not seen.announced_since(entry, since)]


def test_what_the_guest_announced_is_not_missing() -> None:
    book, seen = AddressBook(MAC), SeenAnnouncements()
    for one in (sighting(IP4), sighting(IP6), sighting(IP4, tags=VLAN), sighting(None, OTHER)):
        book.learn(one, 1.0)
    seen.see(sighting(IP4, announces=True), 1.0)
    seen.begin()
    assert missing(seen, book) == book.entries()
    seen.see(sighting(IP6), 3.0)  # announced to one peer only
    assert missing(seen, book) == book.entries()
    seen.see(sighting(IP4, announces=True), 4.0)
    seen.see(sighting(IP4, announces=True), 5.0)
    seen.see(sighting(None, OTHER, announces=True), 6.0)
    assert keys(missing(seen, book)) == [(MAC, VLAN, IP4), (MAC, (), IP6)]
    assert seen.announced_at(book.entries()[0]) == 4.0
    # What was announced last before a time does not count from that time on.
    assert len(missing(seen, book, since=5.0)) == 2
    assert (MAC, (), IP4) in keys(missing(seen, book, since=5.5))
    seen.begin()
    assert len(missing(seen, book)) == len(book)


def test_what_is_remembered_is_bounded() -> None:
    seen = SeenAnnouncements()
    seen.begin()
    for one in _noise(10_000):
        seen.see(one, 1.0)
    assert len(seen._at) == MAX_SEEN


def test_what_is_forgotten_is_still_kept_from_a_copy() -> None:
    book = AddressBook(MAC, max_age_s=60)
    for number in range(300):
        ip = bytes((10, 0, number >> 8, number & 255))
        book.learn(sighting(ip), float(number))
    book.forget_old(1e6)
    state = book.save(1e6)
    assert state.entries == []
    assert len(state.former) == 256
    assert state.former[-1] == bytes((10, 0, 1, 43))
    other = AddressBook(MAC)
    other.load(state, 5.0)
    assert other.save(5.0).former == state.former
    with pytest.raises(StreamError, match=r"former\[1\]"):
        other.load(msgspec.structs.replace(state, former=[b"\x0a\0\0\1", bytes(4)]), 5.0)
