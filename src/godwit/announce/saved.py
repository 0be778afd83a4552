"""The saved state of an address book, as a migration sends the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from godwit.errors import StreamError
from godwit.host.net.ethernet import ETH_ALEN, TPID_8021AD

from .dissect import MAX_TAGS, is_host_ip, is_host_mac
from .frames import Tag

#: Addresses learned from frames, at most.
MAX_ENTRIES = 512
#: Peers learned from frames, at most.
MAX_PEERS = 128
#: How often a peer was met is counted up to here.
MAX_MET = (1 << 31) - 1
#: More than any age that is meant: 30 years, in seconds.
_LONGEST_S = 1e9

_Tag = tuple[Literal[0x8100, 0x88A8], Annotated[int, msgspec.Meta(ge=1, le=4094)]]
_Tags = Annotated[list[_Tag], msgspec.Meta(max_length=MAX_TAGS)]
_Ip = Annotated[bytes, msgspec.Meta(min_length=4, max_length=16)]
_Age = Annotated[float, msgspec.Meta(ge=0, le=_LONGEST_S)]


class SavedEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An address and its age: the seconds since the address was last seen.

    Two hosts' clocks share nothing, so no time is saved.
    """

    mac: Annotated[bytes, msgspec.Meta(min_length=ETH_ALEN, max_length=ETH_ALEN)]
    tags: _Tags
    ip: _Ip | None
    age: _Age


class SavedPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peer, how often the guest met the peer, and the seconds since the last time."""

    tags: _Tags
    ip: _Ip
    age: _Age
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_MET)]


class AddressBookState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state of an address book: what was learned from frames.

    Filter and configuration are in the NIC's state.
    """

    entries: Annotated[list[SavedEntry], msgspec.Meta(max_length=MAX_ENTRIES)]
    peers: Annotated[list[SavedPeer], msgspec.Meta(max_length=MAX_PEERS)]


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
        if not is_host_mac(entry.mac):
            raise StreamError(f"{where}.mac: {entry.mac.hex(':')} is not one host's MAC address")
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


def _check_ip(ip: bytes, where: str) -> None:
    if not is_host_ip(ip):
        raise StreamError(f"{where}.ip: {ip.hex()} is not a host's address")
