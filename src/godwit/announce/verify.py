"""Does the network know where the guest is? Two ways to find out.

``fdb`` asks this host's bridge: its forwarding database must have each of the guest's MAC addresses,
in its VLAN, at the tap. It says nothing about switches further on. ``probe`` asks the guest's known
peers, as ARP requests and neighbour solicitations in the guest's name do, and an answer that comes
to the tap proves the whole way for its VLAN.

What the guest's peers answer also tells where they are now. With ``refresh`` that is injected into
the tap, so that the guest's own neighbour entries are right again.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import GodwitError
from ..nic import rtnetlink
from . import frames
from .addresses import Entry, Peer
from .dissect import Malformed, Sighting, dissect
from .frames import Tag
from .schedule import Verify
from .station import Station

#: Peers asked in each VLAN and family, those met most often first: a gateway is likely among them.
PEERS = 2

_Tags = tuple[Tag, ...]
#: Whom an answer is awaited from.
_Key = tuple[_Tags, bytes]


class FdbVerifier:
    """Asks the bridge that the tap is a port of."""

    wanted = True

    def __init__(self, station: Station) -> None:
        self._station = station

    def missing(self) -> list[str]:
        """Which MAC addresses the bridge has elsewhere, or not at all."""
        port = self._station.port
        port.look()
        if not port.bridge:
            return ["the tap is no bridge's port, so there is no forwarding database to ask"]
        try:
            known = rtnetlink.forwarding(port.bridge)
        except OSError as error:
            return [f"the forwarding database cannot be read: {error}"]
        at = {(one.mac, one.vlan) for one in known if one.port == port.index}
        macs = {mac for mac, _ in at}
        missing = {}
        for entry in self._station.entries():
            # Untagged frames are in the port's own VLAN, whatever number that has.
            vlan = entry.tags[0][1] if entry.tags else None
            found = entry.mac in macs if vlan is None else {(entry.mac, vlan), (entry.mac, 0)} & at
            if not found:
                missing[f"{entry.mac.hex(':')}{_in(entry.tags)}"] = None
        return list(missing)


class Prober:
    """Asks peers in the guest's name, and takes their answers; for one NIC.

    ``inject(frame)`` sends a frame into the guest.
    """

    def __init__(self, station: Station, inject: Callable[[bytes], None] | None = None) -> None:
        self._station = station
        self._inject = inject
        self._asked: dict[_Key, bool] = {}  # peer -> whether it answered

    def ask(self) -> None:
        """Ask those that did not answer yet. Raises OSError, GodwitError."""
        for entry, peer in self._questions():
            key = (peer.tags, peer.ip)
            if not self._asked.get(key):
                self._asked[key] = False
                solicit = frames.arp_request if len(peer.ip) == 4 else frames.solicitation
                assert entry.ip is not None  # _questions chose it so
                self._station.send(solicit(entry.mac, entry.ip, peer.ip, entry.tags))

    def answer(self, data: bytes, outer: Tag | None) -> None:
        """A frame on its way to the guest."""
        try:
            sighting = dissect(data, outer)
        except Malformed:
            return
        if sighting is None or sighting.ip is None:
            return
        key = (sighting.tags, sighting.ip)
        if key in self._asked and not self._asked[key]:
            self._asked[key] = True
            if self._inject is not None:
                self._refresh(sighting)

    def unanswered(self) -> list[str]:
        """VLANs and families of which no peer answered, in words."""
        groups: dict[tuple[_Tags, int], bool] = {}
        for (tags, ip), answered in self._asked.items():
            group = (tags, len(ip))
            groups[group] = groups.get(group, False) or answered
        return [
            f"no answer{_in(tags)} over {'IPv4' if size == 4 else 'IPv6'}"
            for (tags, size), answered in groups.items()
            if not answered
        ]

    def _questions(self) -> list[tuple[Entry, Peer]]:
        mine: dict[tuple[_Tags, int], Entry] = {}
        for entry in self._station.entries():
            if entry.ip is not None:
                mine.setdefault((entry.tags, len(entry.ip)), entry)
        questions = []
        asked: dict[tuple[_Tags, int], int] = {}
        for peer in self._station.peers():
            group = (peer.tags, len(peer.ip))
            if group in mine and asked.get(group, 0) < PEERS:
                asked[group] = asked.get(group, 0) + 1
                questions.append((mine[group], peer))
        return questions

    def _refresh(self, peer: Sighting) -> None:
        """Tell the guest where its peer is, in the form that replaces an entry at once."""
        assert self._inject is not None
        assert peer.ip is not None
        tell = frames.gratuitous_arp if len(peer.ip) == 4 else frames.unsolicited_na
        try:
            self._inject(tell(peer.mac, peer.ip, peer.tags))
        except OSError:
            pass  # the tap is down: the guest hears nothing, not this either


class ProbeVerifier:
    """Verified when in each VLAN and family with a known peer one has answered."""

    wanted = True

    def __init__(self, prober: Prober) -> None:
        self._prober = prober

    def missing(self) -> list[str]:
        """Where nobody answered yet; those are asked once more."""
        left = self._prober.unanswered()
        if left or not self._prober.begun:
            try:
                self._prober.ask()
            except (OSError, GodwitError) as error:
                return [f"peers cannot be asked: {error}"]
            left = self._prober.unanswered()
        return left


def _in(tags: _Tags) -> str:
    return "".join(f" in VLAN {vid}" for _, vid in tags)


__all__ = ["FdbVerifier", "ProbeVerifier", "Prober", "Verify"]
