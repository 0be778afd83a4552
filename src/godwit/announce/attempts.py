"""The ladder of one NIC: ask the guest; ask once more; then the host speaks for it.

One :class:`NicAnnouncement` is one announcement of one NIC. It begins when the NIC's port is ready,
makes its rounds by the schedule, and takes a rung at a time:

1. The model is asked. If it declines, the host announces, in this round and all others.
2. No acknowledgement by the deadline: it is asked once more.
3. None by the second deadline: the host announces, and goes on doing so until an ack comes.
4. Acknowledged: the guest's frames are what counts. What the address book has and the guest did
   not show by then is announced by the host.

A round that falls due while an answer is awaited waits for it, so that each round has its effect.
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

#: After an ack, the time in which the guest's frames must have come by, s. Linux sends them before
#: it acknowledges (drivers/net/virtio_net.c, virtnet_config_changed_work), so this is only how
#: long the watch may take to read them.
SHOW_S = 0.1
#: Rounds after the schedule's while the announcement is not verified: s after the one before.
EXTRA_S = (1.0, 2.0, 4.0, 8.0, 16.0)
#: From a question to its answer, s.
VERIFY_S = 0.3

#: Receives an event and its data.
Report = Callable[[Event, dict[str, object]], None]
#: Has a call made later, under the announcer's lock, unless the announcement is over by then.
Later = Callable[[float, Callable[[], None]], Timer]


class Verifier(Protocol):
    """Finds out whether the network knows where the guest is; see :mod:`.verify`."""

    #: Whether anybody asks.
    wanted: bool

    def begin(self) -> None:
        """The first round is made."""

    def ask(self) -> None:
        """Put the question."""

    def missing(self) -> list[str]:
        """What is not verified, in words; empty: all is."""


class NicAnnouncement:
    """See the module."""

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
        self._extra: Sequence[float] = EXTRA_S
        self._held = False
        self._round_held = False
        self._owed: str | None = None  # why the host shall speak, once the port is ready
        self._awaited = 0  # requests without an answer since the last ack
        self._deadline: Timer | None = None
        self._round_waits = False
        self._host = False
        self._pending = 0  # timers

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return not self._held and not self._pending

    def begin(self) -> None:
        """The VM runs. Announce, or wait for the port."""
        next(self._delays, None)
        self._round()

    def port_ready(self) -> None:
        """The port is ready now: a late one starts the schedule then, one that was gone goes on."""
        if not self._held:
            return
        self._held = False
        self._record.held = None
        self._record.ready_at = self._clock.now()
        owed, self._owed = self._owed, None
        round_held, self._round_held = self._round_held, False
        if round_held:
            self._round()  # it says all there is to say
        elif owed is not None:
            self._speak(owed)

    def acked(self) -> None:
        """The guest acknowledged."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            self._pending -= 1
        if not (self._awaited or self._host):
            return
        self._awaited = 0
        self._host = False
        self._after(SHOW_S, self._fill_in)
        if self._round_waits:
            self._round_waits = False
            self._round()

    def _after(self, delay: float, call: Callable[[], None]) -> Timer:
        def due() -> None:
            self._pending -= 1
            call()

        self._pending += 1
        return self._later(delay, due)

    # --- rounds -----------------------------------------------------------------------------------
    def _round(self) -> None:
        if self._awaited:
            self._round_waits = True
            return
        if self._hold():
            self._round_held = True
            return
        # Whoever speaks, guest or host, has so much to say.
        frames = len(self.uplink.entries())
        first = not self._record.rounds
        wait = self._pacer.take(frames, self._rate, self._clock.now(), first)
        if wait > 0:
            self._after(wait, self._round)
        else:
            self._make_round()

    def _hold(self) -> bool:
        """Wait for the port, if it is not ready, or is gone since the last round."""
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
        if self._host:
            self._speak("no ack")
        elif not self._ask():
            self._speak("declined")
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
        elif self._extra:
            delay, self._extra = self._extra[0], self._extra[1:]
            self._after(delay - VERIFY_S, self._round)
        else:
            self._report(*Event.ANNOUNCE_UNVERIFIED.of(nic=record.nic, what=record.unverified))

    # --- rungs ------------------------------------------------------------------------------------
    def _ask(self) -> bool:
        """Ask the model; whether it accepted."""
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
            self._awaited += 1
            self._deadline = self._after(self._deadline_s, self._unanswered)
        elif first:
            record.asked_at = None
        return accepted

    def _unanswered(self) -> None:
        self._deadline = None
        self._record.timeouts += 1
        self._report(*Event.ANNOUNCE_TIMEOUT.of(nic=self._record.nic, asked=self._awaited))
        if self._awaited < 2:
            if self._ask():
                return
            why = "declined"
        else:
            self._host = True
            why = "no ack"
        self._awaited = 0
        if self._round_waits:
            self._round_waits = False
            self._round()
        else:
            self._speak(why)

    def _fill_in(self) -> None:
        """The guest acknowledged; what did it leave out?"""
        if self.uplink.missing():
            self._speak("not shown")

    def _speak(self, why: str) -> None:
        if self._hold():
            self._owed = why
            return
        record = self._record
        entries = self.uplink.missing() if why == "not shown" else self.uplink.entries()
        if why != "not shown":
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
            *Event.ANNOUNCE_HOST.of(nic=record.nic, round=record.rounds, frames=count, why=why)
        )

    def _failed(self, error: Exception) -> None:
        cause = str(error) or type(error).__name__
        self._record.error = cause
        self._report(
            *Event.ANNOUNCE_FAILED.of(nic=self._record.nic, round=self._record.rounds, cause=cause)
        )
