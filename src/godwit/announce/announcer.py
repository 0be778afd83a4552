"""Who announces which NIC, and when: a listener of the run states.

The seed's rule ('Send the gratuitous by guest' V7): the announcement starts on the transition
``prelaunch-migrate`` to ``running``, and at no other. Each NIC's model is asked first; if it has no
way, or declines, the host sends a RARP in its name. The first round is made inside the transition,
the others by timers; leaving ``running`` ends them all.

Locks, outermost first. ``_rounds`` is held while NICs are asked, so that once a VM has left
``running`` (and this listener has returned) no further frame leaves. Hence **no caller may hold a
NIC's own lock while it changes the run state**. ``_lock`` guards the records, and is never held
while something else is called: a NIC may call :meth:`Announcer.acked` under its lock.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from ..errors import ConfigError, GodwitError, StateError
from ..loop import Clock, Timer
from ..nic.model import NicModel
from ..runstate import RunState
from . import frames
from .schedule import AnnounceParameters, delays

#: Receives an event's name and data. Called from the thread that makes the round.
Report = Callable[[str, dict[str, object]], None]

# The events; later rungs of the ladder add more (seen, verified, timeout).
STARTED = "ANNOUNCE_STARTED"  # id, nics, rounds
ACKED = "ANNOUNCE_ACKED"  # nic, ms
HOST = "ANNOUNCE_HOST"  # nic, mac, round, frame
FAILED = "ANNOUNCE_FAILED"  # nic, round, cause

#: The id of the announcement that a resume after a move starts.
RESUME = "migration"


class NicRecord(msgspec.Struct):
    """What became of one NIC since the last resume. Times are the clock's, in seconds.

    Attributes:
        nic: the NIC's name.
        mac: the address announced last, ``52:54:00:...``.
        method: who announced last: ``guest`` or ``host``; None before the first round.
        rounds: rounds made for this NIC.
        asked: how often the guest was asked and accepted.
        asked_at: when it was first asked.
        acked_at: when it first acknowledged.
        host_sent: frames that the host sent.
        host_sent_at: when it sent the first.
        error: the cause of the last failure.
    """

    nic: str
    mac: str = ""
    method: str | None = None
    rounds: int = 0
    asked: int = 0
    asked_at: float | None = None
    acked_at: float | None = None
    host_sent: int = 0
    host_sent_at: float | None = None
    error: str | None = None

    @property
    def ack_ms(self) -> float | None:
        """From the first request to the first ack, ms; None while there is no ack."""
        if self.asked_at is None or self.acked_at is None:
            return None
        return (self.acked_at - self.asked_at) * 1000


class _Announcement:
    """One announcement under way; a timer that holds another than the current one is stale."""

    def __init__(self, key: str, nics: Sequence[NicModel], delay: Iterator[float]) -> None:
        self.key = key
        self.nics = nics
        self.delay = delay
        self.round = 0
        self.timer: Timer | None = None


class Announcer:
    """Announces the NICs of one VM. Thread-safe; see the module for the order of locks."""

    def __init__(
        self,
        nics: Sequence[NicModel],
        clock: Clock,
        report: Report,
        parameters: AnnounceParameters | None = None,
    ) -> None:
        #: What the next resume uses; replace it at any time.
        self.parameters = parameters or AnnounceParameters()
        self._nics = tuple(nics)
        self._clock = clock
        self._report = report
        self._rounds = threading.RLock()
        self._lock = threading.Lock()
        self._running = False
        self._current: dict[str, _Announcement] = {}
        self._records = self._fresh()

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """Listen to the run states: start, or end what is under way."""
        with self._rounds:
            self._running = new is RunState.RUNNING
            if not self._running:
                self._cancel(tuple(self._current))
            elif old is RunState.PRELAUNCH_MIGRATE:
                fresh = self._fresh()
                with self._lock:
                    self._records = fresh
                self._start(RESUME, self._nics, self.parameters)

    def announce_self(
        self,
        parameters: AnnounceParameters,
        interfaces: Sequence[str] | None = None,
        id: str | None = None,
    ) -> None:
        """Announce on demand, as QEMU's announce-self: the same ``id`` starts anew.

        ``interfaces`` restricts it to the NICs of these names. No rounds at all ends the
        announcement that has this ``id``.

        Raises:
            ConfigError: there is no NIC of that name.
            StateError: the VM does not run.
        """
        nics = self._chosen(interfaces)
        with self._rounds:
            if not self._running:
                raise StateError("only a running VM announces itself")
            # A key of its own, so that no id given from outside ends the resume's announcement.
            self._start(f"id:{id or ''}", nics, parameters)

    def acked(self, nic: str) -> None:
        """Take note that the guest acknowledged; NIC models call it, also under their lock."""
        now = self._clock.now()
        with self._lock:
            record = self._records.get(nic)
            if record is None or record.asked_at is None or record.acked_at is not None:
                return
            record.acked_at = now
            latency = record.ack_ms
        self._report(ACKED, {"nic": nic, "ms": round(latency or 0.0, 3)})

    def records(self) -> list[NicRecord]:
        """What became of each NIC since the last resume: copies, in the order of the NICs."""
        with self._lock:
            return [msgspec.structs.replace(record) for record in self._records.values()]

    def _fresh(self) -> dict[str, NicRecord]:
        return {nic.name: NicRecord(nic.name) for nic in self._nics}

    def _chosen(self, interfaces: Sequence[str] | None) -> tuple[NicModel, ...]:
        if interfaces is None:
            return self._nics
        known = [nic.name for nic in self._nics]
        names = ", ".join(known) or "none"
        for name in interfaces:
            if name not in known:
                raise ConfigError(f"there is no NIC '{name}'; this VM has: {names}")
        if not interfaces:
            raise ConfigError(f"'interfaces' is empty: leave it out for all, or choose: {names}")
        return tuple(nic for nic in self._nics if nic.name in interfaces)

    def _start(self, key: str, nics: Sequence[NicModel], parameters: AnnounceParameters) -> None:
        self._cancel((key,))
        delay = delays(parameters)
        if next(delay, None) is None:
            return
        self._current[key] = announcement = _Announcement(key, nics, delay)
        # The frames first: an event costs the guest's peers time.
        self._round(announcement)
        self._report(
            STARTED,
            {
                "id": key.removeprefix("id:"),
                "nics": [nic.name for nic in nics],
                "rounds": parameters.rounds,
            },
        )

    def _cancel(self, keys: Iterable[str]) -> None:
        for key in keys:
            gone = self._current.pop(key, None)
            if gone and gone.timer:
                gone.timer.cancel()

    def _due(self, announcement: _Announcement) -> None:
        with self._rounds:
            # A timer that was already on its way when it was cancelled finds another here.
            if self._current.get(announcement.key) is announcement:
                self._round(announcement)

    def _round(self, announcement: _Announcement) -> None:
        announcement.round += 1
        for nic in announcement.nics:
            self._announce(nic, announcement.round)
        following = next(announcement.delay, None)
        if following is None:
            del self._current[announcement.key]
        else:
            announcement.timer = self._clock.call_later(
                following, functools.partial(self._due, announcement)
            )

    def _announce(self, nic: NicModel, number: int) -> None:
        """Bring one NIC to the network's notice: ask its model, else speak for it."""
        asked_at = self._clock.now()
        with self._lock:
            record = self._records[nic.name]
            record.rounds += 1
            record.mac = nic.mac.hex(":")
            first = record.asked_at is None
            if first:  # before the model is asked: the ack may be quicker than its return
                record.asked_at = asked_at
        try:
            accepted = nic.announce()
        except (GodwitError, OSError) as error:
            accepted = False
            self._failed(record, number, error)
        with self._lock:
            if accepted:
                record.method = "guest"
                record.asked += 1
            else:
                record.method = "host"
                if first:
                    record.asked_at = None
        if not accepted:
            self._send(nic, record, number)

    def _send(self, nic: NicModel, record: NicRecord, number: int) -> None:
        try:
            nic.send_from_host(frames.rarp(nic.mac))
        except (GodwitError, OSError) as error:
            self._failed(record, number, error)
            return
        with self._lock:
            record.host_sent += 1
            if record.host_sent_at is None:
                record.host_sent_at = self._clock.now()
        self._report(
            HOST, {"nic": nic.name, "mac": nic.mac.hex(":"), "round": number, "frame": "rarp"}
        )

    def _failed(self, record: NicRecord, number: int, error: Exception) -> None:
        cause = str(error) or type(error).__name__
        with self._lock:
            record.error = cause
        self._report(FAILED, {"nic": record.nic, "round": number, "cause": cause})
