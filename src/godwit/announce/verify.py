"""The verification of an announcement: does the network know where the guest is?

There are two ways. ``fdb`` asks this host's bridge: the forwarding database must have each of the
guest's MAC addresses, in its VLAN, at the tap. That proves nothing of switches further on.
``probe`` asks the guest's known peers by ARP requests and neighbour solicitations in the guest's
name, and an answer that comes to the tap proves the whole way for its VLAN.

A peer's answer also shows where the peer is now. With ``refresh`` the answer is injected into the
tap, so that the guest's own neighbour entries are right again.
"""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import GodwitError
from godwit.host.net import rtnetlink
from godwit.spec.parameters import Verify

from . import frames
from .dissect import Kind, Malformed, Sighting, dissect
from .entries import Key, Peer, Tags
from .frames import Tag
from .questions import PEERS_ASKED, in_vlans, question
from .uplink import Uplink


class Verification:
    """The verification of one announcement of one NIC.

    ``inject(frame)`` sends a frame to the guest; None: nothing is to be refreshed.
    """

    def __init__(
        self, uplink: Uplink, method: Verify, inject: Callable[[bytes], None] | None = None
    ) -> None:
        self.wanted = method is not Verify.OFF
        self._method = method
        self._uplink = uplink
        self._inject = inject
        self._asked: dict[Key, bool] = {}  # peer -> whether it answered

    def begin(self) -> None:
        """Ask the peers at the first round, if the guest's neighbour entries are refreshed."""
        if self._inject is not None:
            self._ask_peers()

    def ask(self) -> None:
        """Ask the peers after the last round, so that :meth:`missing` has their answers later."""
        if self._method is Verify.PROBE:
            self._ask_peers()

    def missing(self) -> list[str]:
        """Return what is not verified, in words, or nothing if everything is."""
        return self._misplaced() if self._method is Verify.FDB else self._unanswered()

    def answer(self, data: bytes, outer: Tag | None) -> None:
        """Take note of an address resolution frame on its way to the guest."""
        try:
            sighting = dissect(data, outer, own=False)
        except Malformed:
            return
        # Another frame of a peer's (a question of its own) answers nothing.
        if sighting is None or sighting.ip is None:
            return
        if not (sighting.answers or sighting.kind is Kind.NA):
            return
        key = (sighting.tags, sighting.ip)
        if self._asked.get(key) is False:
            self._asked[key] = True
            if self._inject is not None:
                self._refresh(sighting)

    # --- the bridge -------------------------------------------------------------------------------
    def _misplaced(self) -> list[str]:
        """Return the MAC addresses the bridge has elsewhere, or not at all."""
        port = self._uplink.port
        port.refresh()
        if not port.bridge:
            return ["the tap is no bridge's port, so there is no forwarding database to ask"]
        try:
            known = rtnetlink.forwarding(port.bridge)
        except OSError as error:
            return [f"the forwarding database cannot be read: {error}"]
        at = {(one.mac, one.vlan) for one in known if one.port == port.index}
        entries = self._uplink.entries()
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
                missing[f"{entry.mac.hex(':')}{in_vlans(entry.tags)}"] = None
        return list(missing)

    # --- the peers --------------------------------------------------------------------------------
    def _ask_peers(self) -> None:
        """Ask the peers that did not answer yet."""
        for mac, ip, peer in self._questions():
            key = (peer.tags, peer.ip)
            if self._asked.get(key):
                continue
            self._asked[key] = False
            try:
                self._uplink.send(question(mac, ip, peer))
            except (OSError, GodwitError):
                return  # the peer stays without an answer, which is reported

    def _questions(self) -> list[tuple[bytes, bytes | None, Peer]]:
        """Return (MAC address, IP address, peer) of each question.

        There is no IP address where none was announced: the guest may have given all up.
        """
        mine: dict[tuple[Tags, int], tuple[bytes, bytes | None]] = {}
        for entry in self._uplink.announced():
            if entry.ip is not None:
                mine.setdefault((entry.tags, len(entry.ip)), (entry.mac, entry.ip))
        for entry in self._uplink.entries():
            if entry.ip is not None:
                mine.setdefault((entry.tags, len(entry.ip)), (entry.mac, None))
        questions = []
        asked: dict[tuple[Tags, int], int] = {}
        for peer in self._uplink.peers():
            group = (peer.tags, len(peer.ip))
            if group in mine and asked.get(group, 0) < PEERS_ASKED:
                asked[group] = asked.get(group, 0) + 1
                questions.append((*mine[group], peer))
        return questions

    def _unanswered(self) -> list[str]:
        """Return the VLANs and families in which no peer answered."""
        groups: dict[tuple[Tags, int], bool] = {}
        for (tags, ip), answered in self._asked.items():
            group = (tags, len(ip))
            groups[group] = groups.get(group, False) or answered
        if not groups:
            return ["no peer of the guest's is known that could be asked"]
        return [
            f"no answer{in_vlans(tags)} over {'IPv4' if size == 4 else 'IPv6'}"
            for (tags, size), answered in groups.items()
            if not answered
        ]

    def _refresh(self, peer: Sighting) -> None:
        """Show the guest where a peer is, in the form that replaces a neighbour entry at once."""
        if self._inject is None or peer.ip is None:
            return
        if len(peer.ip) == 4:
            frame = frames.gratuitous_arp(peer.mac, peer.ip, peer.tags)
        else:
            router = peer.router is True
            frame = frames.unsolicited_na(peer.mac, peer.ip, peer.tags, router=router)
        try:
            self._inject(frame)
        except OSError:
            pass  # the tap is down: the guest receives nothing, not this either
