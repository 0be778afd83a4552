"""One VM under its operator's hand: run states, machine, moves, announcement and QMP together.

It implements :class:`godwit.qmp.controller.Controller`. The rule for every start: the machine runs
first and the state says so second, so that what listens to the state (the announcer above all)
acts after the VM has started, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from godwit.announce.announcer import Announcer
from godwit.announce.monitors import Taps
from godwit.errors import ConfigError, GodwitError, MigrationError, StateError
from godwit.host.loop import Loop
from godwit.hw.console import Console
from godwit.hw.nic.rx_filter_info import FilterView
from godwit.machine.board import Board
from godwit.machine.machine import Machine
from godwit.machine.vcpu import Ending
from godwit.qmp import commands
from godwit.qmp.server import Server
from godwit.spec import events
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters, MigrationParameters
from godwit.spec.runstate import RunState, RunStates

if TYPE_CHECKING:
    from godwit.migration.destination import Destination
    from godwit.migration.outgoing import Outgoing
    from godwit.migration.packets.destination import Arrival
    from godwit.migration.snapshot import Restorer

_S = RunState

#: Exit codes of ``godwit run``, beside 0 (powered off, quit, or moved away) and 1 (an error).
EXIT_RESET = 3
EXIT_TRIPLE_FAULT = 4
EXIT_INTERNAL_ERROR = 5


class Vmm:
    """A VM from its board, which it closes, to its end.

    ``say(text)`` is told what an operator at the terminal should know.

    Raises:
        HostError: the host lacks something.
        ConfigError: the configuration asks for what cannot be.
    """

    def __init__(
        self,
        board: Board,
        loop: Loop,
        console: Console,
        *,
        qmp: str | None = None,
        autostart: bool = True,
        reboot: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._loop = loop
        self._autostart = autostart
        self._reboot = reboot
        self._say = say
        self.states = RunStates()
        self.parameters = MigrationParameters()
        self.exit_code = 0
        self._closing = False
        self._source: Outgoing | None = None
        self._destination: Destination | Restorer | None = None
        self.machine = Machine(board, loop, console, self._vcpu_ended, self._offence)
        self._server: Server | None = None
        self._taps: Taps | None = None
        self._filter_told: set[str] = set()
        try:
            nics = self.machine.nics
            stations = self.machine.stations
            self._taps = Taps(
                {nic.tap: one for nic, one in zip(board.config.nics, stations, strict=True)},
                loop,
                say,
            )
            self.announcer = Announcer(
                stations, loop, self._emit, lambda: self.parameters, self._taps.verifier
            )
            self._taps.on_seen = self.announcer.seen
            self._taps.on_ready = self.announcer.port_ready
            # Before the server: the frames leave before the events are told.
            self.states.listen(self.announcer.run_state_changed)
            if qmp is not None:
                self._server = Server(loop, qmp, self._execute, self._loop_error)
                self.states.listen(self._server.run_state_changed)
            for nic in nics:
                nic.on_ack = self._acked(nic.name)
                nic.on_filter = self._filter_changed(nic.name)
        except BaseException:
            self.close()
            raise

    # --- beginnings -------------------------------------------------------------------------------
    def start(self) -> None:
        """The kernel was loaded: with autostart, run."""
        if self._autostart:
            self.cont()
        # The guest is on its way; what only a move needs is imported meanwhile.
        self._loop.call_soon(_prepare_to_move)

    def await_guest(self, uri: str | None, insecure: bool) -> None:
        """Be a destination; with ``uri`` None, for the migrate-incoming that names one."""
        self.states.set(_S.INMIGRATE)
        if uri is not None:
            self.migrate_incoming(uri, insecure)

    def close(self) -> None:
        """End everything and give everything back."""
        if self._source is not None:
            self._source.abandon()
            self._source.join(10)
        # The guest stops before the line to its source does: a source that asks and finds nobody
        # may let its guest go on.
        with self.machine.lock:
            self._closing = True
            self.machine.pause()
        if self._destination is not None:
            self._destination.close()
        if self._taps is not None:
            self._taps.close()
        self.machine.close()
        if self._server is not None:
            self._server.close()

    # --- Controller -------------------------------------------------------------------------------
    def announce_info(self) -> list[dict[str, object]]:
        """What became of each NIC's last announcement."""
        return self.announcer.info()

    def rx_filters(self, name: str | None) -> list[tuple[str, FilterView]]:
        """Each NIC's receive filter, or that of one. Raises ConfigError."""
        nics = [nic for nic in self.machine.nics if name in (None, nic.name)]
        if name is not None and not nics:
            known = ", ".join(nic.name for nic in self.machine.nics) or "none"
            raise ConfigError(f"there is no NIC '{name}'; this VM has: {known}")
        self._filter_told -= {nic.name for nic in nics}
        return [(nic.name, nic.rx_filter()) for nic in nics]

    def stop(self) -> None:
        """Pause a running guest."""
        with self.machine.lock:
            self.states.require(_S.RUNNING)
            self.machine.pause()
            self.states.set(_S.PAUSED)

    def cont(self) -> None:
        """Start or resume a guest."""
        with self.machine.lock:
            self.states.require(_S.PRELAUNCH, _S.PRELAUNCH_MIGRATE, _S.PAUSED)
            if self._destination is not None and self._destination.arrival is not None:
                self._destination.arrival.draw(lambda phase: None)
            self.machine.resume()
            self.states.set(_S.RUNNING)

    def powerdown(self) -> None:
        """Press the power button."""
        self.machine.pm1.press()

    def quit(self) -> None:
        """End the VM soon."""
        self._emit(*events.shutdown(events.Reason.HOST_QUIT))
        self._loop.call_soon(self._loop.stop)

    def end_by_signal(self) -> None:
        """SIGTERM or SIGINT came, or the operator left the terminal."""
        self._emit(*events.shutdown(events.Reason.HOST_SIGNAL))
        self._loop.call_soon(self._loop.stop)

    def migrate(self, uri: str, insecure: bool) -> None:
        """Start moving the guest to ``uri``, which may be a file."""
        if self._source is not None and self._source.active:
            raise StateError("a move is under way already; see query-migrate, or migrate_cancel")
        ended = self.machine.ended
        if ended is not None:
            raise StateError(f"the guest is dead ({ended[1]}); there is nothing to move")

        def tell(status: str) -> None:
            self._move_status(source, status)

        source: Outgoing
        if uri.startswith("file:"):
            from godwit.migration.snapshot import Saver, path_of

            source = Saver(self.machine, self.states, path_of(uri), lambda: self.parameters, tell)
        else:
            from godwit.migration.source import Source
            from godwit.migration.wire.sockets import Address

            arrival = self._destination.arrival if self._destination is not None else None
            source = Source(
                self.machine,
                self.states,
                Address(uri, insecure),
                lambda: self.parameters,
                tell,
                lambda: arrival is not None and arrival.holding,
            )
        self._source = source
        self._emit(*events.migration("setup"))
        self._source.start()

    def migrate_incoming(self, uri: str, insecure: bool) -> None:
        """Wait for a guest at ``uri``, or take it from a file."""
        self.states.require(_S.INMIGRATE)
        if self._destination is not None:
            raise StateError("the VM waits for a guest already")
        ends = self._take_over, self._arrival_failed
        if uri.startswith("file:"):
            from godwit.migration.snapshot import Restorer, path_of

            self._destination = Restorer(self.machine, path_of(uri), *ends)
        else:
            from godwit.migration.destination import Destination
            from godwit.migration.wire.sockets import Address

            self._destination = Destination(
                self.machine, Address(uri, insecure), *ends, lambda: self.parameters.handover
            )
        self._destination.start()

    def migration_info(self) -> dict[str, object]:
        """The present or last move; of a guest that came here, its arrival."""
        if self._source is not None:
            info = self._source.report.info()
            info["godwit"]["runstates"] = [str(state) for state in self.states.history]
            return info
        if self._destination is None:
            return {}
        arrived = self.states.current is not _S.INMIGRATE
        own: dict[str, object] = {
            "destination-phases": dict(self._destination.phases),
            "runstates": [str(state) for state in self.states.history],
            "announce": self.announce_info(),
        }
        if self._destination.arrival is not None:
            own["handover"] = self._destination.arrival.info()
        return {"status": "completed" if arrived else "setup", "godwit": own}

    def migrate_cancel(self) -> None:
        """Give up the present move."""
        if self._source is not None and self._source.active and not self._source.cancel():
            raise StateError("too late to cancel: the guest was handed over")

    def announce_self(
        self, parameters: AnnounceParameters, interfaces: Sequence[str] | None, id: str | None
    ) -> None:
        """Announce the guest's NICs now."""
        self.announcer.announce_self(parameters, interfaces, id)

    # --- what happens -----------------------------------------------------------------------------
    def _execute(self, name: str, arguments: Mapping[str, object]) -> object:
        return commands.execute(self, name, arguments)

    def _emit(self, event: Event, data: dict[str, object]) -> None:
        if self._server is not None:
            self._server.emit(event, data)

    def _loop_error(self, error: BaseException) -> None:
        self._say(f"internal error: {type(error).__name__}: {error}")

    def _acked(self, nic: str) -> Callable[[], None]:
        return lambda: self.announcer.acked(nic)

    def _filter_changed(self, nic: str) -> Callable[[], None]:
        def tell() -> None:
            # Once until somebody asks, as in QEMU (net/net.c): a guest may change it in a loop.
            if nic not in self._filter_told:
                self._filter_told.add(nic)
                self._emit(*events.rx_filter_changed(nic))

        return tell

    def _offence(self, nic: str, message: str) -> None:
        """A guest broke a device's rules: the device stops, the VM lives, the operator knows."""
        self._emit(*Event.GUEST_ERROR.of(device=nic, message=message))
        self._say(
            f"{nic}: the guest broke the device's rules ({message}); its driver must reset it"
        )

    def _move_status(self, source: Outgoing, status: str) -> None:
        """From the source's thread."""
        if status in ("failed", "cancelled") and source.exposed:
            self.announcer.returned()
        self._emit(*events.migration(status))
        if status == "completed":
            self._say(source.farewell)
        elif status == "failed":
            self._say(f"the guest stays here; the move failed: {source.report.error}")

    def _take_over(
        self,
        ran: bool,
        mark: Callable[[str], None],
        arrival: Arrival | None,
        tell: Callable[[list[str]], None],
    ) -> None:
        """The commit was received: from the destination's thread."""
        with self.machine.lock:
            if self._closing:
                raise MigrationError("the destination is ending")
            self.states.set(_S.PRELAUNCH_MIGRATE)
            if self._autostart and ran:
                if arrival is not None:
                    arrival.draw(mark)
                self.machine.resume(mark)
                if arrival is not None and arrival.settle():
                    mark("frames-handed-over")
                # The source first: it waits, and those who are told of the state take their time.
                tell([*map(str, self.states.history), str(_S.RUNNING)])
                self.states.set(_S.RUNNING)
            else:
                tell([*map(str, self.states.history)])

    def _arrival_failed(self, error: GodwitError) -> None:
        """No guest will come: from the destination's thread."""

        def end() -> None:
            self._say(f"no guest arrived: {error}")
            self._end(_S.SHUTDOWN, events.Reason.HOST_ERROR, 1)

        self._emit(*events.migration("failed"))
        self._loop.call_soon(end)

    def _vcpu_ended(self, ending: Ending, detail: str) -> None:
        """From a vCPU's thread."""
        self._loop.call_soon(lambda: self._guest_ended(ending, detail))

    def _guest_ended(self, ending: Ending, detail: str) -> None:
        if self._source is not None and self._source.active:
            # A guest that ended cannot move. Outside the machine's lock, which the move needs.
            self._source.cancel()
            self._source.join(10)
        with self.machine.lock:
            if self.states.current in (_S.POSTMIGRATE, _S.SHUTDOWN):
                return
            self.machine.pause()
            if ending is Ending.RESET and self._reboot:
                try:
                    self._restart()
                    return
                except GodwitError as error:
                    detail = str(error)
        if ending is Ending.POWER_OFF:
            self._end(_S.SHUTDOWN, events.Reason.GUEST_SHUTDOWN, 0)
            return
        self._say(detail)
        if ending is Ending.RESET:
            self._end(_S.SHUTDOWN, events.Reason.GUEST_RESET, EXIT_RESET)
        elif ending is Ending.TRIPLE_FAULT:
            self._end(_S.GUEST_PANICKED, events.Reason.GUEST_PANIC, EXIT_TRIPLE_FAULT)
        else:
            self._end(_S.INTERNAL_ERROR, events.Reason.HOST_ERROR, EXIT_INTERNAL_ERROR)

    def _restart(self) -> None:
        """The guest asked for a reboot."""
        initial = self.machine.power_on_state()
        self.states.set(_S.PRELAUNCH)
        self.machine.reboot(initial)
        self.machine.resume()
        self.states.set(_S.RUNNING)

    def _end(self, state: RunState, reason: events.Reason, code: int) -> None:
        self.exit_code = code
        self.states.set(state)
        self._emit(*events.shutdown(reason))
        self._loop.call_soon(self._loop.stop)


def _prepare_to_move() -> None:
    """Import the source's side, so that a later move does not begin with reading files."""
    from godwit.migration import source

    del source
