"""The questions of one announcement of one NIC, put to the network in the guest's name.

There are three, each of ARP or neighbour discovery (RFC 826, 5227, 4861):

- To a known peer of each network, from an announced address or else from nobody: is the peer
  there? The answer proves a network passing the guest's frames, both ways, since the round began.
- For an address the host is to announce: does another have the address? Who answers claims the
  address, which leaves the address book.
- To known gateways, from each announced address: a gateway that ignores announcements of hosts
  not known yet (Linux: arp_accept, accept_untracked_na) learns from a question.

All is bounded by the address book.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from godwit.errors import GodwitError
from godwit.host.loop import Clock

from . import frames
from .dissect import Kind, Sighting
from .entries import Address, Entry, Key, Peer, Tags
from .record import NicRecord
from .uplink import Uplink

#: Peers asked in each network or family at once, those met most often first, a gateway likely
#: among them.
PEERS_ASKED = 2
#: Networks whose peers are asked in an announcement, at most.
MAX_NETWORKS = 64
#: Addresses from which gateways are asked in an announcement, at most, and how often each: in each
#: of the usual rounds, and later. The kernel of an EVPN gateway does not touch the entry of a guest
#: elsewhere until the fabric has withdrawn the guest's old route.
MAX_INTRODUCED = 64
INTRODUCTIONS = 8
#: When gateways are asked once more, seconds after the first round.
LATER_S = (2.0, 5.0)
#: From the question for an address until the address is taken for free, seconds. RFC 5227 waits
#: for up to two, before an address is first used; here the guest has used it.
ASK_S = 0.4
#: From one question for a network's peers to the next, seconds.
REPEAT_S = 0.3
#: An answer later than this after a question may be to another's question, seconds.
ANSWER_S = 1.0


class Questions:
    """The questions of one announcement, and what their answers prove.

    With ``gateways`` False no peer is asked, and only answers to the guest's own questions prove
    anything. ``record`` has the counts, and ``failed(error)`` reports an error. Used with the
    announcer's lock held.
    """

    def __init__(
        self,
        uplink: Uplink,
        record: NicRecord,
        clock: Clock,
        gateways: bool,
        failed: Callable[[Exception], None],
    ) -> None:
        self._record = record
        self._failed = failed
        self._uplink = uplink
        self._clock = clock
        self._gateways = gateways
        self._turn = 0
        self._error: Exception | None = None
        self._networks: set[Tags] = set()  # whose peers were asked
        self._asked: dict[Key, float] = {}  # peer that has not answered -> when asked last
        self._proved: dict[Tags, float] = {}  # network -> since when it is known to pass frames
        self._asked_for: dict[Address, float] = {}
        self._introduced: dict[Address, int] = {}

    # --- does the network pass frames? ------------------------------------------------------------
    def ask_peers(self, entries: Iterable[Entry], at: float) -> None:
        """Ask known peers in each network not shown to pass frames, other ones in turn.

        The questions come from addresses that were announced, or else from nobody, with the MAC
        addresses of ``entries``: a peer that is just about to take its address might take a
        question from nobody for a conflict (RFC 4862 section 5.4.3). They count as put when the
        round began, at ``at``: an answer proves that the network passed its other frames, too.
        """
        if not self._uplink.listens or self._uplink.port.not_ready_reason is not None:
            return
        peers: dict[Tags, list[Peer]] = {}
        for peer in self._uplink.peers():
            peers.setdefault(peer.tags, []).append(peer)
        senders: dict[Tags, bytes] = {}
        own: set[Address] = set()
        for entry in entries:
            senders.setdefault(entry.tags, entry.mac)
            own.add(entry.address)
        announced: dict[tuple[Tags, int], Entry] = {}
        for entry in self._uplink.announced():
            if entry.ip is not None:
                announced.setdefault((entry.tags, len(entry.ip)), entry)
        for tags, known in peers.items():
            if tags not in senders or tags in self._proved:
                continue
            if tags not in self._networks and len(self._networks) >= MAX_NETWORKS:
                continue
            self._networks.add(tags)
            last = max((self._asked.get((tags, peer.ip), 0.0) for peer in known), default=0.0)
            if self._clock.now() < last + REPEAT_S:
                continue  # or nobody would know which question an answer is to
            start = self._turn * PEERS_ASKED % len(known)
            for peer in (known[start:] + known[:start])[:PEERS_ASKED]:
                shown = announced.get((tags, len(peer.ip)))
                if shown is not None:
                    self._ask(peer, shown.mac, shown.ip, at)
                    continue
                # No other host can have the address that is made of the MAC address. Switches that
                # watch duplicate address detection might take the peer's address for claimed here.
                mac = senders[tags]
                local = frames.link_local(mac)
                known_here = len(peer.ip) == 16 and (mac, tags, local) in own
                self._ask(peer, mac, local if known_here else None, at)
        self._turn += 1
        self._report_error()

    def answered(self, sighting: Sighting) -> float | None:
        """Take note of what another host shows, and return since when a network passes frames.

        Returns None unless that is news.

        An answer to the guest's own question proves frames passing now; an answer to a question
        of the host's, frames passing since the question was put.
        """
        # Another frame of a peer's (a question, a router advertisement) answers nothing.
        if sighting.ip is None or not (sighting.answers or sighting.kind is Kind.NA):
            return None
        tags, now = sighting.tags, self._clock.now()
        at = self._asked.pop((tags, sighting.ip), None)
        if at is not None:
            self._record.answers += 1
            if now > at + ANSWER_S:
                at = now  # to somebody else's question, it may be
        elif sighting.answers and sighting.peer is not None:
            at = now if self._uplink.has(tags, sighting.peer) else None
        if at is None or tags in self._proved:
            return None
        self._proved[tags] = at
        # Gateways may have missed what was sent before.
        self._introduced = {
            address: count for address, count in self._introduced.items() if address[1] != tags
        }
        return at

    def passes_since(self, tags: Tags) -> float | None:
        """Return since when a network is known to pass frames, or None."""
        return self._proved.get(tags)

    @property
    def settled(self) -> bool:
        """True once each network with known peers, and one at least, passes frames."""
        return bool(self._proved) and not self._networks - self._proved.keys()

    def unproved(self) -> list[str]:
        """Return the networks not shown to pass frames, in words."""
        if not self._networks and not self._proved:
            return ["no peer of the guest's is known that could be asked"]
        return [f"no answer{in_vlans(tags)}" for tags in self._networks - self._proved.keys()]

    # --- does another have the address? -----------------------------------------------------------
    def is_free(self, entry: Entry) -> bool:
        """Return whether the network was asked for an address and nobody answered.

        Silence proves nothing in a network that passed no frames when asked. Where nobody knows
        whether frames passed, a question counts for a short while.
        """
        if not self._uplink.listens:
            return True  # no answer would be received: the book is all that is known
        at = self._asked_for.get(entry.address)
        now = self._clock.now()
        if at is None or now < at + ASK_S:
            return False
        passes = self._proved.get(entry.tags)
        return now < at + 2 * ASK_S if passes is None else passes <= at

    def ask_for(self, entries: Iterable[Entry]) -> list[Entry]:
        """Ask for the addresses neither free nor being asked for, and return these."""
        now = self._clock.now()
        asked = [
            entry
            for entry in entries
            if entry.ip is not None
            and now >= self._asked_for.get(entry.address, now - ASK_S) + ASK_S
            and not self.is_free(entry)
        ]
        for entry in asked:
            self._asked_for[entry.address] = now
        self.ask_again(asked)
        return asked

    def ask_again(self, entries: Iterable[Entry]) -> None:
        """Repeat the question for some addresses, as a frame may be lost."""
        for entry in entries:
            if entry.ip is None:
                continue
            if len(entry.ip) == 4:
                self._send(frames.arp_probe(entry.mac, entry.ip, entry.tags))
            else:
                self._send(frames.solicitation(entry.mac, None, entry.ip, entry.tags))
        self._report_error()

    def forget_silence(self) -> None:
        """Forget the questions for addresses: silence proves nothing where nothing was passed."""
        self._asked_for.clear()

    # --- do the gateways know the guest? ----------------------------------------------------------
    def introduce(self, entries: Iterable[Entry]) -> None:
        """Ask gateways from announced addresses."""
        if not self._gateways:
            return
        gateways: dict[tuple[Tags, int], list[Peer]] = {}
        for peer in self._uplink.peers():
            known = gateways.setdefault((peer.tags, len(peer.ip)), [])
            if len(known) < PEERS_ASKED:
                known.append(peer)
        for entry in entries:
            if entry.ip is None:
                continue
            count = self._introduced.get(entry.address, 0)
            if count >= INTRODUCTIONS or (not count and len(self._introduced) >= MAX_INTRODUCED):
                continue
            self._introduced[entry.address] = count + 1
            known = gateways.get((entry.tags, len(entry.ip)), [])
            for peer in known if not count else known[:1]:
                self._ask(peer, entry.mac, entry.ip)
        self._report_error()

    # --- inside -----------------------------------------------------------------------------------
    def _report_error(self) -> None:
        """Report the first error of many alike."""
        error, self._error = self._error, None
        if error is not None:
            self._failed(error)

    def _ask(self, peer: Peer, mac: bytes, ip: bytes | None, at: float | None = None) -> None:
        self._asked[peer.tags, peer.ip] = self._clock.now() if at is None else at
        self._send(question(mac, ip, peer))

    def _send(self, frame: bytes) -> None:
        try:
            self._uplink.send(frame)
        except (GodwitError, OSError) as error:
            self._error = self._error or error
        else:
            self._record.questions += 1


def question(mac: bytes, ip: bytes | None, peer: Peer) -> bytes:
    """Return the frame of a question for a peer from ``mac``.

    Without ``ip`` the question is from nobody, and nobody learns.
    """
    if len(peer.ip) == 16:
        return frames.solicitation(mac, ip, peer.ip, peer.tags)
    if ip is None:
        return frames.arp_probe(mac, peer.ip, peer.tags)
    return frames.arp_request(mac, ip, peer.ip, peer.tags)


def in_vlans(tags: Tags) -> str:
    """Return the VLANs of a network in words, with a space before, or nothing without tags."""
    return "".join(f" in VLAN {vid}" for _, vid in tags)
