"""The uplink of one NIC: the NIC's way into the network, as the announcer sees the way.

An uplink is the NIC's model, what is known of the guest's addresses, and the tap's port. Everything
the host sends in the guest's name goes through the uplink, so that the observer can
distinguish the host's frames from the guest's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from godwit.errors import GodwitError
from godwit.host.loop import Clock
from godwit.hw.nic.nic import Nic

from . import frames
from .addresses import Address, Entry, Peer, announcements
from .dissect import Sighting
from .observer import Observer
from .policy import Policy

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


class Uplink:
    """One NIC's way into the network, thread-safe as its parts are.

    Attributes:
        nic: the NIC.
        observer: keeps the address book, and sees what the guest announces.
        watched: whether the tap's frames come to the observer; if not, the guest's ack has to do.
        port: the tap's port in the host's network.
        policy: which addresses the host may announce.
        on_seen: called for each announcement of the guest's own that was seen.
    """

    def __init__(self, nic: Nic, clock: Clock, policy: Policy | None = None) -> None:
        self.nic = nic
        self.on_seen: Callable[[Sighting], None] = lambda sighting: None
        self.observer = Observer(nic.mac, clock.now(), lambda sighting: self.on_seen(sighting))
        self.watched = False
        self.port: PortState = AlwaysReady()
        self.policy = policy or Policy()
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

    def missing(self) -> list[Entry]:
        """Return the entries the guest was not seen to announce since :meth:`begin`."""
        if not self.watched:
            return []
        with self.observer.book(self._clock.now()) as book:
            missing = book.seen.missing(book.entries())
        return self._permitted(missing)

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

    def announce(self, entries: Iterable[Entry]) -> int:
        """Announce entries in the guest's name, and return the number of frames sent.

        Raises:
            OSError, GodwitError: the backend did not take a frame; the rest was not sent.
        """
        entries = list(entries)
        count = 0
        for frame in announcements(entries, self.policy):
            self.send(frame)
            count += 1
        now = self._clock.now()
        for entry in entries:
            self._host_announced.setdefault(entry.address, now)
        return count

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
        return [entry for entry in entries if self.policy.permits(entry.mac, entry.ip)]

    def _refresh(self) -> None:
        """Take over what the driver has set in its NIC since the last time."""
        now = self._clock.now()
        filter_info, mac = self.nic.rx_filter(), self.nic.mac
        with self.observer.book(now) as book:
            book.set_configured(mac, now)
            book.set_filter(filter_info.unicast_table, filter_info.vlan_table, now)
