"""The saved state of an address book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from godwit.errors import StreamError
from godwit.host.net.ethernet import ETH_ALEN, TPID_8021AD, TPID_8021Q

from .dissect import MAX_TAGS, is_host_ip, is_host_mac
from .frames import Tag

#: Addresses learned from frames, at most.
ENTRIES = 512
PEERS = 128
#: How often a peer was met is counted up to here.
MOST = (1 << 31) - 1
#: More than any age that is meant: 30 years, s.
_LONGEST_S = 1e9

_Tag = tuple[Literal[0x8100, 0x88A8], Annotated[int, msgspec.Meta(ge=1, le=4094)]]
_Tags = Annotated[list[_Tag], msgspec.Meta(max_length=MAX_TAGS)]
_Ip = Annotated[bytes, msgspec.Meta(min_length=4, max_length=16)]
_Age = Annotated[float, msgspec.Meta(ge=0, le=_LONGEST_S)]


class SavedEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An address; ``age`` is how long ago it was heard of, s: two hosts' clocks share nothing."""

    mac: Annotated[bytes, msgspec.Meta(min_length=ETH_ALEN, max_length=ETH_ALEN)]
    tags: _Tags
    ip: _Ip | None
    age: _Age


class SavedPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peer, as :class:`SavedEntry`."""

    tags: _Tags
    ip: _Ip
    age: _Age
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST)]


class AddressBookState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An address book. What filter and configuration say is not in it: the NIC's state has that."""

    entries: Annotated[list[SavedEntry], msgspec.Meta(max_length=ENTRIES)]
    peers: Annotated[list[SavedPeer], msgspec.Meta(max_length=PEERS)]


def from_tags(tags: Sequence[Tag]) -> list[_Tag]:
    """As they are saved."""
    return [(0x88A8 if tpid == TPID_8021AD else 0x8100, vid) for tpid, vid in tags]


def to_tags(tags: list[_Tag]) -> tuple[Tag, ...]:
    """As they are used."""
    return tuple((int(tpid), vid) for tpid, vid in tags)


def check(state: AddressBookState) -> None:
    """Check all, also what decoding has checked: a state may have come another way.

    Raises:
        StreamError: names the field that cannot be.
    """
    _count(state.entries, ENTRIES, "entries")
    _count(state.peers, PEERS, "peers")
    addresses = set()
    for index, entry in enumerate(state.entries):
        where = f"entries[{index}]"
        _check(entry.tags, entry.age, where)
        if not is_host_mac(entry.mac):
            raise StreamError(f"{where}.mac: {entry.mac.hex(':')} is not a uplink's address")
        if entry.ip is not None and not is_host_ip(entry.ip):
            raise StreamError(f"{where}.ip: {entry.ip.hex()} is not a host's address")
        addresses.add((tuple(entry.tags), entry.ip or entry.mac))
        if len(addresses) == index:
            raise StreamError(f"{where}: the address is there twice")
    met = set()
    for index, peer in enumerate(state.peers):
        where = f"peers[{index}]"
        _check(peer.tags, peer.age, where)
        if not is_host_ip(peer.ip):
            raise StreamError(f"{where}.ip: {peer.ip.hex()} is not a host's address")
        if not 1 <= peer.count <= MOST:
            raise StreamError(f"{where}.count: {peer.count}")
        met.add((tuple(peer.tags), peer.ip))
        if len(met) == index:
            raise StreamError(f"{where}: the peer is there twice")


def _count(items: Sequence[object], limit: int, where: str) -> None:
    if len(items) > limit:
        raise StreamError(f"{where}: there are {len(items)}; {limit} are the most")


def _check(tags: list[_Tag], age: float, where: str) -> None:
    _count(tags, MAX_TAGS, f"{where}.tags")
    for tpid, vid in tags:
        if tpid not in (TPID_8021Q, TPID_8021AD):
            raise StreamError(f"{where}.tags: 0x{tpid:x} is not a VLAN tag's type")
        if not 1 <= vid <= 4094:
            raise StreamError(f"{where}.tags: VLAN id {vid} is not between 1 and 4094")
    # Decoding lets NaN pass, which is neither less nor more than a limit.
    if not 0 <= age <= _LONGEST_S:
        raise StreamError(f"{where}.age: {age} s")
