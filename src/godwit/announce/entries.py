"""The entries of an address book, and the frames in which the host announces them.

An address is a MAC address alone, or a MAC address with an IP address, within a stack of VLAN tags.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator

import msgspec

from . import frames
from .dissect import Sighting
from .frames import Tag
from .policy import Policy

#: Addresses whose announcement by the guest is remembered, at most.
MAX_SEEN = 1024

Tags = tuple[Tag, ...]
#: MAC address, tags, IP address if any.
Address = tuple[bytes, Tags, bytes | None]
#: An IP address within its VLAN has one owner: the key is (tags, ip), or (tags, mac) without one.
Key = tuple[Tags, bytes]


class Source(enum.Enum):
    """The way in which an address came to be known."""

    CONFIG = "config"
    FILTER = "filter"
    FRAME = "frame"
    SAVED = "saved"


class Strength(enum.IntEnum):
    """The ways in which a guest uses a pair of MAC and IP address, the strongest last.

    Linux answers for each address on each interface (arp_ignore, arp_filter in
    Documentation/networking/ip-sysctl.rst), and asks from nearly any: only an announced pair is
    certain to be right.
    """

    REPLIED = 0
    ASKED = 1
    ANNOUNCED = 2


class Entry(msgspec.Struct, frozen=True):
    """One address in an address book.

    Attributes:
        mac: six bytes.
        tags: VLAN tags from the outside in.
        ip: 4 or 16 bytes; None: none is known.
        last_seen: when the address was last seen, in any way and on any host, seconds.
        confirmed: when the guest last sent a frame from the address on this host, seconds; None:
            not yet.
        source: the way in which the address was last seen.
        strength: how far the guest has committed itself to the pair of MAC and IP address. No
            weaker pair with the same IP address is preferred.
        router: whether the guest last said that it is a router at the address; None: it said
            neither.
    """

    mac: bytes
    tags: Tags
    ip: bytes | None
    last_seen: float
    confirmed: float | None
    source: Source
    strength: Strength = Strength.REPLIED
    router: bool | None = None

    @property
    def address(self) -> Address:
        """The address alone: MAC address, tags, IP address."""
        return self.mac, self.tags, self.ip


class Peer(msgspec.Struct, frozen=True):
    """An address the guest asked for or answered, ``count`` times.

    The last time was at ``last_seen``, in seconds. A ``router`` is one by its own word.
    """

    tags: Tags
    ip: bytes
    last_seen: float
    count: int
    router: bool = False


class SeenAnnouncements:
    """The addresses the guest itself was seen to announce since :meth:`begin`.

    Not thread-safe. Of more than 1,024 addresses the rest is not remembered, and counts as missing:
    the host then announces once more what the guest announced.
    """

    def __init__(self) -> None:
        #: Address -> when the guest announced it first, and last.
        self._at: dict[Address, tuple[float, float]] = {}
        self._begun = False

    def begin(self) -> None:
        """Forget all announcements, and remember those from now on."""
        self._at.clear()
        self._begun = True

    def see(self, sighting: Sighting, now: float) -> None:
        """Remember an announcement of the guest's, unless :meth:`begin` was never called."""
        if not (self._begun and sighting.announces):
            return
        # A MAC address is announced by whatever announces the MAC with an IP address.
        for ip in {sighting.ip, None}:
            address = sighting.mac, sighting.tags, ip
            known = self._at.get(address)
            if known is not None or len(self._at) < MAX_SEEN:
                self._at[address] = (known[0] if known else now), now

    def announced_at(self, entry: Entry) -> float | None:
        """Return when the guest was first seen to announce an entry, in seconds, or None."""
        known = self._at.get(entry.address)
        return known[0] if known else None

    def announced_since(self, entry: Entry, since: float | None) -> bool:
        """Return whether the guest was seen to announce an entry at ``since`` or later."""
        known = self._at.get(entry.address)
        return known is not None and (since is None or known[1] >= since)


def announcements(
    entries: Iterable[Entry],
    policy: Policy | None = None,
    routers: Collection[tuple[bytes, Tags]] = (),
) -> Iterator[bytes]:
    """Yield the frames in which the host announces ``entries`` in the guest's name.

    First comes a RARP for each MAC address in each VLAN: then every switch knows the way. After
    that come gratuitous ARPs and unsolicited neighbour advertisements, for the peers' tables. An
    address has the router flag the guest has last said there. Without a word there, the interface
    counts, by MAC address and VLAN tags among ``routers``: a host forwards or does not on an
    interface as a whole.
    """
    policy = policy or Policy()
    allowed = [entry for entry in entries if policy.permits(entry.mac)]
    for mac, tags in dict.fromkeys((entry.mac, entry.tags) for entry in allowed):
        yield frames.rarp(mac, tags)
    for entry in allowed:
        ip = entry.ip
        if ip is None or not policy.permits(entry.mac, ip):
            continue
        if len(ip) == 4:
            yield frames.gratuitous_arp(entry.mac, ip, entry.tags)
        else:
            router = (entry.mac, entry.tags) in routers if entry.router is None else entry.router
            yield frames.unsolicited_na(entry.mac, ip, entry.tags, router=router)
