"""Which addresses a guest uses behind one NIC, and whom it talks to. Pure; time is passed in.

The guest decides what comes in here, so all of it is bounded and ages. An address is one of a MAC
address alone, or of a MAC address with an IP address, within a stack of VLAN tags.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator

import msgspec

from godwit.host.net.ethernet import TPID_8021Q

from . import frames, saved
from .dissect import Sighting, is_host_mac
from .frames import Tag
from .policy import Policy
from .saved import ENTRIES, PEERS, AddressBookState, SavedEntry, SavedPeer

#: Addresses that the NIC's filter tables tell of, at most.
FILTER_ENTRIES = 128
#: An address or a peer that was not heard of for so long is forgotten, s. A guest that gave an
#: address up may have left it to another host: to announce it then would harm that one.
MAX_AGE_S = 3600.0

_Tags = tuple[Tag, ...]
#: An IP address within its VLAN has one owner: the key is (tags, ip), or (tags, mac) without one.
_Key = tuple[_Tags, bytes]


class Source(enum.Enum):
    """How an address came to be known."""

    CONFIG = "config"
    FILTER = "filter"
    FRAME = "frame"
    SAVED = "saved"


class Entry(msgspec.Struct, frozen=True):
    """One address.

    Attributes:
        mac: six bytes.
        tags: VLAN tags from the outside in.
        ip: 4 or 16 bytes; None: none is known.
        last_seen: when it was last heard of, in any way and on any host; s.
        confirmed: when the guest last sent a frame from it on this host, s; None: not yet.
        source: the way it was last heard of.
    """

    mac: bytes
    tags: _Tags
    ip: bytes | None
    last_seen: float
    confirmed: float | None
    source: Source


class Peer(msgspec.Struct, frozen=True):
    """Whom the guest asked for, or answered: ``count`` times, last at ``last_seen`` (s)."""

    tags: _Tags
    ip: bytes
    last_seen: float
    count: int


class AddressBook:
    """The addresses behind one NIC, and its guest's peers. Not thread-safe.

    At most 512 addresses come from frames. 384 of them may be of the configured MAC address; those
    of others go first when room is needed, the one not heard of for the longest time first. So a
    guest that makes addresses up pushes out neither the configured ones nor, if they are all its
    own, those of others. The configured address without tag and IP is always there. 128 more may
    come from the filter tables. Of 128 peers, 96 may be such that were met more than once; those
    met once go first.

    Worst memory use, all full of IPv6 addresses under two tags: less than 300 KB.
    """

    def __init__(
        self,
        mac: bytes,
        now: float = 0.0,
        limit: int = ENTRIES,
        peers_limit: int = PEERS,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._limit = limit
        self._peers_limit = peers_limit
        self._max_age = max_age_s
        # Each in the order of last_seen. _fixed has the configured address, then the filter's.
        self._own: dict[_Key, Entry] = {}
        self._others: dict[_Key, Entry] = {}
        self._fixed: dict[_Key, Entry] = {}
        self._met_once: dict[_Key, Peer] = {}
        self._met: dict[_Key, Peer] = {}
        self._filter: tuple[list[bytes], list[int]] = ([], [])
        self._mac = mac
        self.set_configured(mac, now)

    @property
    def mac(self) -> bytes:
        """The configured MAC address."""
        return self._mac

    def __len__(self) -> int:
        return len(self._own) + len(self._others) + len(self._fixed)

    # --- what is heard ----------------------------------------------------------------------------
    def set_configured(self, mac: bytes, now: float) -> None:
        """The MAC address in force: as configured, or as the guest set it.

        What is known of the one before is forgotten, if no filter has it: the guest may not listen
        to it any more, and to announce it would lead its peers astray.
        """
        before, self._mac = self._mac, mac
        gone = before not in (mac, *self._filter[0])
        known = sorted([*self._own.values(), *self._others.values()], key=_last_seen)
        self._own, self._others = {}, {}
        self._fix(now)
        for entry in known:
            if not (gone and entry.mac == before):
                self._put(entry)

    def set_filter(self, macs: Iterable[bytes], vlans: Iterable[int], now: float) -> None:
        """What the driver asked the NIC for: unicast addresses and 802.1Q VLANs, none but these.

        The tables do not say which MAC address is in which VLAN: each may be in each. When that is
        too many, those of the configured address and those without VLAN come first.
        """
        self._filter = (
            [mac for _, mac in zip(range(FILTER_ENTRIES), filter(is_host_mac, macs), strict=False)],
            [vid for vid in vlans if 1 <= vid <= 4094][:FILTER_ENTRIES],
        )
        self._fix(now)

    def learn(self, sighting: Sighting, now: float) -> None:
        """A frame of the guest's."""
        mac, tags, ip = sighting.mac, sighting.tags, sighting.ip
        self._put(Entry(mac, tags, ip, now, now, Source.FRAME))
        if sighting.peer is not None:
            self._meet((tags, sighting.peer), now)

    def forget_old(self, now: float) -> None:
        """Forget what was last heard of too long ago."""
        oldest = now - self._max_age
        for entries in (self._own, self._others):
            for key in [key for key, entry in entries.items() if entry.last_seen < oldest]:
                del entries[key]
        for peers in (self._met_once, self._met):
            for key in [key for key, peer in peers.items() if peer.last_seen < oldest]:
                del peers[key]

    # --- what is known ----------------------------------------------------------------------------
    def entries(self) -> list[Entry]:
        """All addresses, the most important first.

        The configured one; its others, the latest first; what the filter says; other MACs', the
        latest first.
        """
        base, *fixed = self._fixed.values()
        return [base, *reversed(self._own.values()), *fixed, *reversed(self._others.values())]

    def peers(self) -> list[Peer]:
        """The peers, the one met most often first, and of these the latest: likely a gateway."""
        both = [*self._met.values(), *self._met_once.values()]
        return sorted(both, key=lambda peer: (peer.count, peer.last_seen), reverse=True)

    # --- the saved state --------------------------------------------------------------------------
    def save(self, now: float) -> AddressBookState:
        """What was learned, without what is too old."""
        self.forget_old(now)
        return AddressBookState(
            [
                SavedEntry(entry.mac, saved.from_tags(entry.tags), entry.ip, _age(entry, now))
                for entry in (*self._own.values(), *self._others.values())
            ],
            [
                SavedPeer(saved.from_tags(peer.tags), peer.ip, _age(peer, now), peer.count)
                for peer in (*self._met.values(), *self._met_once.values())
            ],
        )

    def load(self, state: AddressBookState, now: float) -> None:
        """Replace what was learned. Nothing changes if the state is refused.

        Raises:
            StreamError: names the field that cannot be.
        """
        saved.check(state)
        entries = [
            Entry(one.mac, saved.to_tags(one.tags), one.ip, now - one.age, None, Source.SAVED)
            for one in state.entries
        ]
        peers = [
            Peer(saved.to_tags(one.tags), one.ip, now - one.age, one.count) for one in state.peers
        ]
        self._own, self._others, self._met, self._met_once = {}, {}, {}, {}
        for entry in sorted(entries, key=_last_seen):
            self._put(entry)
        for peer in sorted(peers, key=_last_seen):
            self._keep((peer.tags, peer.ip), peer)
        self.forget_old(now)

    # --- inside -----------------------------------------------------------------------------------
    def _put(self, entry: Entry) -> None:
        key = (entry.tags, entry.ip or entry.mac)
        if key in self._fixed:
            self._fixed[key] = entry
            return
        # Taken out first: what is put in is the latest. Another MAC may have had the IP.
        self._own.pop(key, None)
        self._others.pop(key, None)
        (self._own if entry.mac == self._mac else self._others)[key] = entry
        if len(self._own) > self._limit * 3 // 4:
            del self._own[next(iter(self._own))]
        if len(self._own) + len(self._others) > self._limit:
            del self._others[next(iter(self._others))]

    def _fix(self, now: float) -> None:
        """Build anew what configuration and filter say; what was heard from these stays known."""
        macs, vlans = self._filter
        old = self._fixed
        self._fixed = fixed = {}
        key: _Key = ((), self._mac)
        fixed[key] = Entry(self._mac, (), None, now, None, Source.CONFIG)
        for mac, tags in _filtered(self._mac, macs, vlans):
            if len(fixed) > FILTER_ENTRIES:
                break
            fixed.setdefault((tags, mac), Entry(mac, tags, None, now, None, Source.FILTER))
        for key in fixed:
            for known in (old, self._own, self._others):
                heard = known.pop(key, None)
                if heard is not None and heard.confirmed is not None:
                    fixed[key] = heard

    def _meet(self, key: _Key, now: float) -> None:
        old = self._met.pop(key, None) or self._met_once.pop(key, None)
        count = min(old.count + 1, saved.MOST) if old else 1
        self._keep(key, Peer(key[0], key[1], now, count))

    def _keep(self, key: _Key, peer: Peer) -> None:
        (self._met if peer.count > 1 else self._met_once)[key] = peer
        if len(self._met) > self._peers_limit * 3 // 4:
            del self._met[next(iter(self._met))]
        if len(self._met) + len(self._met_once) > self._peers_limit:
            del self._met_once[next(iter(self._met_once))]


class Seen:
    """Which addresses the guest itself has announced since a mark. Not thread-safe.

    Of more than 1,024 addresses the rest is not noted, and counts as missing: the host then says
    once more what the guest said.
    """

    LIMIT = 1024

    def __init__(self) -> None:
        self._at: dict[tuple[bytes, _Tags, bytes | None], float] = {}
        #: When :meth:`begin` was called last, s.
        self.began: float | None = None

    def begin(self, now: float) -> None:
        """The mark: nothing has been announced yet."""
        self._at.clear()
        self.began = now

    def note(self, sighting: Sighting, now: float) -> None:
        """A frame of the guest's; nothing is noted before the first mark."""
        if self.began is None or not sighting.announces:
            return
        for ip in {sighting.ip, None}:
            if len(self._at) < self.LIMIT:
                self._at.setdefault((sighting.mac, sighting.tags, ip), now)

    def when(self, entry: Entry) -> float | None:
        """When it was announced first, s; None: it was not.

        A MAC address alone is announced by whatever announces it, with an IP address or without.
        """
        return self._at.get((entry.mac, entry.tags, entry.ip))

    def missing(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that were not announced, in the same order."""
        return [entry for entry in entries if self.when(entry) is None]


def announcements(entries: Iterable[Entry], policy: Policy | None = None) -> Iterator[bytes]:
    """The frames in which the host announces ``entries`` in the guest's name.

    First a RARP for each MAC address in each VLAN: then every switch knows the way. After that
    gratuitous ARPs and unsolicited neighbour advertisements, for the peers' tables.
    """
    policy = policy or Policy()
    allowed = [entry for entry in entries if policy.permits(entry.mac)]
    for mac, tags in dict.fromkeys((entry.mac, entry.tags) for entry in allowed):
        yield frames.rarp(mac, tags)
    for entry in allowed:
        ip = entry.ip
        if ip is None or not policy.permits(entry.mac, ip):
            continue
        speak = frames.gratuitous_arp if len(ip) == 4 else frames.unsolicited_na
        yield speak(entry.mac, ip, entry.tags)


def _filtered(own: bytes, macs: list[bytes], vlans: list[int]) -> Iterator[tuple[bytes, _Tags]]:
    for vid in vlans[: FILTER_ENTRIES // 2]:
        yield own, ((TPID_8021Q, vid),)
    for mac in macs:
        yield mac, ()
    for mac in (own, *macs):
        for vid in vlans:
            yield mac, ((TPID_8021Q, vid),)


def _last_seen(one: Entry | Peer) -> float:
    return one.last_seen


def _age(one: Entry | Peer, now: float) -> float:
    return max(0.0, now - one.last_seen)
