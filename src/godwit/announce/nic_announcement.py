"""The announcement of one NIC: attempts to have the guest announce itself, and the host's fallback.

A :class:`NicAnnouncement` begins when the NIC's port is ready, and makes its rounds by the
schedule. A round goes like this:

1. First attempt: the NIC's model is asked to have the guest announce itself. If the model declines,
   the host announces, and the next round is a new attempt.
2. Second attempt: the guest did not acknowledge by the deadline, and the model is asked once more.
3. Fallback: the guest did not acknowledge by the second deadline. The host announces, in this round
   and all others until an ack comes.

After an ack the guest's frames are what counts: what the address book has and the guest was not
seen to announce by then is announced by the host. A round that falls due while an ack is awaited
waits for the ack, so that each round has its effect.

After the last round of the schedule, further ones follow, further and further apart: while no
answer has shown that the network passes the guest's frames (a port may be wired late, and look
ready all the time), and while the announcement is not verified, if it is to be.

All methods are called with the announcer's lock held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from godwit.errors import GodwitError, HostError
from godwit.host.loop import Clock, Timer
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceOptions, AnnounceParameters, Rarp

from .dissect import Sighting
from .entries import Entry
from .host_announcement import DECLINED, NO_ACK, HostAnnouncement
from .pacing import Pacer, round_delays
from .questions import LATER_S, Questions
from .record import NicRecord
from .uplink import Uplink

#: Attempts to have a guest announce itself before the host falls back to announcing.
MAX_ATTEMPTS = 2
#: From an ack until the guest's frames must have been seen, seconds. Linux sends the frames before
#: the ack (drivers/net/virtio_net.c, virtnet_config_changed_work), so this is only how long the
#: watch may take to read them.
SEEN_AFTER_ACK_S = 0.1
#: Further rounds while the announcement is not verified: seconds from the round before.
FURTHER_ROUNDS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
#: The longest time from one further round to the next, while no answer comes, seconds.
LONGEST_S = 60.0
#: The last further round may come so much after the bound, seconds: the schedule's own length.
LEEWAY_S = 5.0
#: From a round's beginning to the questions for peers, seconds.
ASK_AFTER_S = 0.1
#: From a verifier's question to its answer, seconds.
VERIFY_S = 0.3

#: Receives an event and its data.
Report = Callable[[Event, dict[str, object]], None]
#: Has a call made later, under the announcer's lock, unless the announcement is over by then.
Later = Callable[[float, Callable[[], None]], Timer]


class Verifier(Protocol):
    """A way to find out whether the network knows where the guest is (:mod:`.verify`)."""

    #: True if the operator wants the announcement verified.
    wanted: bool

    def begin(self) -> None:
        """Take note that the first round is made."""

    def ask(self) -> None:
        """Put the question to bridge or peers."""

    def missing(self) -> list[str]:
        """Return what is not verified, in words, or nothing if everything is."""


class NicAnnouncement:
    """One announcement of one NIC, as the module describes."""

    def __init__(
        self,
        uplink: Uplink,
        record: NicRecord,
        parameters: AnnounceParameters,
        options: AnnounceOptions,
        clock: Clock,
        later: Later,
        report: Report,
        verifier: Verifier,
        pacer: Pacer,
    ) -> None:
        self.uplink = uplink
        self._record = record
        self._clock = clock
        self._later = later
        self._report = report
        self._verifier = verifier
        self._pacer = pacer
        self._rate = options.rate
        self._rarp = options.rarp is Rarp.ALWAYS
        self._deadline_s = options.deadline / 1000
        self._patience_s = options.patience / 1000
        self._asks_gateways = options.ask_gateways
        self._questions = Questions(uplink, record, clock, options.ask_gateways, self._failed)
        self._host = HostAnnouncement(
            uplink, record, self._questions, clock, self._after, report, self._failed, self._hold
        )
        self._delays = round_delays(parameters)
        self._further = _further_delays()
        self._further_rounds = 0
        self._next_further: Timer | None = None
        self._first_at = self._round_at = 0.0  # when the first and the last round began
        self._paid = 0  # frames sent beside the rounds, for which a round has paid
        self._stale = False  # a network passes frames only since after the last round began
        self._timers = 0  # that are pending
        # While an ack is awaited.
        self._unacked = 0  # attempts since the last ack
        self._deadline: Timer | None = None
        self._round_due = False
        self._fallback = False  # the host announces in each round, until an ack comes
        # While the port is not ready.
        self._held = False
        self._held_round = False
        self._held_call: Callable[[], None] | None = None  # the host's part that waits

    @property
    def over(self) -> bool:
        """True once nothing more will come of the announcement."""
        return not self._held and not self._timers

    def begin(self) -> None:
        """Make the first round of a VM that runs, or wait for the port."""
        next(self._delays, None)
        self._round()

    def port_ready(self) -> None:
        """Start the schedule of a port that was late, or go on with that of a port that was gone.

        Does nothing if the announcement does not wait for the port.
        """
        if not self._held:
            return
        self._held = False
        self._record.held = None
        self._record.ready_at = self._clock.now()
        self._questions.forget_silence()
        held_call, self._held_call = self._held_call, None
        held_round, self._held_round = self._held_round, False
        if held_round:
            self._round()  # announces all there is
        elif held_call is not None:
            held_call()

    def answered(self, sighting: Sighting) -> None:
        """Take note of what another host shows on its way to the guest."""
        if self.over:
            return
        record, questions = self._record, self._questions
        passes_since = questions.answered(sighting)
        if passes_since is None:
            return
        self._host.network_passes()
        if questions.settled and record.proved_at is None:
            record.proved_at = self._clock.now()
            record.unproved = []
        # What was sent before may be lost.
        self._stale = self._stale or passes_since > self._round_at
        if self._next_further is not None:
            self._cancel_further()
            self._judge()

    def acked(self) -> None:
        """Take note that the guest acknowledged, and check soon what the guest left out."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            self._timers -= 1
        if not (self._unacked or self._fallback):
            return
        self._unacked = 0
        self._fallback = False
        self._host.stand_back()
        self._after(SEEN_AFTER_ACK_S, self._look)
        if self._round_due:
            self._round_due = False
            self._round()

    def _after(self, delay: float, call: Callable[[], None]) -> Timer:
        def due() -> None:
            self._timers -= 1
            call()

        self._timers += 1
        return self._later(delay, due)

    # --- rounds -----------------------------------------------------------------------------------
    def _round(self) -> None:
        """Make a round now, or once an ack, the port and the rate allow the round."""
        if self._unacked:
            self._round_due = True
            return
        if self._hold():
            self._held_round = True
            return
        # Guest or host: whoever announces has about so many frames to send.
        entries = self.uplink.entries()
        first = not self._record.rounds
        # What the host has sent beside, this round pays for.
        beside = self._record.beside
        count = len(entries) + beside - self._paid
        wait = self._pacer.take(count, self._rate, self._clock.now(), first)
        if wait > 0:
            self._after(wait, self._round)
        else:
            self._paid = beside
            self._make_round(entries)

    def _hold(self, call: Callable[[], None] | None = None) -> bool:
        """Return whether the port is not ready, and if so, wait for the port with ``call``."""
        reason = self.uplink.port.not_ready_reason
        if reason is None:
            return False
        self._held_call = call or self._held_call
        if not self._held:
            self._held = True
            self._record.held = reason
            self._report(*Event.ANNOUNCE_HELD.of(nic=self._record.nic, cause=reason))
        return True

    def _make_round(self, entries: Sequence[Entry]) -> None:
        record = self._record
        record.rounds += 1
        self._round_at = self._clock.now()
        self._stale = False
        if record.rounds == 1:
            self._first_at = self._round_at
            if self._asks_gateways:
                for delay in LATER_S:
                    self._after(delay, self._host.introduce_again)
        if self.uplink.port.warning is not None:
            self._failed(HostError(self.uplink.port.warning))
        record.mac = self.uplink.nic.mac.hex(":")
        rarp = self._rarp and not self._fallback and self._host.send_rarp(entries)
        if self._fallback:
            self._announce_from_host(NO_ACK)
        elif not self._attempt():
            self._announce_from_host(DECLINED, base=not rarp)
        at = self._round_at
        if self._asks_gateways:
            # The guest and its peers' packets go first.
            self._after(ASK_AFTER_S, lambda: self._questions.ask_peers(entries, at))
        if record.rounds == 1:
            self._verifier.begin()
        self._schedule()

    def _schedule(self) -> None:
        following = next(self._delays, None)
        if following is not None:
            self._after(following, self._round)
            return
        # All rounds are made: does the network know? If not, more are, further apart.
        if self._verifier.wanted:
            self._verifier.ask()
        if self._verifier.wanted or (self._patience_s and not self._questions.settled):
            self._after(VERIFY_S, self._judge)

    def _judge(self) -> None:
        """Make a further round later if one is needed, or report what was found."""
        record = self._record
        if self._stale:
            self._round()
            return
        delay = next(self._further)
        unverified = self._unverified()
        again = bool(unverified) and self._further_rounds < len(FURTHER_ROUNDS_S)
        unproved = bool(self._patience_s) and not self._questions.settled
        if unproved:
            record.unproved = self._questions.unproved()
            since = self._clock.now() - self._first_at
            patient = since + delay <= self._patience_s + LEEWAY_S
            again = again or patient
        if again:
            self._further_rounds += 1
            self._next_further = self._after(delay - VERIFY_S, self._make_further)
            return
        if unverified:
            self._report(*Event.ANNOUNCE_UNVERIFIED.of(nic=record.nic, what=unverified))
        if unproved:
            record.given_up = True
            self._report(*Event.ANNOUNCE_UNPROVED.of(nic=record.nic, what=record.unproved))

    def _make_further(self) -> None:
        self._next_further = None
        self._round()

    def _cancel_further(self) -> None:
        if self._next_further is not None:
            self._next_further.cancel()
            self._next_further = None
            self._timers -= 1

    def _unverified(self) -> list[str]:
        """Return what is not verified but should be, and report the first time nothing is."""
        record = self._record
        if not self._verifier.wanted:
            return []
        record.unverified = self._verifier.missing()
        if not record.unverified and record.verified_at is None:
            record.verified_at = self._clock.now()
            ms = (record.verified_at - record.began_at) * 1000
            self._report(*Event.ANNOUNCE_VERIFIED.of(nic=record.nic, ms=round(ms, 3)))
        return record.unverified

    # --- the guest's part: attempts ---------------------------------------------------------------
    def _attempt(self) -> bool:
        """Ask for the guest's own announcement, and return whether the model accepted."""
        record = self._record
        first = record.asked_at is None
        if first:  # before the model is asked: the ack may be quicker than its return
            record.asked_at = self._clock.now()
        try:
            accepted = self.uplink.nic.announce()
        except (GodwitError, OSError) as error:
            accepted = False
            self._failed(error)
        if accepted:
            record.method = "guest"
            record.asked += 1
            self._unacked += 1
            self._deadline = self._after(self._deadline_s, self._attempt_timed_out)
        elif first:
            record.asked_at = None
        return accepted

    def _attempt_timed_out(self) -> None:
        """Make the second attempt, or fall back to the host."""
        self._deadline = None
        self._record.timeouts += 1
        self._report(*Event.ANNOUNCE_TIMEOUT.of(nic=self._record.nic, asked=self._unacked))
        if self._unacked < MAX_ATTEMPTS:
            if self._attempt():
                # By the time that nobody has acknowledged, the answers are there.
                self._host.ask_ahead()
                return
            reason = DECLINED
        else:
            self._fallback = True
            reason = NO_ACK
        self._unacked = 0
        if self._round_due:
            self._round_due = False
            self._round()
        else:
            self._announce_from_host(reason)

    # --- the host's part: the fallback ------------------------------------------------------------
    def _look(self) -> None:
        """Look at what the guest has announced by now."""
        if self._hold(self._look):
            return
        self._host.shown()

    def _announce_from_host(self, reason: str, *, base: bool = True) -> None:
        """Announce in the guest's name, now or when the port is ready, and report the reason."""
        if self._hold(lambda: self._announce_from_host(reason)):
            return
        self._record.method = "host"
        self._host.announce(reason, base=base)

    def _failed(self, error: Exception) -> None:
        cause = str(error) or type(error).__name__
        self._record.error = cause
        self._report(
            *Event.ANNOUNCE_FAILED.of(nic=self._record.nic, round=self._record.rounds, cause=cause)
        )


def _further_delays() -> Iterator[float]:
    """Yield the seconds from one further round to the next: twice as long each time."""
    delay = FURTHER_ROUNDS_S[0]
    while True:
        yield delay
        delay = min(2 * delay, LONGEST_S)
