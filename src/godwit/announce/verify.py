"""Does the network know where the guest is? Two ways to find out.

``fdb`` asks this host's bridge: its forwarding database must have each of the guest's MAC
addresses, in its VLAN, at the tap. It says nothing about switches further on. ``probe`` asks the
guest's known peers, as ARP requests and neighbour solicitations in the guest's name do, and an
answer that comes to the tap proves the whole way for its VLAN.

What the guest's peers answer also tells where they are now. With ``refresh`` that is injected into
the tap, so that the guest's own neighbour entries are right again.
"""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import GodwitError
from godwit.host.net import rtnetlink
from godwit.spec.parameters import Verify

from . import frames
from .addresses import Entry, Peer
from .dissect import Malformed, Sighting, dissect
from .frames import Tag
from .uplink import Uplink

#: Peers asked in each VLAN and family, those met most often first: a gateway is likely among them.
PEERS = 2

_Tags = tuple[Tag, ...]
#: Whom an answer is awaited from.
_Key = tuple[_Tags, bytes]


class Verification:
    """Of one announcement of one NIC.

    ``inject(frame)`` sends a frame into the guest; None: nothing is to be refreshed.
    """

    def __init__(
        self, uplink: Uplink, how: Verify, inject: Callable[[bytes], None] | None = None
    ) -> None:
        self.wanted = how is not Verify.OFF
        self._how = how
        self._station = uplink
        self._inject = inject
        self._asked: dict[_Key, bool] = {}  # peer -> whether it answered

    def begin(self) -> None:
        """The first round is made. What the guest knows of its peers is stale from the first."""
        if self._inject is not None:
            self._ask_peers()

    def ask(self) -> None:
        """All rounds are made: put the question, whose answer :meth:`missing` has later."""
        if self._how is Verify.PROBE:
            self._ask_peers()

    def missing(self) -> list[str]:
        """What is not known to be right, in words; empty: all is."""
        return self._misplaced() if self._how is Verify.FDB else self._unanswered()

    def answer(self, data: bytes, outer: Tag | None) -> None:
        """A frame that tells of addresses is on its way to the guest."""
        try:
            sighting = dissect(data, outer)
        except Malformed:
            return
        if sighting is None or sighting.ip is None:
            return
        key = (sighting.tags, sighting.ip)
        if self._asked.get(key) is False:
            self._asked[key] = True
            if self._inject is not None:
                self._refresh(sighting)

    # --- the bridge -------------------------------------------------------------------------------
    def _misplaced(self) -> list[str]:
        """Which MAC addresses the bridge has elsewhere, or not at all."""
        port = self._station.port
        port.refresh()
        if not port.bridge:
            return ["the tap is no bridge's port, so there is no forwarding database to ask"]
        try:
            known = rtnetlink.forwarding(port.bridge)
        except OSError as error:
            return [f"the forwarding database cannot be read: {error}"]
        at = {(one.mac, one.vlan) for one in known if one.port == port.index}
        entries = self._station.entries()
        tagged = {(entry.mac, entry.tags[0][1]) for entry in entries if entry.tags}
        # Untagged frames are in the port's own VLAN, whatever number that has: not one in which the
        # guest tags its frames.
        untagged = {mac for mac, _ in at - tagged}
        missing: dict[str, None] = {}
        for entry in entries:
            if entry.tags:
                found = bool({(entry.mac, entry.tags[0][1]), (entry.mac, 0)} & at)
            else:
                found = entry.mac in untagged
            if not found:
                missing[f"{entry.mac.hex(':')}{_in(entry.tags)}"] = None
        return list(missing)

    # --- the peers --------------------------------------------------------------------------------
    def _ask_peers(self) -> None:
        """Ask those that did not answer yet."""
        for entry, peer in self._questions():
            key = (peer.tags, peer.ip)
            if self._asked.get(key) or entry.ip is None:
                continue
            self._asked[key] = False
            ask = frames.arp_request if len(peer.ip) == 4 else frames.solicitation
            try:
                self._station.send(ask(entry.mac, entry.ip, peer.ip, entry.tags))
            except (OSError, GodwitError):
                return  # it stays without an answer, and that is what is told

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

    def _unanswered(self) -> list[str]:
        """VLANs and families of which no peer answered."""
        groups: dict[tuple[_Tags, int], bool] = {}
        for (tags, ip), answered in self._asked.items():
            group = (tags, len(ip))
            groups[group] = groups.get(group, False) or answered
        if not groups:
            return ["no peer of the guest's is known that could be asked"]
        return [
            f"no answer{_in(tags)} over {'IPv4' if size == 4 else 'IPv6'}"
            for (tags, size), answered in groups.items()
            if not answered
        ]

    def _refresh(self, peer: Sighting) -> None:
        """Tell the guest where its peer is, in the form that replaces an entry at once."""
        if self._inject is None or peer.ip is None:
            return
        tell = frames.gratuitous_arp if len(peer.ip) == 4 else frames.unsolicited_na
        try:
            self._inject(tell(peer.mac, peer.ip, peer.tags))
        except OSError:
            pass  # the tap is down: the guest hears nothing, not this either


def _in(tags: _Tags) -> str:
    return "".join(f" in VLAN {vid}" for _, vid in tags)
