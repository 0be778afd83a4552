"""The address book of one NIC: the addresses behind the NIC, and the peers of its guest.

Pure; time is passed in. The guest decides what comes in here, so everything is bounded and ages.
What another host claims leaves the book at once: to announce it would be an attack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from godwit.host.net.ethernet import TPID_8021Q

from . import saved
from .dissect import Sighting, is_host_mac
from .entries import Entry, Key, Peer, SeenAnnouncements, Source, Strength, Tags
from .memberships import Memberships
from .saved import (
    MAX_ELSEWHERE,
    MAX_ENTRIES,
    MAX_MET,
    MAX_PEERS,
    AddressBookState,
    SavedElsewhere,
    SavedEntry,
    SavedPeer,
)

#: Addresses from the NIC's filter tables, at most.
MAX_FILTER_ENTRIES = 128
#: An address or a peer that was not seen for so long is forgotten, seconds. A guest that gave an
#: address up may have left the address to another host, which an announcement would harm.
MAX_AGE_S = 3600.0
#: Others' claims that are remembered until a guest arrives, at most.
MAX_CLAIMS = 512
#: The ages of a book that arrives lack the time under way: a claim that is older than an address's
#: last use by less than this may be the later of the two, seconds.
CLAIM_MARGIN_S = 2.0
#: A frame of the guest's may come back to its tap (a switch that reflects, a loop), within seconds.
REFLECTED_S = 0.2


class AddressBook:
    """The addresses behind one NIC, and the peers of its guest.

    Not thread-safe: :class:`.observer.Observer` holds the lock.

    At most 512 addresses come from frames. 384 of them may be of the configured MAC address; those
    of other MAC addresses go first when space is needed, the one not seen for the longest time
    first. So a guest that makes addresses up pushes out neither the configured ones nor, if all
    are of its own MAC address, those of others. The configured address without tag and IP is always
    there. 128 more may come from the filter tables. Of 128 peers, 96 may be such that were met more
    than once; those met once go first.

    Worst memory use, all full of IPv6 addresses under two tags: less than 500 KB.

    Until a guest's first frame, or until a saved book is loaded, others' claims are remembered, so
    that a guest that arrives is measured by what was claimed meanwhile.

    Attributes:
        seen: the addresses the guest itself was seen to announce.
        memberships: the multicast groups the guest receives.
        claims: how many addresses left the book as another host claimed them.
        version: grows with each change of the addresses that the book has.
    """

    def __init__(
        self,
        mac: bytes,
        now: float = 0.0,
        limit: int = MAX_ENTRIES,
        peers_limit: int = MAX_PEERS,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self.seen = SeenAnnouncements()
        self.memberships = Memberships()
        self.claims = 0
        self.version = 0
        self._limit = limit
        #: IP addresses that were forgotten for their age, the oldest first.
        self._former: dict[bytes, None] = {}
        self._peers_limit = peers_limit
        self._max_age = max_age_s
        # Each in the order of last_seen. _fixed has the configured address, then the filter's.
        self._own: dict[Key, Entry] = {}
        self._others: dict[Key, Entry] = {}
        self._fixed: dict[Key, Entry] = {}
        self._met_once: dict[Key, Peer] = {}
        self._met: dict[Key, Peer] = {}
        self._filter: tuple[list[bytes], list[int]] = ([], [])
        #: (tags, ip) -> who claims it, since when; None: the guest is here.
        self._early_claims: dict[Key, tuple[bytes, float]] | None = {}
        #: (tags, mac) -> when another port of the network was seen to use the guest's MAC address.
        self._elsewhere: dict[Key, float] = {}
        self._mac = mac
        self._known_macs: tuple[int, set[bytes]] = (-1, set())
        self.set_configured(mac, now)

    @property
    def mac(self) -> bytes:
        """The configured MAC address, six bytes."""
        return self._mac

    def __len__(self) -> int:
        return len(self._own) + len(self._others) + len(self._fixed)

    # --- what is learned --------------------------------------------------------------------------
    def set_configured(self, mac: bytes, now: float) -> None:
        """Take over the MAC address in force: as configured, or as the guest set the address.

        The addresses of the MAC before are forgotten, unless the filter has that MAC: the guest may
        not receive for it any more, and its peers would be led astray.
        """
        if mac == self._mac and self._fixed:
            return
        before, self._mac = self._mac, mac
        gone = before not in (mac, *self._filter[0])
        known = sorted([*self._own.values(), *self._others.values()], key=_last_seen)
        self._own, self._others = {}, {}
        self._fix(now)
        for entry in known:
            if not (gone and entry.mac == before):
                self._put(entry)

    def set_filter(self, macs: Iterable[bytes], vlans: Iterable[int], now: float) -> None:
        """Take over the driver's filter tables: unicast addresses and 802.1Q VLANs.

        The tables do not show which MAC address is in which VLAN: each may be in each. When that
        makes too many, those of the configured address and those without VLAN come first.
        """
        before = self._filter
        self._filter = (
            list(islice(filter(is_host_mac, macs), MAX_FILTER_ENTRIES)),
            [vid for vid in vlans if 1 <= vid <= 4094][:MAX_FILTER_ENTRIES],
        )
        if self._filter != before:
            self._fix(now)

    def learn(self, sighting: Sighting, now: float) -> None:
        """Learn from what a frame of the guest's shows."""
        self.guest_came()
        self.seen.see(sighting, now)
        mac, tags, ip = sighting.mac, sighting.tags, sighting.ip
        strength = Strength.REPLIED
        if sighting.announces and ip is not None:
            strength = Strength.ANNOUNCED
        elif not sighting.answers:
            strength = Strength.ASKED
        self._put(Entry(mac, tags, ip, now, now, Source.FRAME, strength, sighting.router))
        if sighting.peer is not None:
            self._meet((tags, sighting.peer), now)

    def guest_came(self) -> None:
        """Forget early claims, as the guest is here, and what is claimed is looked up at once."""
        self._early_claims = None

    def claim(self, sighting: Sighting, now: float) -> bool:
        """Take note of another host's frame, and return whether an address left the book.

        The pair of an IP address of the guest's and a MAC address that is not the guest's is a
        claim. The MAC address stays in the book.
        """
        if sighting.ip is None:
            return False
        key = sighting.tags, sighting.ip
        early = self._early_claims
        if early is not None:
            early.pop(key, None)
            early[key] = sighting.mac, now
            if len(early) > MAX_CLAIMS:
                del early[next(iter(early))]
        if sighting.router is not None:
            for peers in (self._met, self._met_once):
                if key in peers and peers[key].router != sighting.router:
                    peers[key] = msgspec.structs.replace(peers[key], router=sighting.router)
        return self._give_up(key, sighting.mac)

    def used_elsewhere(self, mac: bytes, tags: Tags, now: float) -> None:
        """Take note that a frame with a MAC address of the guest's came from the network.

        None of its addresses is announced, unless the guest uses the MAC address later. The
        configured MAC address is the NIC's own, and stays.
        """
        if mac == self._mac or mac not in self.macs():
            return
        used = self.last_use(mac, tags)
        if used is not None and now < used + REFLECTED_S:
            return
        key = tags, mac
        self._elsewhere.pop(key, None)
        self._elsewhere[key] = now
        self.version += 1
        if len(self._elsewhere) > MAX_ELSEWHERE:
            del self._elsewhere[next(iter(self._elsewhere))]

    def forget_old(self, now: float) -> None:
        """Forget the addresses and peers that were last seen too long ago."""
        oldest = now - self._max_age
        for entries in (self._own, self._others):
            for key in [key for key, entry in entries.items() if entry.last_seen < oldest]:
                self._former_too(entries.pop(key).ip)
                self.version += 1
        for key in [key for key, at in self._elsewhere.items() if at < oldest]:
            del self._elsewhere[key]
        self.memberships.forget_old(oldest)
        for peers in (self._met_once, self._met):
            for key in [key for key, peer in peers.items() if peer.last_seen < oldest]:
                del peers[key]

    def _former_too(self, ip: bytes | None) -> None:
        """Remember an address that is forgotten, and forget the oldest of those for good."""
        if ip is not None:
            self._former.pop(ip, None)
            self._former[ip] = None
            if len(self._former) > saved.MAX_FORMER:
                del self._former[next(iter(self._former))]

    # --- what is known ----------------------------------------------------------------------------
    def entries(self) -> list[Entry]:
        """Return all addresses, the most important first.

        That is the configured address, then others of the same MAC, the latest first, then the
        filter's, then those of other MACs, the latest first.
        """
        base, *fixed = self._fixed.values()
        found = [base, *reversed(self._own.values()), *fixed, *reversed(self._others.values())]
        if not self._elsewhere:
            return found
        used: dict[Key, float] = {}
        for entry in found:
            if entry.source in (Source.FRAME, Source.SAVED):
                key = entry.tags, entry.mac
                used[key] = max(entry.last_seen, used.get(key, entry.last_seen))
        elsewhere = {
            key for key, at in self._elsewhere.items() if used.get(key, float("-inf")) < at
        }
        return [entry for entry in found if (entry.tags, entry.mac) not in elsewhere]

    def driver_macs(self) -> set[bytes]:
        """Return the MAC addresses that the driver has given to the NIC."""
        return {self._mac, *self._filter[0]}

    def macs(self) -> set[bytes]:
        """Return all MAC addresses behind the NIC, elsewhere or not."""
        version, macs = self._known_macs
        if version != self.version:
            entries = (*self._fixed.values(), *self._own.values(), *self._others.values())
            macs = {self._mac, *(entry.mac for entry in entries)}
            self._known_macs = self.version, macs
        return macs

    def ips(self) -> set[bytes]:
        """Return all IP addresses in the book."""
        entries = (*self._own.values(), *self._others.values())
        return {entry.ip for entry in entries if entry.ip is not None}

    @property
    def expects_guest(self) -> bool:
        """True until the guest's first frame, or until a saved book was loaded."""
        return self._early_claims is not None

    def find(self, tags: Tags, ip: bytes) -> Entry | None:
        """Return the entry with an IP address in a network, or None."""
        key = tags, ip
        return self._own.get(key) or self._others.get(key)

    def last_use(self, mac: bytes, tags: Tags | None = None) -> float | None:
        """Return when the guest last sent from a MAC address, on any host, seconds, or None.

        With ``tags``, only frames with these VLAN tags count.
        """
        entries = (*self._fixed.values(), *self._own.values(), *self._others.values())
        used = [
            entry.last_seen
            for entry in entries
            if entry.mac == mac
            and entry.source in (Source.FRAME, Source.SAVED)
            and tags in (None, entry.tags)
        ]
        return max(used, default=None)

    def routers(self) -> set[tuple[bytes, Tags]]:
        """Return the MAC address and VLAN tags of each interface on which the guest is a router."""
        entries = (*self._own.values(), *self._others.values())
        return {(entry.mac, entry.tags) for entry in entries if entry.router is True}

    def peers(self) -> list[Peer]:
        """Return the peers: routers first, then the ones met most often, then the latest first.

        The first is likely to be a gateway.
        """
        both = [*self._met.values(), *self._met_once.values()]
        return sorted(
            both, key=lambda peer: (peer.router, peer.count, peer.last_seen), reverse=True
        )

    # --- the saved state --------------------------------------------------------------------------
    def save(self, now: float) -> AddressBookState:
        """Return what was learned from frames, without what is too old."""
        self.forget_old(now)
        return AddressBookState(
            [
                SavedEntry(
                    entry.mac,
                    saved.from_tags(entry.tags),
                    entry.ip,
                    _age(entry, now),
                    entry.strength,
                    entry.router,
                )
                for entry in (*self._own.values(), *self._others.values())
            ],
            [
                SavedPeer(
                    saved.from_tags(peer.tags), peer.ip, _age(peer, now), peer.count, peer.router
                )
                for peer in (*self._met.values(), *self._met_once.values())
            ],
            [
                SavedElsewhere(mac, saved.from_tags(tags), max(0.0, now - at))
                for (tags, mac), at in self._elsewhere.items()
            ],
            self.memberships.save(now),
            list(self._former),
        )

    def load(self, state: AddressBookState, now: float) -> None:
        """Replace what was learned by a state that msgspec has decoded.

        ``now`` is the present by the book's clock, less the time that the state was under way
        (in a file, say). What others have claimed here meanwhile does not come in.

        Raises:
            StreamError: the state is refused, and nothing changed; names the field.
        """
        saved.check(state)
        entries = [
            Entry(
                one.mac,
                saved.to_tags(one.tags),
                one.ip,
                now - one.age,
                None,
                Source.SAVED,
                Strength(one.strength),
                one.router,
            )
            for one in state.entries
        ]
        peers = [
            Peer(saved.to_tags(one.tags), one.ip, now - one.age, one.count, one.router)
            for one in state.peers
        ]
        self._own, self._others, self._met, self._met_once = {}, {}, {}, {}
        self._former = dict.fromkeys(state.former)
        for entry in sorted(entries, key=_last_seen):
            self._put(entry)
        for peer in sorted(peers, key=_last_seen):
            self._keep((peer.tags, peer.ip), peer)
        self._elsewhere = {
            (saved.to_tags(one.tags), one.mac): now - one.age
            for one in sorted(state.elsewhere, key=_reversed_age)
        }
        self.memberships.load(state.memberships, now)
        early, self._early_claims = self._early_claims or {}, None
        for key, (mac, at) in early.items():
            known = self.find(*key)
            if known is not None and at > known.last_seen - CLAIM_MARGIN_S:
                self._give_up(key, mac)
        self.forget_old(now)

    # --- inside -----------------------------------------------------------------------------------
    def _put(self, entry: Entry) -> None:
        key = (entry.tags, entry.ip or entry.mac)
        if key in self._fixed:
            self._fixed[key] = entry
            return
        # Taken out first: what is put in is the latest. Another MAC may have had the IP.
        known = self.find(*key)
        if known is None or known.mac != entry.mac:
            self.version += 1
        if known is not None and known.mac == entry.mac:
            entry = msgspec.structs.replace(
                entry,
                strength=max(known.strength, entry.strength),
                router=known.router if entry.router is None else entry.router,
            )
        elif known is not None and known.strength > entry.strength:
            self._put(Entry(entry.mac, entry.tags, None, *_times(entry), entry.source))
            return
        self._own.pop(key, None)
        self._others.pop(key, None)
        (self._own if entry.mac == self._mac else self._others)[key] = entry
        if len(self._own) > self._limit * 3 // 4:
            del self._own[next(iter(self._own))]
        if len(self._own) + len(self._others) > self._limit:
            del self._others[next(iter(self._others))]

    def _give_up(self, key: Key, claimant: bytes) -> bool:
        """Take out an IP address that another's MAC address claims, and return whether one was."""
        known = self.find(*key)
        if known is None or known.ip is None:
            return False
        if claimant in self.macs() and not self._is_elsewhere(key[0], claimant):
            return False
        self._own.pop(key, None)
        self._others.pop(key, None)
        self.claims += 1
        self.version += 1
        rest = (*self._fixed.values(), *self._own.values(), *self._others.values())
        if not any((one.mac, one.tags) == (known.mac, known.tags) for one in rest):
            self._put(Entry(known.mac, known.tags, None, *_times(known), known.source))
            # The MAC address was not seen now: it goes as soon as it would have gone.
            self._own, self._others = map(_by_last_seen, (self._own, self._others))
        return True

    def _is_elsewhere(self, tags: Tags, mac: bytes) -> bool:
        """Return whether the network used a MAC address of the guest's later than the guest did."""
        at = self._elsewhere.get((tags, mac))
        if at is None:
            return False
        used = self.last_use(mac, tags)
        return used is None or used < at

    def _fix(self, now: float) -> None:
        """Build the addresses of configuration and filter anew, and keep what frames have shown."""
        self.version += 1
        macs, vlans = self._filter
        old = self._fixed
        self._fixed = fixed = {}
        key: Key = ((), self._mac)
        fixed[key] = Entry(self._mac, (), None, now, None, Source.CONFIG)
        for mac, tags in _filtered(self._mac, macs, vlans):
            if len(fixed) > MAX_FILTER_ENTRIES:
                break
            fixed.setdefault((tags, mac), Entry(mac, tags, None, now, None, Source.FILTER))
        for key in fixed:
            for known in (old, self._own, self._others):
                entry = known.pop(key, None)
                if entry is not None and entry.confirmed is not None:
                    fixed[key] = entry

    def _meet(self, key: Key, now: float) -> None:
        old = self._met.pop(key, None) or self._met_once.pop(key, None)
        if old is None:
            self.version += 1
        count = min(old.count + 1, MAX_MET) if old else 1
        self._keep(key, Peer(key[0], key[1], now, count, old is not None and old.router))

    def _keep(self, key: Key, peer: Peer) -> None:
        (self._met if peer.count > 1 else self._met_once)[key] = peer
        if len(self._met) > self._peers_limit * 3 // 4:
            del self._met[next(iter(self._met))]
        if len(self._met) + len(self._met_once) > self._peers_limit:
            del self._met_once[next(iter(self._met_once))]


def _filtered(own: bytes, macs: list[bytes], vlans: list[int]) -> Iterator[tuple[bytes, Tags]]:
    for vid in vlans[: MAX_FILTER_ENTRIES // 2]:
        yield own, ((TPID_8021Q, vid),)
    for mac in macs:
        yield mac, ()
    for mac in (own, *macs):
        for vid in vlans:
            yield mac, ((TPID_8021Q, vid),)


def _by_last_seen(entries: dict[Key, Entry]) -> dict[Key, Entry]:
    return dict(sorted(entries.items(), key=lambda item: item[1].last_seen))


def _last_seen(one: Entry | Peer) -> float:
    return one.last_seen


def _times(entry: Entry) -> tuple[float, float | None]:
    return entry.last_seen, entry.confirmed


def _reversed_age(one: SavedElsewhere) -> float:
    return -one.age


def _age(one: Entry | Peer, now: float) -> float:
    return max(0.0, now - one.last_seen)
