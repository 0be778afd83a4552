"""The host's part of one NIC's announcement: what the host sends in the guest's name.

RARP leaves at once: a MAC address alone harms nobody. An IP address is asked for first, and
announced only if nobody answers: the guest may have given the address up, and another host may have
taken the address. While the answers are awaited, the switches know the way already. Gateways are
asked from each address that was announced, whoever did so.

All methods are called with the announcer's lock held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from godwit.errors import GodwitError
from godwit.host.loop import Clock, Timer
from godwit.spec.events import Event

from .entries import Address, Entry, Tags
from .memberships import Membership
from .questions import ASK_S, Questions
from .record import NicRecord
from .uplink import Uplink

#: From the question for an address to its repetition, seconds.
ASK_AGAIN_S = 0.15
#: An address that the guest does not announce, though it announces others, is announced only if the
#: guest used it within so long, seconds. Linux confirms a neighbour that it uses every minute.
LATELY_S = 900.0
#: How often a multicast membership is reported again.
REPORTS = 2

#: Why the host announces, as ANNOUNCE_HOST has it.
DECLINED, NO_ACK, NOT_SHOWN = "declined", "no ack", "not shown"


class HostAnnouncement:
    """The host's part of one announcement of one NIC.

    ``after(delay, call)`` has a call made later, unless the announcement is over by then;
    ``failed(error)`` reports an error; ``hold(call)`` returns whether the port is not ready, and
    has the call made once it is.
    """

    def __init__(
        self,
        uplink: Uplink,
        record: NicRecord,
        questions: Questions,
        clock: Clock,
        after: Callable[[float, Callable[[], None]], Timer],
        report: Callable[[Event, dict[str, object]], None],
        failed: Callable[[Exception], None],
        hold: Callable[[Callable[[], None]], bool],
    ) -> None:
        self._hold = hold
        self._uplink = uplink
        self._record = record
        self._questions = questions
        self._clock = clock
        self._after = after
        self._report = report
        self._failed = failed
        self._began_at = clock.now()
        self._reports = 0
        self._awaited: str | None = None  # the reason for the question that was put last
        self._pending: set[Address] = set()  # that were asked for, to be announced if free

    def send_rarp(self, entries: Sequence[Entry]) -> bool:
        """Send the RARP of the NIC's MAC address, if among ``entries``, and return whether one was.

        Some ports open only at a RARP, whoever announces the rest (OVN's activation strategy).
        """
        frame = self._uplink.rarp(entries)
        if frame is None:
            return False
        try:
            self._uplink.send(frame)
        except (GodwitError, OSError) as error:
            self._failed(error)
            return False
        self._record.rarp_sent += 1
        return True

    def announce(self, reason: str, *, base: bool = True) -> None:
        """Announce all, or with ``not shown`` what the guest left out, and ask where needed.

        Without ``base``, this round's RARP of the NIC's MAC address has left already.
        """
        entries = self._wanted(reason)
        free = [entry for entry in entries if self._may_announce(entry)]
        asked = self._questions.ask_for(entries)
        self._pending.difference_update(entry.address for entry in free)
        if asked:
            self._awaited = reason
            self._pending.update(entry.address for entry in asked)
            self._after(ASK_AGAIN_S, lambda: self._questions.ask_again(asked))
            self._after(ASK_S, self._announce_free)
        # The MAC addresses of the others: their switches need not wait for an answer.
        named = {entry.address for entry in free}
        places = [
            entry if entry.address in named else msgspec.structs.replace(entry, ip=None)
            for entry in entries
        ]
        self._send(reason, places, base)
        self._questions.introduce(free)

    def ask_ahead(self) -> None:
        """Ask for the addresses the host would announce if the guest does not."""
        if self._uplink.port.not_ready_reason is None:
            self._questions.ask_for(self._uplink.entries())

    def introduce_again(self) -> None:
        """Ask gateways once more from all addresses that were announced."""
        if self._uplink.port.not_ready_reason is None:
            self._questions.introduce(self._uplink.announced())

    def network_passes(self) -> None:
        """Report memberships anew, as switches may have missed what was sent before."""
        self._reports = 0

    def stand_back(self) -> None:
        """Leave the addresses asked for to the guest, which acknowledged."""
        if self._awaited != NOT_SHOWN:
            self._awaited = None
            self._pending.clear()

    def shown(self) -> None:
        """Ask gateways from the addresses the guest has shown, and announce what is missing."""
        if self._uplink.watched:
            left_out = {one.address for one in self._uplink.missing(self._questions.passes_since)}
            shown = [one for one in self._uplink.entries() if one.address not in left_out]
            self._questions.introduce(shown)
        if self._wanted(NOT_SHOWN) or self._memberships(NOT_SHOWN):
            self.announce(NOT_SHOWN)

    # --- inside -----------------------------------------------------------------------------------
    def _wanted(self, reason: str) -> list[Entry]:
        if reason != NOT_SHOWN:
            return self._uplink.entries()
        lately = self._clock.now() - LATELY_S
        return [
            entry
            for entry in self._uplink.missing(self._questions.passes_since)
            if entry.ip is None or entry.last_seen >= lately
        ]

    def _may_announce(self, entry: Entry) -> bool:
        return entry.ip is None or self._questions.is_free(entry)

    def _announce_free(self) -> None:
        """Announce the addresses for which nobody has answered."""
        reason = self._awaited
        if reason is None:
            return
        if self._hold(lambda: self.announce(reason)):
            self._pending.clear()  # silence proves nothing then
            return
        free = [
            entry
            for entry in self._wanted(reason)
            if entry.address in self._pending and self._questions.is_free(entry)
        ]
        if free:
            self._pending.difference_update(entry.address for entry in free)
            self._send(reason, free, True)
            self._questions.introduce(free)

    def _memberships(self, reason: str) -> Sequence[Membership]:
        if self._reports >= REPORTS or (reason == NOT_SHOWN and not self._uplink.watched):
            return ()
        return self._uplink.memberships(self._shown_since if reason == NOT_SHOWN else None)

    def _shown_since(self, tags: Tags) -> float:
        """Return the time before which what the guest showed in a network does not count."""
        return max(self._began_at, self._questions.passes_since(tags) or self._began_at)

    def _report_memberships(self, reason: str) -> None:
        memberships = self._memberships(reason)
        self._reports += bool(memberships)
        sent = self._uplink.report(memberships)
        self._record.reports_sent += sent.frames
        if sent.error is not None:
            self._failed(sent.error)

    def _send(self, reason: str, entries: Sequence[Entry], base: bool) -> None:
        record = self._record
        self._report_memberships(reason)
        sent = self._uplink.announce(entries, base=base)
        if sent.error is not None:
            self._failed(sent.error)
        if not base and reason != NOT_SHOWN:
            # The round's RARP was the host's announcement too.
            record.rarp_sent -= 1
            sent = sent._replace(frames=sent.frames + 1)
        if not sent.frames:
            return
        record.host_sent += sent.frames
        if record.host_sent_at is None:
            record.host_sent_at = self._clock.now()
        self._report(
            *Event.ANNOUNCE_HOST.of(
                nic=record.nic, round=record.rounds, frames=sent.frames, why=reason
            )
        )
