"""Who announces which NIC, and when: a listener of the run states.

The seed's rule ('Send the gratuitous by guest' V7): the announcement starts on the transition
``prelaunch-migrate`` to ``running``, and at no other. What is done for each NIC is its
:class:`.ladder.NicAnnouncement`. The first round is made inside the transition, the others by
timers; leaving ``running`` ends them all.

Locks, outermost first. ``_rounds`` is held while NICs are asked, so that once a VM has left
``running`` (and this listener has returned) no further frame leaves. Hence **no caller may hold a
NIC's own lock while it changes the run state**. ``_lock`` guards the records, and is never held
while something else is called: a NIC may call :meth:`Announcer.acked` under its lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import msgspec

from godwit.errors import ConfigError, StateError
from godwit.host.loop import Clock, Timer
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceOptions, AnnounceParameters, MigrationParameters
from godwit.spec.runstate import RunState

from .addresses import Entry
from .attempts import NicAnnouncement, Report, Verifier
from .dissect import Sighting
from .pacing import Pacer
from .record import NicRecord
from .uplink import Uplink

#: The id of the announcement that a resume after a move starts.
RESUME = "migration"
#: The id of the one at a source whose guest stays after all.
RETURNED = "returned"


class _Unverified:
    """The verifier of those who do not want one."""

    wanted = False

    def begin(self) -> None:
        pass

    def ask(self) -> None:
        pass

    def missing(self) -> list[str]:
        return []


def no_verifier(uplink: Uplink, options: AnnounceOptions) -> Verifier:
    """For those who do not want one."""
    return _Unverified()


class _Announcement:
    """One announcement under way, of some NICs."""

    def __init__(self) -> None:
        self.ladders: list[NicAnnouncement] = []
        self.timers: set[Timer] = set()
        self.live = True

    def cancel(self) -> None:
        self.live = False
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()


class Announcer:
    """Announces the NICs of one VM. Thread-safe; see the module for the order of locks.

    ``parameters()`` returns what the operator wants now: an announcement that begins reads it once.
    ``make_verifier(uplink, options)`` gives a ladder its verifier.
    """

    def __init__(
        self,
        uplinks: Sequence[Uplink],
        clock: Clock,
        report: Report,
        parameters: Callable[[], MigrationParameters] = MigrationParameters,
        make_verifier: Callable[[Uplink, AnnounceOptions], Verifier] = no_verifier,
    ) -> None:
        self._parameters = parameters
        self._uplinks = {uplink.nic.id: uplink for uplink in uplinks}
        self._clock = clock
        self._report = report
        self._make_verifier = make_verifier
        self._pacer = Pacer()  # of all the VM's NICs together
        self._rounds = threading.RLock()
        self._lock = threading.Lock()
        self._running = False
        self._current: dict[str, _Announcement] = {}
        self._records = {name: NicRecord(name) for name in self._uplinks}
        self._shown: set[tuple[str, bytes, object, bytes | None]] = set()

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """Listen to the run states: start, or end what is under way."""
        with self._rounds:
            self._running = new is RunState.RUNNING
            if not self._running:
                for key in tuple(self._current):
                    self._cancel(key)
            elif old is RunState.PRELAUNCH_MIGRATE:
                try:
                    self._start(RESUME, tuple(self._uplinks))
                except Exception as error:
                    # The guest runs here: an error that got out of this transition would look
                    # like a guest that did not arrive, and its source would let it run as well.
                    cause = f"{type(error).__name__}: {error}"
                    self._report(*Event.ANNOUNCE_FAILED.of(nic="", round=0, cause=cause))

    def returned(self) -> None:
        """The guest runs on where it was, though a peer may have heard of it from elsewhere."""
        with self._rounds:
            if self._running:
                self._start(RETURNED, tuple(self._uplinks))

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
        names = self._chosen(interfaces)
        with self._rounds:
            if not self._running:
                raise StateError("only a running VM announces itself")
            # A key of its own, so that no id given from outside ends the resume's announcement.
            self._start(f"id:{id or ''}", names, parameters)

    def acked(self, nic: str) -> None:
        """Take note that the guest acknowledged; NIC models call it, also under their lock."""
        now = self._clock.now()
        first, latency = False, None
        with self._lock:
            record = self._records.get(nic)
            # Else an announcement before this one asked, and its ladder waits.
            if record is not None and record.asked_at is not None:
                record.acks += 1
                first = record.acked_at is None
                if first:
                    record.acked_at = now
                latency = record.ack_ms
        if first:
            self._report(*Event.ANNOUNCE_ACKED.of(nic=nic, ms=round(latency or 0.0, 3)))
        # The ladder needs the outer lock.
        self._clock.call_later(0, lambda: self._tell(nic, NicAnnouncement.acked))

    def seen(self, nic: str, sighting: Sighting) -> None:
        """The guest announced an address; told of each such frame."""
        key = (nic, sighting.mac, sighting.tags, sighting.ip)
        with self._lock:
            record = self._records[nic]
            if not record.id or key in self._shown or len(self._shown) >= 1024:
                return
            self._shown.add(key)
        self._report(
            *Event.ANNOUNCE_SEEN.of(
                nic=nic,
                **_address(sighting.mac, sighting.tags, sighting.ip),
                kind=sighting.kind.value,
                ms=record.since(self._clock.now()),
            )
        )

    def port_ready(self, nic: str) -> None:
        """The NIC's port is ready: what waited for it begins."""
        self._tell(nic, NicAnnouncement.port_ready)

    def records(self) -> list[NicRecord]:
        """What became of each NIC's last announcement: copies, in the order of the NICs."""
        with self._lock:
            return [msgspec.structs.replace(record) for record in self._records.values()]

    def info(self) -> list[dict[str, object]]:
        """The same with all addresses, as query-announce shows it. Times are ms since it began."""
        return [self._info(record) for record in self.records()]

    # --- inside -----------------------------------------------------------------------------------
    def _info(self, record: NicRecord) -> dict[str, object]:
        uplink = self._uplinks[record.nic]
        observer = uplink.observer

        def address(entry: Entry) -> dict[str, object]:
            return {
                **_address(entry.mac, entry.tags, entry.ip),
                "seen-ms": record.since(observer.announced_at(entry)),
                "host-ms": record.since(uplink.said_at(entry)),
            }

        return {
            "nic": record.nic,
            "id": record.id.removeprefix("id:"),
            "mac": record.mac or uplink.nic.mac.hex(":"),
            "method": record.method,
            "rounds": record.rounds,
            "asked": record.asked,
            "acks": record.acks,
            "ack-ms": None if record.ack_ms is None else round(record.ack_ms, 3),
            "timeouts": record.timeouts,
            "host-sent": record.host_sent,
            "host-ms": record.since(record.host_sent_at),
            "held": record.held,
            "ready-ms": record.since(record.ready_at),
            "verified-ms": record.since(record.verified_at),
            "unverified": record.unverified,
            "error": record.error,
            "watched": uplink.watched,
            "malformed": observer.malformed,
            "addresses": [address(entry) for entry in uplink.entries()],
        }

    def _chosen(self, interfaces: Sequence[str] | None) -> tuple[str, ...]:
        if interfaces is None:
            return tuple(self._uplinks)
        names = ", ".join(self._uplinks) or "none"
        for name in interfaces:
            if name not in self._uplinks:
                raise ConfigError(f"there is no NIC '{name}'; this VM has: {names}")
        if not interfaces:
            raise ConfigError(f"'interfaces' is empty: leave it out for all, or choose: {names}")
        return tuple(name for name in self._uplinks if name in interfaces)

    def _start(
        self, key: str, names: Sequence[str], schedule: AnnounceParameters | None = None
    ) -> None:
        self._cancel(key)
        wanted = self._parameters()
        parameters, options = schedule or wanted.announce, wanted.announce_options
        for old in [old for old, one in self._current.items() if all(x.over for x in one.ladders)]:
            del self._current[old]
        if not parameters.rounds:
            return
        self._current[key] = announcement = _Announcement()
        for name in names:
            uplink = self._uplinks[name]
            record = NicRecord(name, id=key, began_at=self._clock.now())
            uplink.begin()
            with self._lock:
                self._records[name] = record
                self._shown = {one for one in self._shown if one[0] != name}
            ladder = NicAnnouncement(
                uplink,
                record,
                parameters,
                options,
                self._clock,
                lambda delay, call: self._later(announcement, delay, call),
                self._report,
                self._make_verifier(uplink, options),
                self._pacer,
            )
            announcement.ladders.append(ladder)
            # The frames first: an event costs the guest's peers time.
            ladder.begin()
        self._report(
            *Event.ANNOUNCE_STARTED.of(
                id=key.removeprefix("id:"), nics=list(names), rounds=parameters.rounds
            )
        )

    def _cancel(self, key: str) -> None:
        gone = self._current.pop(key, None)
        if gone:
            gone.cancel()

    def _later(self, announcement: _Announcement, delay: float, call: Callable[[], None]) -> Timer:
        def due() -> None:
            with self._rounds:
                announcement.timers.discard(timer)
                # A timer that was already on its way when it was cancelled comes too late.
                if announcement.live:
                    call()

        timer = self._clock.call_later(delay, due)
        announcement.timers.add(timer)
        return timer

    def _tell(self, nic: str, what: Callable[[NicAnnouncement], None]) -> None:
        with self._rounds:
            for announcement in tuple(self._current.values()):
                for ladder in announcement.ladders:
                    if ladder.uplink.nic.id == nic and announcement.live:
                        what(ladder)


def _address(mac: bytes, tags: Sequence[tuple[int, int]], ip: bytes | None) -> dict[str, object]:
    return {
        "mac": mac.hex(":"),
        "vlans": [{"tpid": tpid, "vid": vid} for tpid, vid in tags],
        "ip": None if ip is None else _text(ip),
    }


def _text(ip: bytes) -> str:
    import socket  # loaded by the time that anybody asks

    return socket.inet_ntop(socket.AF_INET if len(ip) == 4 else socket.AF_INET6, ip)
