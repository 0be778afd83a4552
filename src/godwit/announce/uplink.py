"""One NIC as the announcer deals with it: the model, what is known of its guest, its port.

Everything that the host sends in the guest's name goes through here, so that the observer can tell
it from what the guest sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from godwit.errors import GodwitError
from godwit.host.loop import Clock
from godwit.hw.nic.nic import Nic

from . import frames
from .addresses import Entry, Peer, announcements
from .dissect import Sighting
from .observer import Observer
from .policy import Policy

#: Networks that are drawn back, the most important first.
_MOST = 64


class PortState(Protocol):
    """Whether what the tap sends reaches the network: :class:`godwit.host.net.links.Port`."""

    #: Why it would not; None: it does.
    not_ready_reason: str | None
    #: Index of the tap, and of its bridge; 0: none.
    index: int
    bridge: int
    #: What may be wrong, or meant so.
    warning: str | None

    def refresh(self) -> None:
        """Ask anew."""


class AlwaysReady:
    """A port that nobody can be asked about, and so is taken for ready."""

    not_ready_reason: str | None = None
    index = bridge = 0
    warning: str | None = None

    def refresh(self) -> None:
        """Nothing to ask."""


class Uplink:
    """See the module. Thread-safe as its parts are.

    Attributes:
        nic: the NIC.
        observer: its address book, and what its guest was seen to announce.
        watched: whether frames are observed at all; without, the guest's word has to do.
        port: its tap in the host's network.
        policy: which addresses the host may announce.
    """

    def __init__(self, nic: Nic, clock: Clock, policy: Policy | None = None) -> None:
        self.nic = nic
        #: Told of each announcement of the guest's.
        self.on_seen: Callable[[Sighting], None] = lambda sighting: None
        self.observer = Observer(nic.mac, clock.now(), lambda sighting: self.on_seen(sighting))
        self.watched = False
        self.port: PortState = AlwaysReady()
        self.policy = policy or Policy()
        self._clock = clock
        self._host_announced: dict[
            tuple[bytes, tuple[tuple[int, int], ...], bytes | None], float
        ] = {}

    def begin(self) -> None:
        """An announcement begins: what was seen and said before is the past."""
        self._refresh()
        self.observer.begin(self._clock.now())
        self._host_announced = {}

    def entries(self) -> list[Entry]:
        """The guest's addresses that may be announced, the most important first."""
        self._refresh()
        return self._permitted(self.observer.entries(self._clock.now()))

    def missing(self) -> list[Entry]:
        """Those of them that the guest did not announce since :meth:`begin`."""
        if not self.watched:
            return []
        return self._permitted(self.observer.missing(self._clock.now()))

    def peers(self) -> list[Peer]:
        """Whom the guest talks to, those met most often first."""
        return self.observer.peers(self._clock.now())

    def host_announced_at(self, entry: Entry) -> float | None:
        """When the host announced it first since :meth:`begin`, by the clock; None: never."""
        return self._host_announced.get((entry.mac, entry.tags, entry.ip))

    def announce(self, entries: Iterable[Entry]) -> int:
        """Announce these in the guest's name; how many frames that took.

        Raises:
            OSError, GodwitError: the backend did not take one; the rest was not sent.
        """
        entries = list(entries)
        count = 0
        for frame in announcements(entries, self.policy):
            self.send(frame)
            count += 1
        now = self._clock.now()
        for entry in entries:
            self._host_announced.setdefault((entry.mac, entry.tags, entry.ip), now)
        return count

    def layer2_updates(self, note: Callable[[int], bytes], limit: int) -> list[bytes]:
        """A frame for each network that the guest is known in, the most important first, at most so
        many, each with its note: what switches learn the guest's place from, and hosts nothing."""
        places = list(dict.fromkeys((entry.mac, entry.tags) for entry in self.entries()))[:limit]
        return [
            frames.layer2_update(mac, tags, note(number))
            for number, (mac, tags) in enumerate(places)
        ]

    def switch_back(self) -> None:
        """Have switches learn that the guest is here; what they do not hear, they learn later."""
        try:
            for frame in self.layer2_updates(lambda number: b"", _MOST):
                self.nic.send_from_host(frame)
        except (GodwitError, OSError):
            pass  # the announcement follows, and tells of it

    def send(self, frame: bytes) -> None:
        """A frame to the network, as if the guest had sent it. Raises as :meth:`announce`."""
        self.observer.host_sent(frame, self._clock.now())
        self.nic.send_from_host(frame)

    def _permitted(self, entries: Iterable[Entry]) -> list[Entry]:
        return [entry for entry in entries if self.policy.permits(entry.mac, entry.ip)]

    def _refresh(self) -> None:
        """Take over what the driver told its NIC since."""
        now = self._clock.now()
        view = self.nic.rx_filter()
        self.observer.set_configured(self.nic.mac, now)
        self.observer.set_filter(view.unicast_table, view.vlan_table, now)
