"""The uplink of one NIC: the NIC's way into the network, as the announcer sees the way.

An uplink is the NIC's model, what is known of the guest's addresses, and the tap's port. Everything
the host sends in the guest's name goes through the uplink, so that the observer can
distinguish the host's frames from the guest's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from godwit.errors import GodwitError
from godwit.host.loop import Clock
from godwit.hw.nic.nic import Nic

from . import frames
from .addresses import AddressBook
from .dissect import Sighting
from .entries import Address, Entry, Peer, Tags, announcements
from .memberships import Membership, report
from .observer import Observer
from .policy import Policy

if TYPE_CHECKING:
    from .gate import Gate, Original

#: Networks that are switched back, at most, the most important first.
_MAX_SWITCHED_BACK = 64


class PortState(Protocol):
    """The state of a tap's port in the host's network: :class:`godwit.host.net.links.Port`."""

    #: Why frames would be lost; None: frames reach the network.
    not_ready_reason: str | None
    #: Index of the tap, and of its bridge; 0: none.
    index: int
    bridge: int
    #: What may be wrong, or meant so, while frames leave; None: nothing.
    warning: str | None

    def refresh(self) -> None:
        """Read the port's state from the kernel again."""


class AlwaysReady:
    """A port whose state the kernel does not report, and that is taken for ready."""

    not_ready_reason: str | None = None
    index = bridge = 0
    warning: str | None = None

    def refresh(self) -> None:
        """Read nothing: the state stays unknown."""


class Sent(NamedTuple):
    """The outcome of an announcement of the host's: frames sent, and the first error if any."""

    frames: int
    error: Exception | None


def _ever(tags: Tags) -> float | None:
    return None


class Uplink:
    """One NIC's way into the network, thread-safe as its parts are.

    Attributes:
        nic: the NIC.
        observer: keeps the address book, and sees what the guest announces.
        watched: whether the tap's frames come to the observer; if not, the guest's ack has to do.
        listens: whether others' frames to the guest come to the observer; if not, no question is
            put, and no claim is known.
        siblings: the uplinks of all the VM's NICs, in order. Of those that share an address in
            one network, only the one that the guest used last announces the address.
        port: the tap's port in the host's network.
        policy: which addresses the host may announce.
        gate: holds frames of a copied guest back; None: the guest is no copy.
        on_seen: called for each announcement of the guest's own that was seen.
    """

    def __init__(self, nic: Nic, clock: Clock, policy: Policy | None = None) -> None:
        self.nic = nic
        self.on_seen: Callable[[Sighting], None] = lambda sighting: None
        self.observer = Observer(nic.mac, clock.now(), lambda sighting: self.on_seen(sighting))
        self.observer.is_siblings = self._is_siblings
        self.watched = self.listens = False
        self.siblings: Sequence[Uplink] = ()
        self.port: PortState = AlwaysReady()
        self.policy = policy or Policy()
        self.gate: Gate | None = None
        self._clock = clock
        self._host_announced: dict[Address, float] = {}

    def begin(self) -> None:
        """Begin an announcement: what guest and host announced before counts no more."""
        self._refresh()
        with self.observer.book(self._clock.now()) as book:
            book.seen.begin()
        self._host_announced = {}

    def entries(self) -> list[Entry]:
        """Return the guest's addresses that may be announced, the most important first."""
        self._refresh()
        with self.observer.book(self._clock.now()) as book:
            entries = book.entries()
        return self._permitted(entries)

    def announced(self) -> list[Entry]:
        """Return the entries announced by guest or host since :meth:`begin`."""
        with self.observer.book(self._clock.now()) as book:
            shown = [one for one in book.entries() if book.seen.announced_at(one) is not None]
        by_host = [one for one in self.entries() if one.address in self._host_announced]
        return self._permitted([*shown, *by_host])

    def macs(self) -> frozenset[bytes]:
        """Return all MAC addresses behind the NIC, announced or not."""
        self._refresh()
        with self.observer.book(self._clock.now()) as book:
            return frozenset(book.macs())

    @property
    def claims(self) -> int:
        """The number of addresses gone from the address book as another host claimed them."""
        with self.observer.book(self._clock.now()) as book:
            return book.claims

    def has(self, tags: Tags, ip: bytes) -> bool:
        """Return whether the guest has an IP address in a network, by the address book."""
        with self.observer.book(self._clock.now()) as book:
            return book.find(tags, ip) is not None

    def missing(self, since: Callable[[Tags], float | None] = _ever) -> list[Entry]:
        """Return the entries the guest was not seen to announce since :meth:`begin`.

        In a network for which ``since(tags)`` returns a time, what was seen before does not count.
        """
        if not self.watched:
            return []
        with self.observer.book(self._clock.now()) as book:
            missing = [
                entry
                for entry in book.entries()
                if not book.seen.announced_since(entry, since(entry.tags))
            ]
        return self._permitted(missing)

    def memberships(self, shown_since: Callable[[Tags], float] | None = None) -> list[Membership]:
        """Return the guest's multicast memberships.

        The ones the guest reported since ``shown_since(tags)``, if given, are left out.
        """
        with self.observer.book(self._clock.now()) as book:
            return [
                one
                for one in book.memberships
                if shown_since is None or one.last_seen < shown_since(one.tags)
            ]

    def peers(self) -> list[Peer]:
        """Return the guest's peers, the one met most often first."""
        with self.observer.book(self._clock.now()) as book:
            return book.peers()

    def seen_at(self, entries: Iterable[Entry]) -> list[float | None]:
        """Return, for each entry, when the guest was first seen to announce the entry, or None."""
        with self.observer.book(self._clock.now()) as book:
            return [book.seen.announced_at(entry) for entry in entries]

    def host_announced_at(self, entry: Entry) -> float | None:
        """Return when the host first announced an entry since :meth:`begin`, or None."""
        return self._host_announced.get(entry.address)

    def announce(self, entries: Iterable[Entry], *, base: bool = True) -> Sent:
        """Announce entries in the guest's name, each even if another fails.

        Without ``base``, the RARP of the NIC's MAC address without a tag is left out.
        """
        entries = list(entries)
        with self.observer.book(self._clock.now()) as book:
            routers = book.routers()
        wanted = list(announcements(entries, self.policy, routers))
        if not base:
            left_out = frames.rarp(self.nic.mac)
            wanted = [frame for frame in wanted if frame != left_out]
        sent = self._send_all(wanted)
        if sent.error is None:
            now = self._clock.now()
            for entry in entries:
                self._host_announced.setdefault(entry.address, now)
        return sent

    def report(self, memberships: Sequence[Membership]) -> Sent:
        """Report multicast memberships in the guest's name, each even if another fails."""
        if not memberships:
            return Sent(0, None)
        known = {entry.address for entry in self.entries()}
        allowed = {(mac, tags) for mac, tags, _ in known}
        wanted = [
            # From nobody (RFC 3376 section 4.2.13, RFC 3590) if the address may be another's.
            one if (one.mac, one.tags, one.ip) in known else one._replace(ip=bytes(len(one.ip)))
            for one in memberships
            if (one.mac, one.tags) in allowed
        ]
        return self._send_all([report(one) for one in wanted])

    def _send_all(self, wanted: Iterable[bytes]) -> Sent:
        count, first_error = 0, None
        for frame in wanted:
            try:
                self.send(frame)
                count += 1
            except (GodwitError, OSError) as error:
                first_error = first_error or error
        return Sent(count, first_error)

    def rarp(self, entries: Iterable[Entry]) -> bytes | None:
        """Return the RARP of the NIC's MAC address without a tag, if among ``entries``."""
        mac = self.nic.mac
        found = any(entry.mac == mac and not entry.tags for entry in entries)
        return frames.rarp(mac) if found else None

    def layer2_updates(self, cookie: Callable[[int], bytes], limit: int) -> list[bytes]:
        """Return a layer 2 update for each of the guest's networks, at most ``limit``.

        The most important network comes first. ``cookie(number)`` is what the frame of that number
        carries: with one, the frame is a marker frame. Switches learn the guest's place from the
        frames, hosts nothing.
        """
        places = list(dict.fromkeys((entry.mac, entry.tags) for entry in self.entries()))[:limit]
        return [
            frames.layer2_update(mac, tags, cookie(number))
            for number, (mac, tags) in enumerate(places)
        ]

    def hold_back(self, original: Original, on_own: Callable[[bytes], None]) -> None:
        """Let nothing leave by the addresses of a guest that this one is a copy of.

        ``on_own`` is as of :class:`.gate.Gate`.
        """
        from .gate import Gate  # for the few that are copies

        self.gate = Gate(original, on_own, self._clock.now)
        self.nic.gate = self.gate.passes

    def switch_back(self) -> None:
        """Have switches learn that the guest is here, and pass over a frame that fails."""
        try:
            for frame in self.layer2_updates(lambda number: b"", _MAX_SWITCHED_BACK):
                self.nic.send_from_host(frame)
        except (GodwitError, OSError):
            pass  # the announcement follows, and reports it

    def send(self, frame: bytes) -> None:
        """Send a frame to the network as if the guest had sent the frame.

        Raises:
            OSError, GodwitError: the backend did not take the frame.
        """
        self.observer.host_sends(frame, self._clock.now())
        self.nic.send_from_host(frame)

    def _permitted(self, entries: Iterable[Entry]) -> list[Entry]:
        found: dict[Address, Entry] = {}
        for entry in self._without_siblings(entries):
            if not self.policy.permits(entry.mac, entry.ip):
                # The MAC address may be, where the IP address may not.
                if not self.policy.permits(entry.mac):
                    continue
                entry = msgspec.structs.replace(entry, ip=None)
            found.setdefault(entry.address, entry)
        return list(found.values())

    def _is_siblings(self, mac: bytes) -> bool:
        """Return whether a MAC address is another NIC's of the guest's, by configuration or driver.

        What is behind another NIC does not count: a guest may bridge two networks.
        """
        others = (other for other in self.siblings if other is not self)
        return any(mac == other.nic.mac or mac in other.observer.driver_macs() for other in others)

    def _without_siblings(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries no other NIC of the VM has used later in the same network.

        Two NICs with one MAC address are taken for ports of one network, as in a bond: a frame at
        the sleeping one would move the MAC address there. Two pairs with one IP address are in one
        network if the taps are in one bridge.
        """
        kept = list(entries)
        place = self.siblings.index(self) if self in self.siblings else 0
        mine = {entry.mac for entry in kept}
        for number, other in enumerate(self.siblings):
            same_bridge = self.port.bridge == other.port.bridge != 0
            if other is self or not (same_bridge or mine & other.observer.macs()):
                continue
            with self.observer.book(self._clock.now()) as book:
                uses = {mac: book.last_use(mac) for mac in {entry.mac for entry in kept}}
            with other.observer.book(self._clock.now()) as book:
                gone = {
                    mac
                    for mac, used in uses.items()
                    if mac in book.macs()
                    and (_since(book.last_use(mac)), -number) > (_since(used), -place)
                }
                kept = [
                    entry
                    for entry in kept
                    if entry.mac not in gone and not (same_bridge and _is_later(book, entry))
                ]
        return kept

    def _refresh(self) -> None:
        """Take over what the driver has set in its NIC since the last time."""
        now = self._clock.now()
        filter_info, mac = self.nic.rx_filter(), self.nic.mac
        with self.observer.book(now) as book:
            book.set_configured(mac, now)
            book.set_filter(filter_info.unicast_table, filter_info.vlan_table, now)


def _since(at: float | None) -> float:
    return float("-inf") if at is None else at


def _is_later(book: AddressBook, entry: Entry) -> bool:
    """Return whether a book has a preferred pair with an entry's IP address."""
    if entry.ip is None:
        return False
    other = book.find(entry.tags, entry.ip)
    return other is not None and (other.strength, other.last_seen) > (
        entry.strength,
        entry.last_seen,
    )
