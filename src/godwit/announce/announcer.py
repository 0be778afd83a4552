"""The announcements of one VM: when they start, and of which NICs.

The rule is that of 'Send the gratuitous by guest' V7 (qemu-devel, 2013): the announcement starts on
the transition ``prelaunch-migrate`` to ``running``, and at no other. What is done for each NIC is
its :class:`.nic_announcement.NicAnnouncement`. The first round is made inside the transition, the
others by timers; leaving ``running`` ends all rounds.

Locks, outermost first. ``_rounds_lock`` is held while NICs are asked, so that once a VM has left
``running`` (and this listener has returned) no further frame leaves. Hence **no caller may hold a
NIC's own lock while it changes the run state**. ``_records_lock`` guards the records, and is never
held while something else is called: a NIC may call :meth:`Announcer.acked` under its lock.
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

from .dissect import Sighting
from .nic_announcement import NicAnnouncement, Report, Verifier
from .pacing import Pacer
from .record import NicRecord
from .uplink import Uplink

#: The id of the announcement that a resume after a migration starts.
MIGRATION = "migration"
#: The id of the announcement at a source whose guest stays after all.
RETURNED = "returned"
#: The ids of announcements of a copied guest, by NIC, begin with this.
OPENED = "opened"
_ON_DEMAND = "id:"
#: Announcements on demand that may be under way at once, each with an id of its own.
MAX_ON_DEMAND = 16
#: Addresses of a VM that ANNOUNCE_SEEN reports, at most.
MAX_SEEN_REPORTS = 1024


class _NoVerifier:
    """The verifier of an announcement that nobody wants verified."""

    wanted = False

    def begin(self) -> None:
        pass

    def ask(self) -> None:
        pass

    def missing(self) -> list[str]:
        return []


def no_verifier(uplink: Uplink, options: AnnounceOptions) -> Verifier:
    """Return the verifier of an announcement that nobody wants verified."""
    return _NoVerifier()


class _Announcement:
    """One announcement under way, of some or all NICs."""

    def __init__(self) -> None:
        self.nics: list[NicAnnouncement] = []
        self.timers: set[Timer] = set()
        self.live = True

    def cancel(self) -> None:
        self.live = False
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()


class Announcer:
    """The announcer of one VM's NICs: a listener of the run states.

    Thread-safe; see the module for the order of locks. ``parameters()`` returns what the operator
    wants now: an announcement that begins calls it once. ``make_verifier(uplink, options)`` returns
    the verifier of one NIC's announcement.
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
        self._rounds_lock = threading.RLock()
        self._records_lock = threading.Lock()
        self._running = False
        self._current: dict[str, _Announcement] = {}
        self._records = {name: NicRecord(name) for name in self._uplinks}
        self._seen_reported: set[tuple[str, bytes, object, bytes | None]] = set()

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """Listen to the run states: start an announcement, or end what is under way."""
        with self._rounds_lock:
            self._running = new is RunState.RUNNING
            if RunState.RUNNING in (old, new):  # a guest that was loaded is here before it runs
                for uplink in self._uplinks.values():
                    uplink.observer.guest_here(self._running)
            if not self._running:
                for key in tuple(self._current):
                    self._cancel(key)
            elif old is RunState.PRELAUNCH_MIGRATE:
                try:
                    self._start(MIGRATION, self._own())
                    self._ask_copies()
                except Exception as error:
                    # The guest runs here: an error that got out of this transition would look
                    # like a guest that did not arrive, and its source would let it run as well.
                    cause = f"{type(error).__name__}: {error}"
                    self._report(*Event.ANNOUNCE_FAILED.of(nic="", round=0, cause=cause))

    def returned(self) -> None:
        """Announce a guest that runs on at the source, though it may have run elsewhere."""
        with self._rounds_lock:
            if self._running:
                self._start(RETURNED, tuple(self._uplinks))

    def opened(self, nic: str) -> None:
        """Announce a copied guest's NIC that uses an address of its own for the first time."""
        with self._rounds_lock:
            if self._running:
                self._start(f"{OPENED}:{nic}", (nic,))

    def announce_self(
        self,
        parameters: AnnounceParameters,
        interfaces: Sequence[str] | None = None,
        id: str | None = None,
    ) -> None:
        """Announce on demand, as QEMU's announce-self: the same ``id`` starts anew.

        ``interfaces`` are the names of the NICs to announce; None: all. With no rounds at all, the
        announcement that has this ``id`` ends.

        Raises:
            ConfigError: there is no NIC of that name.
            StateError: the VM does not run, or too many announcements are under way.
        """
        names = self._chosen(interfaces)
        # A key of its own, so that no id given from outside ends the resume's announcement.
        key = f"{_ON_DEMAND}{id or ''}"
        with self._rounds_lock:
            if not self._running:
                raise StateError("only a running VM announces itself")
            if parameters.rounds and key not in self._current:
                self._check_number()
            self._start(key, names, parameters)

    def acked(self, nic: str) -> None:
        """Take note that the guest acknowledged an attempt.

        NIC models call this method, also under their own lock.
        """
        now = self._clock.now()
        first, latency = False, None
        with self._records_lock:
            record = self._records.get(nic)
            # Else an announcement before this one asked, and is notified all the same.
            if record is not None and record.asked_at is not None:
                record.acks += 1
                first = record.acked_at is None
                if first:
                    record.acked_at = now
                latency = record.ack_ms
        if first:
            self._report(*Event.ANNOUNCE_ACKED.of(nic=nic, ms=round(latency or 0.0, 3)))
        # The NIC's announcements need the outer lock.
        self._clock.call_later(0, lambda: self._notify(nic, NicAnnouncement.acked))

    def seen(self, nic: str, sighting: Sighting) -> None:
        """Report that the guest's own announcement of an address was seen for the first time.

        Call this for each frame in which the guest announces.
        """
        key = (nic, sighting.mac, sighting.tags, sighting.ip)
        with self._records_lock:
            record = self._records[nic]
            reported = self._seen_reported
            if not record.id or key in reported or len(reported) >= MAX_SEEN_REPORTS:
                return
            reported.add(key)
        self._report(
            *Event.ANNOUNCE_SEEN.of(
                nic=nic,
                **_address(sighting.mac, sighting.tags, sighting.ip),
                kind=sighting.kind.value,
                ms=record.ms_until(self._clock.now()),
            )
        )

    def answered(self, nic: str, sighting: Sighting) -> None:
        """Take note of what another host shows on its way to the guest."""
        if self._current:
            self._notify(nic, lambda announcement: announcement.answered(sighting))

    def port_ready(self, nic: str) -> None:
        """Go on with the announcements that waited for the NIC's port."""
        self._notify(nic, NicAnnouncement.port_ready)

    def records(self) -> list[NicRecord]:
        """Return what became of each NIC's last announcement: copies, in the order of the NICs."""
        with self._records_lock:
            return [msgspec.structs.replace(record) for record in self._records.values()]

    def info(self) -> list[dict[str, object]]:
        """Return the records with all addresses, as query-announce shows them."""
        return [self._info(record) for record in self.records()]

    # --- inside -----------------------------------------------------------------------------------
    def _own(self) -> tuple[str, ...]:
        """Return the NICs whose addresses are this guest's own, and not those of its original."""
        uplinks = self._uplinks.items()
        return tuple(id for id, one in uplinks if one.gate is None or one.gate.open)

    def _ask_copies(self) -> None:
        """Have a copied guest announce itself: held back, which shows the gate what it has."""
        for uplink in self._uplinks.values():
            if uplink.gate is not None and not uplink.gate.open:
                uplink.nic.announce()

    def _check_number(self) -> None:
        """Refuse one more announcement on demand: each ack and each change of a port walks all."""
        self._forget_over()
        if sum(key.startswith(_ON_DEMAND) for key in self._current) >= MAX_ON_DEMAND:
            raise StateError(
                f"{MAX_ON_DEMAND} announcements on demand are under way: use an 'id' again, which "
                "starts that one anew, or end one by its 'id' with 'rounds' 0"
            )

    def _forget_over(self) -> None:
        for old in [old for old, one in self._current.items() if all(nic.over for nic in one.nics)]:
            del self._current[old]

    def _info(self, record: NicRecord) -> dict[str, object]:
        uplink = self._uplinks[record.nic]
        entries = uplink.entries()
        addresses = [
            {
                **_address(entry.mac, entry.tags, entry.ip),
                "seen-ms": record.ms_until(seen_at),
                "host-ms": record.ms_until(uplink.host_announced_at(entry)),
            }
            for entry, seen_at in zip(entries, uplink.seen_at(entries), strict=True)
        ]
        return {
            "nic": record.nic,
            "id": record.id.removeprefix(_ON_DEMAND),
            "mac": record.mac or uplink.nic.mac.hex(":"),
            "method": record.method,
            "rounds": record.rounds,
            "asked": record.asked,
            "acks": record.acks,
            "ack-ms": None if record.ack_ms is None else round(record.ack_ms, 3),
            "timeouts": record.timeouts,
            "rarp-sent": record.rarp_sent,
            "host-sent": record.host_sent,
            "reports-sent": record.reports_sent,
            "host-ms": record.ms_until(record.host_sent_at),
            "held": record.held,
            "ready-ms": record.ms_until(record.ready_at),
            "questions": record.questions,
            "answers": record.answers,
            "proof": record.proof,
            "proved-ms": record.ms_until(record.proved_at),
            "unproved": record.unproved,
            "claims": uplink.claims,
            "verified-ms": record.ms_until(record.verified_at),
            "unverified": record.unverified,
            "error": record.error,
            "watched": uplink.watched,
            "malformed": uplink.observer.malformed,
            "quarantined": uplink.gate is not None and not uplink.gate.open,
            "held-back": 0 if uplink.gate is None else uplink.gate.held,
            "addresses": addresses,
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
        if schedule is not None:  # as many rounds as the operator asked for
            options = msgspec.structs.replace(options, patience=0)
        self._forget_over()
        if not parameters.rounds or not names:
            return
        self._current[key] = announcement = _Announcement()
        for name in names:
            uplink = self._uplinks[name]
            record = NicRecord(name, id=key, began_at=self._clock.now())
            uplink.begin()
            with self._records_lock:
                self._records[name] = record
                self._seen_reported = {one for one in self._seen_reported if one[0] != name}
            nic = NicAnnouncement(
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
            announcement.nics.append(nic)
            # The frames first: an event costs the guest's peers time.
            nic.begin()
        self._report(
            *Event.ANNOUNCE_STARTED.of(
                id=key.removeprefix(_ON_DEMAND), nics=list(names), rounds=parameters.rounds
            )
        )

    def _cancel(self, key: str) -> None:
        gone = self._current.pop(key, None)
        if gone:
            gone.cancel()

    def _later(self, announcement: _Announcement, delay: float, call: Callable[[], None]) -> Timer:
        def due() -> None:
            with self._rounds_lock:
                announcement.timers.discard(timer)
                # A timer that was already on its way when it was cancelled comes too late.
                if announcement.live:
                    call()

        timer = self._clock.call_later(delay, due)
        announcement.timers.add(timer)
        return timer

    def _notify(self, name: str, call: Callable[[NicAnnouncement], None]) -> None:
        """Make a call on each announcement of one NIC that is under way."""
        with self._rounds_lock:
            for announcement in tuple(self._current.values()):
                for nic in announcement.nics:
                    if nic.uplink.nic.id == name and announcement.live:
                        call(nic)


def _address(mac: bytes, tags: Sequence[tuple[int, int]], ip: bytes | None) -> dict[str, object]:
    return {
        "mac": mac.hex(":"),
        "vlans": [{"tpid": tpid, "vid": vid} for tpid, vid in tags],
        "ip": None if ip is None else _text(ip),
    }


def _text(ip: bytes) -> str:
    import socket  # loaded by the time that anybody asks

    return socket.inet_ntop(socket.AF_INET if len(ip) == 4 else socket.AF_INET6, ip)
