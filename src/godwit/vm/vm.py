"""One VM under its operator's hand: run states, machine, migrations, announcement, QMP together.

:class:`Vmm` implements :class:`godwit.qmp.controller.Controller`. The rule for every start: the
machine runs first and the state changes second, so that a listener of the state (the announcer
above all) acts after the VM has started, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from godwit.announce.announcer import Announcer
from godwit.announce.monitors import Monitors
from godwit.announce.policy import parse_policy
from godwit.announce.uplink import Uplink
from godwit.errors import ConfigError, GodwitError, KvmError
from godwit.host.loop import Loop
from godwit.hw.capabilities import Counts
from godwit.hw.console import Console
from godwit.hw.nic.nic import Nic, RxFilterInfo
from godwit.machine.board import Board
from godwit.machine.machine import Machine
from godwit.machine.vcpu import StopReason
from godwit.spec import events
from godwit.spec.config import NicConfig
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters, MigrationParameters
from godwit.spec.restore import FULL, Restore
from godwit.spec.runstate import RunState, RunStates

from .device_reports import DeviceReports
from .limited_reports import LimitedReports
from .migrations import Migrations

if TYPE_CHECKING:
    from godwit.migration.outgoing import Outgoing
    from godwit.migration.times import Times
    from godwit.migration.wire.address import Credentials
    from godwit.qmp.controller import DeviceView
    from godwit.qmp.server import Server

_S = RunState
#: Between two tries to stop a VM for a disk's error, seconds.
_AGAIN_S = 1.0
#: States of a VM whose guest is gone.
_FINAL = (_S.POSTMIGRATE, _S.SHUTDOWN, _S.GUEST_PANICKED, _S.INTERNAL_ERROR)

#: Exit codes of ``godwit run``, beside 0 (powered off, quit, or migrated) and 1 (an error).
EXIT_RESET = 3
EXIT_TRIPLE_FAULT = 4
EXIT_INTERNAL_ERROR = 5


class Vmm:
    """A VM from its board, which the VM closes, to its end.

    ``log(text)`` receives what an operator at the terminal should know.

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
        on_panic: str = "exit",
        log: Callable[[str], None] = lambda text: None,
        times: Times | None = None,
        credentials: Credentials | None = None,
        restore: Restore = FULL,
    ) -> None:
        self._loop = loop
        self._autostart = autostart
        self._reboot = reboot
        self._on_panic = on_panic
        self._log = log
        self.states = RunStates()
        self.exit_code = 0
        self._server: Server | None = None
        self._monitors: Monitors | None = None
        self._filter_reported: set[str] = set()
        self._guest_errors = LimitedReports(loop.now, self._guest_error)
        self._panics = LimitedReports(loop.now, self._panic_reported)
        self.machine = Machine(board, loop, console, self._vcpu_exited, self._guest_errors.add)
        self.uplinks = [Uplink(nic, loop) for nic in self.machine.nics]
        self.migrations = Migrations(
            self.machine,
            self.uplinks,
            self.states,
            loop.now,
            self._migration_status,
            self._incoming_failed,
            autostart=autostart,
            times=times,
            credentials=credentials,
            restore=restore,
            on_damaged=self._damaged,
            on_own=self._own_address,
        )
        try:
            self.machine.on_panic = self._panicked
            self._set_policies(board)
            self._monitors = Monitors(self.uplinks, loop, log)
            self.announcer = Announcer(
                self.uplinks, loop, self._emit, lambda: self.parameters, self._monitors.verifier
            )
            self._monitors.on_seen = self.announcer.seen
            self._monitors.on_answer = self.announcer.answered
            self._monitors.on_ready = self.announcer.port_ready
            self._monitors.on_anew = self._tap_anew
            # Before the server: the frames leave before the events are sent.
            self.states.listen(self.announcer.run_state_changed)
            if qmp is not None:
                from godwit.qmp.server import Server

                self._server = Server(loop, qmp, self._execute, self._loop_error)
                self.states.listen(self._server.run_state_changed)
            self.device_reports = DeviceReports(
                self.machine.devices, loop, self._emit, log, self._stop_for_io_error
            )
            for nic in self.machine.nics:
                nic.on_ack = self._acked(nic.id)
                nic.on_filter = self._filter_changed(nic.id)
                nic.rx_backlog.on_lost = self._tap_lost(nic)
                for problem in nic.problems():
                    log(f"{nic.id}: {problem}")
        except BaseException:
            self.close()
            raise

    def _set_policies(self, board: Board) -> None:
        allowed = {
            config.id: config.announce_allow
            for config in board.config.devices
            if isinstance(config, NicConfig) and config.announce_allow is not None
        }
        for uplink in self.uplinks:
            if uplink.nic.id in allowed:
                uplink.policy = parse_policy(allowed[uplink.nic.id])

    # --- beginnings -------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the loaded kernel, with autostart.

        Raises:
            HostError: another VM has what one alone may have.
        """
        self.machine.devices.acquire()
        if self._autostart:
            self.cont()
        # The guest is on its way; what only its operator's commands need is imported meanwhile.
        self._loop.call_soon(_import_commands)

    def await_guest(
        self, uri: str | None, insecure: bool, opened: Callable[[], None] = lambda: None
    ) -> None:
        """Become a destination, with ``uri`` None for a migrate-incoming to come.

        ``opened`` is called once the address or file is open, before any source is served.
        """
        self.states.set(_S.INMIGRATE)
        if uri is None:
            opened()
            self.migrations.expect_guest()
        else:
            self.migrations.await_guest(uri, insecure, opened)

    def close(self) -> None:
        """End everything and give everything back."""
        self.migrations.close()
        if self._monitors is not None:
            self._monitors.close()
        self.machine.close()
        if self._server is not None:
            self._server.close()

    # --- Controller -------------------------------------------------------------------------------
    @property
    def parameters(self) -> MigrationParameters:
        """The operator's parameters, replaced as a whole."""
        return self.migrations.parameters

    @parameters.setter
    def parameters(self, new: MigrationParameters) -> None:
        self.migrations.parameters = new

    def announce_info(self) -> list[dict[str, object]]:
        """Return the progress of each NIC's last announcement."""
        return self.announcer.info()

    def rx_filters(self, name: str | None) -> list[tuple[str, RxFilterInfo]]:
        """Return the receive filter of each NIC, or of the one with that name.

        Raises:
            ConfigError: no NIC has that name.
        """
        nics = [nic for nic in self.machine.nics if name in (None, nic.id)]
        if name is not None and not nics:
            known = ", ".join(nic.id for nic in self.machine.nics) or "none"
            raise ConfigError(f"there is no NIC '{name}'; this VM has: {known}")
        self._filter_reported -= {nic.id for nic in nics}
        return [(nic.id, nic.rx_filter()) for nic in nics]

    def devices(self) -> list[DeviceView]:
        """Return id, kind, counters and properties of each device."""
        devices = self.machine.devices
        parts = ((device, devices.part(device, Counts)) for device in devices)
        return [
            (
                device.id,
                device.kind,
                part.counters() if part is not None else {},
                device.properties(),
            )
            for device, part in parts
        ]

    def stop(self) -> None:
        """Pause the guest, which has to be running."""
        with self.machine.lock:
            self.states.require(_S.RUNNING)
            self.machine.pause()
            self.states.set(_S.PAUSED)

    def cont(self) -> None:
        """Start or resume the guest."""
        with self.machine.lock:
            self.states.require(_S.PRELAUNCH, _S.PRELAUNCH_MIGRATE, _S.PAUSED, _S.IO_ERROR)
            if not self.migrations.switch_over():
                self.machine.drain_taps()
            self.machine.resume()
            self.states.set(_S.RUNNING)

    def powerdown(self) -> None:
        """Press the guest's power button."""
        self._emit(*Event.POWERDOWN.of())
        self.machine.pm1.press()

    def vcpu_threads(self) -> list[int]:
        """Return the thread's id of each vCPU."""
        return [thread.thread_id for thread in self.machine.vcpus]

    def ram_size(self) -> int:
        """Return the size of the guest's RAM in bytes."""
        return self.machine.memory.size

    def quit(self) -> None:
        """End the VM soon, with the exit code 0."""
        self._emit(*events.shutdown(events.Reason.HOST_QUIT))
        self._loop.call_soon(self._loop.stop)

    def end_by_signal(self) -> None:
        """End the VM soon, as a signal came or the operator left the terminal."""
        self._emit(*events.shutdown(events.Reason.HOST_SIGNAL))
        self._loop.call_soon(self._loop.stop)

    def migrate(self, uri: str, insecure: bool) -> None:
        """Start a migration of the guest to ``uri``, which may be a file."""
        self.migrations.migrate(uri, insecure)

    def save(self, path: str, keep_running: bool, compress: str) -> None:
        """Start a save of the guest into the file at ``path``."""
        self.migrations.save(path, keep_running, compress)

    def migrate_incoming(self, uri: str, insecure: bool) -> None:
        """Wait for a guest at ``uri``, or load one from a file."""
        self.states.require(_S.INMIGRATE)
        self.migrations.await_guest(uri, insecure)

    def migration_info(self) -> dict[str, object]:
        """Return the present or last migration, or the one by which the guest came."""
        return self.migrations.info(self.announce_info)

    def migrate_cancel(self) -> None:
        """Give up the present migration."""
        self.migrations.cancel()

    def announce_self(
        self, parameters: AnnounceParameters, interfaces: Sequence[str] | None, id: str | None
    ) -> None:
        """Announce the guest's NICs now."""
        self.announcer.announce_self(parameters, interfaces, id)

    # --- what happens -----------------------------------------------------------------------------
    def _execute(self, name: str, arguments: Mapping[str, object]) -> object:
        from godwit.qmp import commands

        return commands.execute(self, name, arguments)

    def _emit(self, event: Event, data: dict[str, object]) -> None:
        if self._server is not None:
            self._server.emit(event, data)

    def _loop_error(self, error: BaseException) -> None:
        self._log(f"internal error: {type(error).__name__}: {error}")

    def _acked(self, nic: str) -> Callable[[], None]:
        return lambda: self.announcer.acked(nic)

    def _filter_changed(self, nic: str) -> Callable[[], None]:
        def report() -> None:
            # Once until somebody asks, as in QEMU (net/net.c): a guest may change it in a loop.
            if nic not in self._filter_reported:
                self._filter_reported.add(nic)
                self._emit(*events.rx_filter_changed(nic))

        return report

    def _tap_lost(self, nic: Nic) -> Callable[[], None]:
        def report() -> None:
            self._emit(*Event.NIC_TAP_LOST.of(nic=nic.id, tap=nic.tap))
            self._log(
                f"{nic.id}: tap '{nic.tap}' is gone; the guest runs on without that network "
                "until it migrates to a process with another tap"
            )

        return lambda: self._loop.call_soon(report)  # perhaps under the NIC's lock

    def _own_address(self, nic: str, mac: bytes) -> None:
        def opened() -> None:
            self._emit(*Event.NIC_OPENED.of(nic=nic, mac=mac.hex(":")))
            self._log(f"{nic}: the copied guest uses {mac.hex(':')}, an address of its own")
            self.announcer.opened(nic)

        self._loop.call_soon(opened)  # under the NIC's lock

    def _tap_anew(self, name: str) -> None:
        tap = next(nic.tap for nic in self.machine.nics if nic.id == name)
        self._emit(*Event.NIC_TAP_ANEW.of(nic=name, tap=tap))
        self._log(
            f"{name}: there is a new interface '{tap}', and the guest's NIC is not attached to it; "
            "migrate the guest to a process that is"
        )

    def _guest_error(self, device: str, message: str, suppressed: int) -> None:
        """Report that a guest broke a device's rules: the device stops, the VM lives."""
        self._emit(*Event.GUEST_ERROR.of(device=device, message=message, suppressed=suppressed))
        more = f"; {suppressed} more since the last report" if suppressed else ""
        self._log(
            f"{device}: the guest broke the device's rules ({message}){more}; "
            "its driver must reset it"
        )

    def _stop_for_io_error(self) -> None:
        with self.machine.lock:
            if self.states.current is not _S.RUNNING:
                return
            try:
                self.machine.pause()
            except KvmError:  # another request hangs: what failed is kept, and the guest waits
                self._loop.call_later(_AGAIN_S, self._stop_for_io_error)
                return
            self.states.set(_S.IO_ERROR)

    def _migration_status(self, outgoing: Outgoing, status: str) -> None:
        """Report a migration's status, in the migration's thread."""
        if status in ("failed", "cancelled") and outgoing.exposed:
            self.announcer.returned()
        self._emit(*events.migration(status))
        if status == "completed":
            self._log(outgoing.completion)
            if outgoing.ends_vm:
                self._loop.call_soon(lambda: self._end(_S.SHUTDOWN, events.Reason.HOST_QUIT, 0))
        elif status == "failed":
            where = "stays here" if outgoing.returned else "may run at the destination"
            self._log(f"the guest {where}; the migration failed: {outgoing.report.error}")

    def _incoming_failed(self, error: GodwitError) -> None:
        """End the VM without a guest, in the incoming migration's thread."""

        def end() -> None:
            self._log(f"no guest arrived: {error}")
            self._end(_S.SHUTDOWN, events.Reason.HOST_ERROR, 1)

        self._emit(*events.migration("failed"))
        self._loop.call_soon(end)

    def _damaged(self, error: GodwitError) -> None:
        """End the VM because its guest's RAM is wrong, in the thread that checks it."""

        def end() -> None:
            if self.states.current in _FINAL:
                return
            if self.migrations.fail_for_exit(str(error), lambda: self._damaged(error)):
                return
            self._log(f"the guest was stopped: {error}")
            # One whose device is busy for long ends with the process.
            with suppress(KvmError), self.machine.lock:
                self.machine.pause()
            self._end(_S.INTERNAL_ERROR, events.Reason.HOST_ERROR, EXIT_INTERNAL_ERROR)

        self._loop.call_soon(end)

    def _vcpu_exited(self, reason: StopReason, detail: str) -> None:
        """Handle the guest's exit in the loop, in a vCPU's thread."""
        self._loop.call_soon(lambda: self._guest_exited(reason, detail))

    def _panicked(self, crash_loaded: bool) -> None:
        """Handle the guest's report of a panic in the loop, in a vCPU's thread."""
        self._panics.add("panic0", "crash loaded" if crash_loaded else "panicked")

    def _panic_reported(self, source: str, message: str, suppressed: int) -> None:
        self._loop.call_soon(lambda: self._act_on_panic(message == "crash loaded"))

    def _act_on_panic(self, crash_loaded: bool) -> None:
        action = "run" if crash_loaded else self._on_panic
        if self.states.current in _FINAL:
            return
        if action != "run" and self.migrations.fail_for_exit(
            "the guest panicked", lambda: self._panicked(crash_loaded)
        ):
            return
        if crash_loaded:
            self._emit(*Event.GUEST_CRASHLOADED.of(action=action))
        else:
            self._emit(*Event.GUEST_PANICKED.of(action=action))
        self._log(f"the guest reported a panic; what is done: {action}")
        if action == "run":
            return
        with self.machine.lock:
            self.machine.pause()
            if action == "reboot":
                try:
                    self._restart()
                    return
                except GodwitError as error:
                    self._log(str(error))
            if action == "pause":
                self.states.set(_S.GUEST_PANICKED)
                return
        self._end(_S.GUEST_PANICKED, events.Reason.GUEST_PANIC, EXIT_TRIPLE_FAULT)

    def _guest_exited(self, reason: StopReason, detail: str) -> None:
        # A guest that exited cannot migrate. Nothing waits here for the migration's end.
        if self.migrations.fail_for_exit(detail, lambda: self._vcpu_exited(reason, detail)):
            return
        with self.machine.lock:
            # An exit that was under way behind another: the guest is gone, or rebooted already.
            if self.states.current in _FINAL or self.machine.exited is None:
                return
            self.machine.pause()
            if reason is StopReason.RESET and self._reboot:
                try:
                    self._restart()
                    return
                except GodwitError as error:
                    detail = str(error)
        if reason is StopReason.POWER_OFF:
            self._end(_S.SHUTDOWN, events.Reason.GUEST_SHUTDOWN, 0)
            return
        self._log(detail)
        if reason is StopReason.RESET:
            self._end(_S.SHUTDOWN, events.Reason.GUEST_RESET, EXIT_RESET)
        elif reason is StopReason.TRIPLE_FAULT:
            self._end(_S.GUEST_PANICKED, events.Reason.GUEST_PANIC, EXIT_TRIPLE_FAULT)
        else:
            self._end(_S.INTERNAL_ERROR, events.Reason.HOST_ERROR, EXIT_INTERNAL_ERROR)

    def _restart(self) -> None:
        """Reboot the guest at its own request, and leave a guest the operator paused paused."""
        initial = self.machine.power_on_state()
        if self.states.current is _S.PAUSED:
            self.machine.reboot(initial)
            self._emit(*events.guest_reset())
            return
        self.states.set(_S.PRELAUNCH)
        self.machine.reboot(initial)
        self.machine.resume()
        self.states.set(_S.RUNNING)

    def _end(self, state: RunState, reason: events.Reason, code: int) -> None:
        self.exit_code = code
        self.states.set(state)
        self._emit(*events.shutdown(reason))
        self._loop.call_soon(self._loop.stop)


def _import_commands() -> None:
    """Import commands and the source's side, so that neither begins with reading files."""
    from godwit.migration import guest, source
    from godwit.qmp import commands

    del commands, guest, source
