"""The saved state of an address book, as a migration sends the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from godwit.errors import StreamError
from godwit.host.net.ethernet import ETH_ALEN, TPID_8021AD

from .dissect import MAX_TAGS, is_group, is_host_ip, is_host_mac, is_sender
from .frames import Tag

#: Addresses learned from frames, at most.
MAX_ENTRIES = 512
#: Peers learned from frames, at most.
MAX_PEERS = 128
#: IP addresses that were forgotten for their age, at most.
MAX_FORMER = 256
#: MAC addresses of the guest's that were seen elsewhere, at most.
MAX_ELSEWHERE = 64
#: Multicast memberships, and of one, the sources that alone are wanted, at most.
MAX_MEMBERSHIPS = 128
MAX_SOURCES = 8
#: How often a peer was met is counted up to here.
MAX_MET = (1 << 31) - 1
#: More than any age that is meant: 30 years, in seconds.
_LONGEST_S = 1e9

_Tag = tuple[Literal[0x8100, 0x88A8], Annotated[int, msgspec.Meta(ge=1, le=4094)]]
_Tags = Annotated[list[_Tag], msgspec.Meta(max_length=MAX_TAGS)]
_Mac = Annotated[bytes, msgspec.Meta(min_length=ETH_ALEN, max_length=ETH_ALEN)]
_Ip = Annotated[bytes, msgspec.Meta(min_length=4, max_length=16)]
_Age = Annotated[float, msgspec.Meta(ge=0, le=_LONGEST_S)]


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base of all saved parts of an address book.

    A field with a default came later than the first books, and is left out if at the default.
    """


class SavedEntry(_Saved, frozen=True):
    """An address and its age: the seconds since the address was last seen.

    Two hosts' clocks share nothing, so no time is saved. ``strength`` and ``router`` are as in
    :class:`.addresses.Entry`.
    """

    mac: _Mac
    tags: _Tags
    ip: _Ip | None
    age: _Age
    strength: Annotated[int, msgspec.Meta(ge=0, le=2)] = 0
    router: bool | None = None


class SavedPeer(_Saved, frozen=True):
    """A peer, how often the guest met the peer, and the seconds since the last time."""

    tags: _Tags
    ip: _Ip
    age: _Age
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_MET)]
    router: bool = False


class SavedElsewhere(_Saved, frozen=True):
    """A MAC address of the guest's, and the seconds since another was seen to use the address."""

    mac: _Mac
    tags: _Tags
    age: _Age


class SavedMembership(_Saved, frozen=True):
    """A multicast membership, as a :class:`.memberships.Membership`, and the age."""

    mac: _Mac
    tags: _Tags
    ip: _Ip
    group: _Ip
    version: Annotated[int, msgspec.Meta(ge=1, le=3)]
    age: _Age
    sources: Annotated[list[_Ip], msgspec.Meta(max_length=MAX_SOURCES)] = []


class AddressBookState(_Saved, frozen=True):
    """The state of an address book: what was learned from frames.

    Filter and configuration are in the NIC's state.
    """

    entries: Annotated[list[SavedEntry], msgspec.Meta(max_length=MAX_ENTRIES)]
    peers: Annotated[list[SavedPeer], msgspec.Meta(max_length=MAX_PEERS)]
    elsewhere: Annotated[list[SavedElsewhere], msgspec.Meta(max_length=MAX_ELSEWHERE)] = []
    memberships: Annotated[list[SavedMembership], msgspec.Meta(max_length=MAX_MEMBERSHIPS)] = []
    #: IP addresses that were forgotten for their age, for a copy that must not use them.
    former: Annotated[list[_Ip], msgspec.Meta(max_length=MAX_FORMER)] = []


def from_tags(tags: Sequence[Tag]) -> list[_Tag]:
    """Return VLAN tags in the form in which tags are saved."""
    return [(0x88A8 if tpid == TPID_8021AD else 0x8100, vid) for tpid, vid in tags]


def to_tags(tags: list[_Tag]) -> tuple[Tag, ...]:
    """Return saved VLAN tags in the form in which tags are used."""
    return tuple((int(tpid), vid) for tpid, vid in tags)


def check(state: AddressBookState) -> None:
    """Check what msgspec has not checked when decoding a state by the types above.

    That is an address no host can have, and an address or a peer that is there twice. Numbers,
    lengths and ages (NaN among them) have been checked.

    Raises:
        StreamError: names the field and its value.
    """
    addresses = set()
    for index, entry in enumerate(state.entries):
        where = f"entries[{index}]"
        _check_mac(entry.mac, where)
        if entry.ip is not None:
            _check_ip(entry.ip, where)
        addresses.add((tuple(entry.tags), entry.ip or entry.mac))
        if len(addresses) == index:
            raise StreamError(f"{where}: the address is there twice")
    met = set()
    for index, peer in enumerate(state.peers):
        where = f"peers[{index}]"
        _check_ip(peer.ip, where)
        met.add((tuple(peer.tags), peer.ip))
        if len(met) == index:
            raise StreamError(f"{where}: the peer is there twice")
    for index, ip in enumerate(state.former):
        _check_ip(ip, f"former[{index}]")
    for index, elsewhere in enumerate(state.elsewhere):
        _check_mac(elsewhere.mac, f"elsewhere[{index}]")
    for index, membership in enumerate(state.memberships):
        where = f"memberships[{index}]"
        _check_mac(membership.mac, where)
        if not is_group(membership.group):
            raise StreamError(f"{where}.group: {membership.group.hex()} is not a group's address")
        for ip in (membership.ip, *membership.sources):
            # 0.0.0.0 and :: are senders without an address (RFC 3376 section 4.2.13).
            if len(ip) != len(membership.group) or not is_sender(ip):
                raise StreamError(f"{where}: {ip.hex()} is not a sender's address")


def _check_mac(mac: bytes, where: str) -> None:
    if not is_host_mac(mac):
        raise StreamError(f"{where}.mac: {mac.hex(':')} is not one host's MAC address")


def _check_ip(ip: bytes, where: str) -> None:
    if not is_host_ip(ip):
        raise StreamError(f"{where}.ip: {ip.hex()} is not a host's address")
