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

All methods are called with the announcer's lock held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from godwit.errors import GodwitError, HostError
from godwit.host.loop import Clock, Timer
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceOptions, AnnounceParameters

from .pacing import Pacer, round_delays
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
        self._deadline_s = options.deadline / 1000
        self._delays = round_delays(parameters)
        self._further: Sequence[float] = FURTHER_ROUNDS_S
        self._timers = 0  # that are pending
        # While an ack is awaited.
        self._unacked = 0  # attempts since the last ack
        self._deadline: Timer | None = None
        self._round_due = False
        self._fallback = False  # the host announces in each round, until an ack comes
        # While the port is not ready.
        self._held = False
        self._held_round = False
        self._held_host_reason: str | None = (
            None  # why the host shall announce once the port is ready
        )

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
        reason, self._held_host_reason = self._held_host_reason, None
        held_round, self._held_round = self._held_round, False
        if held_round:
            self._round()  # announces all there is
        elif reason is not None:
            self._announce_from_host(reason)

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
        self._after(SEEN_AFTER_ACK_S, self._announce_missing)
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
        frames = len(self.uplink.entries())
        first = not self._record.rounds
        wait = self._pacer.take(frames, self._rate, self._clock.now(), first)
        if wait > 0:
            self._after(wait, self._round)
        else:
            self._make_round()

    def _hold(self) -> bool:
        """Return whether the port is not ready, and if so, wait for the port."""
        reason = self.uplink.port.not_ready_reason
        if reason is None:
            return False
        if not self._held:
            self._held = True
            self._record.held = reason
            self._report(*Event.ANNOUNCE_HELD.of(nic=self._record.nic, cause=reason))
        return True

    def _make_round(self) -> None:
        record = self._record
        record.rounds += 1
        if self.uplink.port.warning is not None:
            self._failed(HostError(self.uplink.port.warning))
        record.mac = self.uplink.nic.mac.hex(":")
        if self._fallback:
            self._announce_from_host("no ack")
        elif not self._attempt():
            self._announce_from_host("declined")
        if record.rounds == 1:
            self._verifier.begin()
        self._schedule()

    def _schedule(self) -> None:
        following = next(self._delays, None)
        if following is not None:
            self._after(following, self._round)
        elif self._verifier.wanted:
            # All rounds are made: does the network know? If not, more are, further apart.
            self._verifier.ask()
            self._after(VERIFY_S, self._verify)

    def _verify(self) -> None:
        record = self._record
        record.unverified = self._verifier.missing()
        if not record.unverified:
            if record.verified_at is None:
                record.verified_at = self._clock.now()
                ms = (record.verified_at - record.began_at) * 1000
                self._report(*Event.ANNOUNCE_VERIFIED.of(nic=record.nic, ms=round(ms, 3)))
        elif self._further:
            delay, self._further = self._further[0], self._further[1:]
            self._after(delay - VERIFY_S, self._round)
        else:
            self._report(*Event.ANNOUNCE_UNVERIFIED.of(nic=record.nic, what=record.unverified))

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
                return
            reason = "declined"
        else:
            self._fallback = True
            reason = "no ack"
        self._unacked = 0
        if self._round_due:
            self._round_due = False
            self._round()
        else:
            self._announce_from_host(reason)

    # --- the host's part: the fallback ------------------------------------------------------------
    def _announce_missing(self) -> None:
        """Announce what the guest left out of an announcement the guest acknowledged."""
        if self.uplink.missing():
            self._announce_from_host("not shown")

    def _announce_from_host(self, reason: str) -> None:
        """Announce in the guest's name, now or when the port is ready, and report the reason."""
        if self._hold():
            self._held_host_reason = reason
            return
        record = self._record
        entries = self.uplink.missing() if reason == "not shown" else self.uplink.entries()
        if reason != "not shown":
            record.method = "host"
        try:
            count = self.uplink.announce(entries)
        except (GodwitError, OSError) as error:
            self._failed(error)
            return
        if not count:
            return
        record.host_sent += count
        if record.host_sent_at is None:
            record.host_sent_at = self._clock.now()
        self._report(
            *Event.ANNOUNCE_HOST.of(nic=record.nic, round=record.rounds, frames=count, why=reason)
        )

    def _failed(self, error: Exception) -> None:
        cause = str(error) or type(error).__name__
        self._record.error = cause
        self._report(
            *Event.ANNOUNCE_FAILED.of(nic=self._record.nic, round=self._record.rounds, cause=cause)
        )
