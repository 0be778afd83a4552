"""A VM's migrations: out, in, and the take-over of a guest that arrived.

The rule for every start: the machine runs first and the state changes second, so that a listener of
the state (the announcer above all) acts after the VM has started, never before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from godwit.announce.uplink import Uplink
from godwit.errors import ConfigError, GodwitError, MigrationError, StateError
from godwit.hw.capabilities import ChecksKept, Relocatable, Renews, Unmovable
from godwit.machine.machine import Machine
from godwit.spec.parameters import MigrationParameters
from godwit.spec.restore import FULL, Restore
from godwit.spec.runstate import RunState, RunStates

if TYPE_CHECKING:
    from godwit.migration.guest import Guest, OnOwn
    from godwit.migration.incoming import Incoming
    from godwit.migration.outgoing import Outgoing
    from godwit.migration.snapshot.saver import Manner
    from godwit.migration.times import Times
    from godwit.migration.wire.address import Address, Credentials

_S = RunState


class Migrations:
    """The present or last migration out of a VM, and the one by which its guest came.

    ``now`` is the clock of the uplinks; ``times`` are a migration's, by default the usual ones;
    ``credentials`` are what both ends of a migration are shown; ``restore`` is for guests from
    files.
    What only a migration needs is imported by the first one, not by a guest that boots.

    The callbacks are called in the migrations' threads: ``on_status(outgoing, status)`` for each
    status of a migration out, ``on_incoming_failed(error)`` when no guest will come,
    ``on_damaged(error)`` when RAM that was restored lazily is wrong, and the guest paused for it.
    ``on_own(nic, mac)`` is called by the thread that carries frames, when a copy of a guest uses an
    address of its own.

    Attributes:
        parameters: the operator's parameters, replaced as a whole.
        autostart: a guest that ran at its source runs here at once.
    """

    def __init__(
        self,
        machine: Machine,
        uplinks: Sequence[Uplink],
        states: RunStates,
        now: Callable[[], float],
        on_status: Callable[[Outgoing, str], None],
        on_incoming_failed: Callable[[GodwitError], None],
        *,
        autostart: bool = True,
        times: Times | None = None,
        credentials: Credentials | None = None,
        restore: Restore = FULL,
        on_damaged: Callable[[GodwitError], None] = lambda error: None,
        on_own: OnOwn = lambda nic, mac: None,
    ) -> None:
        self._machine = machine
        self._uplinks = uplinks
        self._states = states
        self._now = now
        self._on_status = on_status
        self._on_incoming_failed = on_incoming_failed
        self._times = times
        self._credentials = credentials
        self._restore = restore
        self._on_damaged = on_damaged
        self._on_own = on_own
        self.parameters = MigrationParameters()
        self.autostart = autostart
        self._closing = False
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None

    # --- out --------------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        """True while a migration out is under way."""
        return self._outgoing is not None and self._outgoing.active

    def migrate(self, uri: str, insecure: bool) -> None:
        """Start a migration of the guest to ``uri``, which may be a file.

        Raises:
            ConfigError: the URI is wrong, or leaves this host without ``insecure``.
            StateError: a migration is under way, the guest is dead, or a device keeps it here.
        """
        self._check_free(uri.startswith("file:"))
        if uri.startswith("file:"):
            from godwit.migration.snapshot.saver import PLAIN

            self._start(self._saver(uri, PLAIN))
        else:
            self._start(self._source(uri, insecure))

    def save(self, path: str, keep_running: bool, compress: str) -> None:
        """Start a save of the guest into the file at ``path``.

        The VM ends with a save after which the guest does not run on.

        Raises:
            ConfigError: the path is wrong, or there is no such compression.
            StateError: a migration is under way, the guest is dead, or a device may be in no
                snapshot of a guest that runs on.
        """
        from godwit.migration.snapshot.saver import Manner

        self._check_free(into_file=True)
        if keep_running:
            self._machine.devices.check_copy()
        self._start(self._saver(f"file:{path}", Manner(keep_running, compress, ends_vm=True)))

    def _check_free(self, into_file: bool) -> None:
        if self.active:
            raise StateError(
                "a migration is under way already; see query-migrate, or migrate_cancel"
            )
        exited = self._machine.exited
        if exited is not None:
            raise StateError(f"the guest is dead ({exited[1]}); there is nothing to migrate")
        for part in self._machine.devices.having(Unmovable):
            reason = part.unmovable(into_file)
            if reason is not None:
                raise StateError(f"the guest cannot leave this host: {reason}")
        for uplink in self._uplinks:
            if uplink.gate is not None and not uplink.gate.settled:
                raise StateError(
                    f"{uplink.nic.id}: the guest is a copy, and has used its original's addresses "
                    "within the last minute, which nothing would hold back elsewhere; give it its "
                    "own first"
                )

    def _start(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._on_status(outgoing, "setup")
        outgoing.start()

    def _saver(self, uri: str, manner: Manner) -> Outgoing:
        from godwit.migration.snapshot.saver import Saver, path_of

        saver: Outgoing = Saver(
            self._guest(),
            self._states,
            path_of(uri),
            lambda: self.parameters,
            lambda status: self._on_status(saver, status),
            self._known_times(),
            manner,
            self._checked,
        )
        return saver

    def _source(self, uri: str, insecure: bool) -> Outgoing:
        from godwit.migration.source import Source

        packets = self._incoming.packets if self._incoming is not None else None
        source: Outgoing = Source(
            self._guest(),
            self._states,
            self._address(uri, insecure),
            lambda: self.parameters,
            lambda status: self._on_status(source, status),
            lambda: packets is not None and packets.holding,
            self._known_times(),
            self._checked,
        )
        return source

    def _checked(self) -> bool:
        """Return whether the guest is known to have come undamaged, or raise StreamError."""
        return self._incoming is None or self._incoming.checked()

    def cancel(self) -> None:
        """Give up the present migration out, if there is one.

        Raises:
            StateError: the guest was handed over already.
        """
        outgoing = self._outgoing
        if outgoing is not None and outgoing.active and not outgoing.cancel():
            raise StateError("too late to cancel: the guest was handed over")

    def fail_for_exit(self, why: str, then: Callable[[], None]) -> bool:
        """Have a migration of a guest that exited fail, and ``then`` called once it is over.

        Returns False if there is none.
        """
        outgoing = self._outgoing
        if outgoing is None or not outgoing.needs_guest:
            return False
        outgoing.give_up(f"{why} during its migration")
        outgoing.when_over(then)
        return True

    # --- in ---------------------------------------------------------------------------------------
    def expect_guest(self) -> None:
        """Import in a thread what takes a guest, before anybody says where the guest comes from."""
        threading.Thread(target=self._import_incoming, name="imports", daemon=True).start()

    def _import_incoming(self) -> None:
        from godwit.migration import destination
        from godwit.migration.snapshot import restorer, saver

        self._guest().prepare()
        restorer.prepare()
        del destination, saver

    def await_guest(
        self, uri: str, insecure: bool, opened: Callable[[], None] = lambda: None
    ) -> None:
        """Wait for a guest at ``uri``, or load one from a file.

        ``opened`` is called once the address or file is open, before any source is served.

        Raises:
            ConfigError: the URI is wrong, or is open to others without ``insecure``.
            StateError: the VM waits already.
        """
        if self._incoming is not None:
            raise StateError("the VM waits for a guest already")
        if any(self._restore) and not uri.startswith("file:"):
            raise ConfigError(
                f"'{uri}' brings a guest that runs, and --restore, --restore-clock and --clone "
                "are for one from a file; start the VM without them"
            )
        times = self._known_times()
        ends = self._take_over, self._on_incoming_failed
        if uri.startswith("file:"):
            from godwit.migration.snapshot.restorer import Restorer
            from godwit.migration.snapshot.saver import path_of

            self._incoming = Restorer(
                self._guest(), path_of(uri), *ends, times, self._restore, self._on_damaged
            )
            self._states.set(_S.RESTORE_VM)
        else:
            from godwit.migration.destination import Destination

            self._incoming = Destination(
                self._guest(),
                self._address(uri, insecure),
                *ends,
                lambda: self.parameters.handover,
                times,
            )
        opened()
        self._incoming.start()

    def _guest(self) -> Guest:
        from godwit.migration.guest import Guest

        on_own = self._on_own if self._restore.clone else None
        return Guest(self._machine, self._uplinks, self._now, on_own)

    def _address(self, uri: str, insecure: bool) -> Address:
        from godwit.migration.wire.address import NONE, Address

        return Address(uri, insecure, self._known_times(), self._credentials or NONE)

    def _known_times(self) -> Times:
        if self._times is None:
            from godwit.migration.times import TIMES

            self._times = TIMES
        return self._times

    def switch_over(self) -> bool:
        """Switch over the traffic of a guest about to run, under the machine's lock.

        Returns False if nothing was to be switched over, or all was before.
        """
        packets = self._incoming.packets if self._incoming is not None else None
        return packets is not None and packets.switch_over(lambda phase: None)

    def _take_over(self, incoming: Incoming, running: bool) -> None:
        """Take over the guest: the commit was received. In the incoming migration's thread."""
        machine, packets = self._machine, incoming.packets
        with machine.lock:
            if self._closing:
                raise MigrationError("the destination is closing")
            machine.devices.acquire()
            self._states.set(_S.PRELAUNCH_MIGRATE)
            for moved in machine.devices.having(Relocatable):
                moved.relocated()
            if incoming.kept:
                for kept in machine.devices.having(ChecksKept):
                    kept.check_kept()
                for part in machine.devices.having(Renews):
                    part.renew()
            if self.autostart and running:
                if packets is None or not packets.switch_over(incoming.phase):
                    machine.drain_taps()
                try:
                    machine.resume(incoming.phase)
                except BaseException:
                    machine.pause()  # nothing of the guest runs once its source is refused
                    machine.devices.release()
                    raise
                # It runs: nothing but its own end may end it here from now on.
                incoming.owned = True
                if packets is not None and packets.settle():
                    incoming.phase("packets-handed-over")
                # The source first: it waits, and listeners of the state take their time.
                incoming.started([*map(str, self._states.history), str(_S.RUNNING)])
                self._states.set(_S.RUNNING)
            else:
                incoming.started([*map(str, self._states.history)])

    # --- both -------------------------------------------------------------------------------------
    def info(self, announcements: Callable[[], object]) -> dict[str, object]:
        """Return the present or last migration, or the one by which the guest came."""
        runstates = [str(state) for state in self._states.history]
        if self._outgoing is not None:
            info: dict[str, Any] = self._outgoing.report.info()
            info["godwit"]["runstates"] = runstates
            return info
        if self._incoming is None:
            return {}
        arrived = self._states.current not in (_S.INMIGRATE, _S.RESTORE_VM)
        own: dict[str, object] = {
            "destination-phases": dict(self._incoming.phases),
            "runstates": runstates,
            "announce": announcements(),
        }
        if self._incoming.packets is not None:
            own["handover"] = self._incoming.packets.info()
        return {"status": "completed" if arrived else "setup", "godwit": own}

    def close(self) -> None:
        """End the migrations in both directions.

        The guest stops before the connection to its source is closed: a source that queries and
        finds nobody may let its guest go on.
        """
        if self._outgoing is not None:
            self._outgoing.abandon()
            self._outgoing.join(10)
        with self._machine.lock:
            self._closing = True
            self._machine.pause()
        if self._incoming is not None:
            self._incoming.close()
