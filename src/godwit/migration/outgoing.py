"""The sending half of a migration: RAM in rounds while the guest runs, the stop, the rest.

One method a phase, one list of phases, one failure path: until the guest was handed over, any
failure lets the guest go on here. Where the guest goes is for :mod:`.source` and :mod:`.snapshot`.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

from godwit.errors import GodwitError, LinkLost, MigrationError, PeerRefused, StateError
from godwit.hw.memory import PAGE
from godwit.spec import saved
from godwit.spec.parameters import ConvergenceParameters, MigrationParameters
from godwit.spec.runstate import RunState, RunStates

from .guest import Guest
from .ram.convergence import GOOD_ENOUGH_MS, Action, Convergence, why_not
from .ram.dirty_log import DirtyLog, split_zeros
from .ram.page_runs import chunks, pages_in, union
from .ram.throttle import Throttle
from .report import Report, Round
from .sink import Sink, StreamSink
from .syncing import Syncing
from .times import TIMES, Times
from .wire import messages
from .wire.compatibility import describe
from .wire.messages import Kind, Run
from .wire.stream import Connection

#: Returns the operator's parameters, which may change during a migration.
Parameters = Callable[[], MigrationParameters]


class Outgoing(ABC):
    """A migration out of this VM, in a thread of its own, where ``on_status`` is called.

    ``checked()`` returns whether all is known of the guest's RAM, or raises GodwitError if that is
    wrong: it is called again and again before anything of the guest leaves.

    Attributes:
        ends_vm: the VM ends by itself once the guest is gone.
    """

    ends_vm = False
    #: The state in which the guest stands still for it.
    _stopped_as = RunState.FINISH_MIGRATE

    def __init__(
        self,
        guest: Guest,
        states: RunStates,
        parameters: Parameters,
        on_status: Callable[[str], None],
        times: Times = TIMES,
        checked: Callable[[], bool] = lambda: True,
    ) -> None:
        self._guest = guest
        self._checked = checked
        self._machine = machine = guest.machine
        self._states = states
        self._parameters = parameters
        self._times = times
        self._on_status = on_status
        self._before = states.current
        self._cancelled = threading.Event()
        #: Why the migration was given up from outside, and whether a person wanted it so.
        self._given_up = "cancelled"
        self._by_person = True
        #: The guest is at its destination, or in its file, whatever else goes wrong.
        self._gone = False
        self._abandoned = threading.Event()
        self._over = threading.Event()
        self._when_over: list[Callable[[], None]] = []
        self._decision = threading.Lock()  # between a cancel and the commit
        self._committed = False
        self._token = os.urandom(16)
        #: Not the token, which is a secret of the two ends: everybody sees the markers.
        self._cookie = b""
        self._log = DirtyLog(machine)
        self._to_send: list[Run] = []
        self._sent_early = 0  # pages of the last round that were sent before the stop
        self._throttle = Throttle(lambda: machine.vcpus)
        self._syncing = Syncing(machine.devices, times)
        #: When the guest goes on here whatever happens, by the migration's clock.
        self._stop_ends = float("inf")
        self._budget_start = times.now()
        self.report = Report(now=times.now, ram_total=machine.memory.size)
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._main, name="migration", daemon=True)

    def start(self) -> None:
        """Start the thread of the migration."""
        self._thread.start()

    @property
    def active(self) -> bool:
        """True while the migration is under way."""
        return not self._over.is_set()

    def cancel(self) -> bool:
        """Give the migration up, or return False when the guest was handed over already."""
        return self.give_up("cancelled", by_person=True)

    def give_up(self, why: str, by_person: bool = False) -> bool:
        """Have the migration end as failed, or as cancelled if a person wants so.

        Returns False when the guest was handed over already.
        """
        with self._decision:
            if self._committed:
                return False
            if not self._cancelled.is_set():
                self._given_up, self._by_person = why, by_person
            self._cancelled.set()
        self._unthrottle()  # at once: the thread may be waiting for the connection
        if self._connection is not None:
            # The destination shall still receive why, if it takes what is being sent.
            self._connection.give_up()
        return True

    def when_over(self, call: Callable[[], None]) -> None:
        """Make a call once the migration is over: in the migration's thread, or here."""
        with self._decision:
            if not self._over.is_set():
                self._when_over.append(call)
                return
        call()

    def _check_given_up(self) -> None:
        """Raise MigrationError if the migration was given up from outside."""
        if self._cancelled.is_set():
            raise MigrationError(self._given_up)

    @property
    def needs_guest(self) -> bool:
        """True while the migration fails if the guest ends."""
        return self.active

    @property
    def completion(self) -> str:
        """The message for the operator once the migration has completed."""
        return "the guest has migrated"

    @property
    def exposed(self) -> bool:
        """True if the destination may have shown the guest to the network."""
        return False

    def abandon(self) -> None:
        """Cancel because the process exits."""
        self._abandoned.set()
        self.cancel()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end, at most ``timeout`` seconds."""
        self._thread.join(timeout)

    # --- phases -----------------------------------------------------------------------------------
    def _await_check(self) -> None:
        """Wait until the guest's RAM is known to be right: damage would leave with new checksums.

        First of all, as the guest runs meanwhile, and neither a log nor a peer waits.
        """
        while not self._checked():
            self._cancelled.wait(self._times.look)
            self._check_given_up()

    @abstractmethod
    def _phases(self) -> tuple[Callable[[], None], ...]:
        """Return the phases in their order, of which the last one hands the guest over."""

    def _main(self) -> None:
        try:
            for phase in self._phases():
                if not self._committed:
                    self._check_given_up()
                phase()
            self._finish("completed")
        except Exception as error:
            self._fail(error)
        else:
            self._post_completion()
        finally:
            self._syncing.end()
            with self._decision:
                self._over.set()  # whatever went wrong, another migration may be tried
            if self._connection is not None:
                with suppress(OSError):  # a file's last error
                    self._connection.close()
            self._end_log()  # unless ended; what goes wrong with that harms nobody any more
            for call in self._when_over:
                call()

    def _post_completion(self) -> None:
        """Do what is left to do for a guest that is gone, and whose operator was notified."""

    def _reason(self, error: Exception) -> Exception:
        """Return why the migration failed, if more is known than the error has."""
        return error

    def _before_return(self) -> None:
        """Prepare for the guest, which is about to go on here."""

    @property
    def _sink(self) -> Sink:
        """The taker of the guest's bytes."""
        return StreamSink(self._peer, self._machine.memory)

    @property
    def _peer(self) -> Connection:
        if self._connection is None:
            raise LinkLost("there is no connection to the destination")
        return self._connection

    def _check_alive(self) -> None:
        """Refuse a dead guest, which would migrate happily.

        Raises:
            StateError: the guest exited.
        """
        if self._machine.exited is not None:
            raise StateError(f"the guest is dead: {self._machine.exited[1]}")

    def _introduce(self) -> None:
        """Send what will come, start the dirty log, and look up which pages exist."""
        self._sink.hello(describe(self._machine, self._token, self._cookie))
        self.report.phase("hello")
        # Logging starts before the first page is read: what changes afterwards is sent again.
        self._log.start()
        self.report.phase("log-started")
        self._to_send = self._machine.memory.populated()
        self.report.phase("pages-found")

    def _precopy(self) -> None:
        """Send RAM while the guest runs, until little enough is left for the stop."""
        self._syncing.start()
        runs = self._to_send
        self._sink.coming(runs)
        judge = Convergence()
        looked = self._times.now()
        while True:
            runs, looked = self._round(runs, looked)
            done = self.report.rounds[-1]
            limit, parameters = self._parameters().downtime_limit, self._convergence
            verdict = judge.judge(done.pages, done.ms, done.dirty, limit, parameters)
            self.report.expected_ms = verdict.expected_ms
            if verdict.action is Action.ABORT:
                reason = why_not(verdict, len(self.report.rounds), done, limit, parameters)
                raise MigrationError(reason)
            if verdict.action is Action.STOP:
                break
            self._throttle.set(verdict.throttle)
            self.report.throttle = self._throttle.percent
        if verdict.expected_ms <= GOOD_ENOUGH_MS:
            # Few enough to be sent at once: only what the guest writes again meanwhile is left for
            # the stop. Another look at the log would take as long as they do.
            self._send_pages(runs)
            self._sent_early, runs = pages_in(runs), []
        self._to_send = runs

    def _round(self, runs: list[Run], looked: float) -> tuple[list[Run], float]:
        """Send these pages while the guest runs, and return the dirty ones then, and the time.

        ``looked`` is when the dirty log was looked at before, by the migration's clock.
        """
        throttle, sent_before = self._throttle.percent, self._sink.sent
        before = self._times.now()
        first = not self.report.rounds
        sent = zeros = 0
        # In chunks: while one is looked through here, the one before is on its way. (A thread that
        # looks at the next one was no quicker where it was measured: both CPUs are busy by then.)
        for chunk in chunks(runs):
            data, zero = split_zeros(self._machine, chunk)
            if zero:
                self._sink.zeros(zero, first)
            self._send_pages(data)
            sent += pages_in(data)
            zeros += pages_in(zero)
        self._sink.end_of_round()
        ms = (self._times.now() - before) * 1000
        left = self._log.take()
        now = self._times.now()
        dirty, carried = pages_in(left), self._sink.sent - sent_before
        done = Round(sent, zeros, ms, carried, dirty, (now - looked) * 1000, throttle)
        self.report.rounds.append(done)
        self.report.remaining = dirty * PAGE
        return left, now

    @property
    def _convergence(self) -> ConvergenceParameters:
        """The operator's choice for a guest that writes faster than the connection takes."""
        return self._parameters().convergence

    def _unthrottle(self) -> None:
        """Remove the throttle from the vCPUs."""
        self._throttle.end()
        self.report.throttle = 0

    def _stop(self) -> None:
        """Stop the guest: vCPUs, then backends."""
        self._status("device")
        self._syncing.end()
        with self._machine.lock:
            self._before = self._states.current  # the operator may have paused it meanwhile
            self._states.set(self._stopped_as)
            # Until now the guest ran, and others were notified.
            self.report.stopped = self._times.now()
            self._stop_ends = self.report.stopped + self._longest_stop()
            if self._connection is not None:
                self._connection.deadline = self._stop_ends
            self._machine.pause(self.report.phase)
        self._unthrottle()
        if self._machine.exited is not None:
            raise StateError(f"the guest died before it could migrate: {self._machine.exited[1]}")

    def _longest_stop(self) -> float:
        """Return for how many seconds the guest may be stopped, whatever the peer does."""
        allowed = max(self._parameters().downtime_limit, self.report.expected_ms or 0.0)
        return self._times.stop + 10 * allowed / 1000

    def _final(self) -> None:
        """Send everything else and the last dirty pages."""
        # The state is saved first: saving it makes KVM and the devices write their last bits of
        # RAM (the paravirtual clock, say), and the log is read after that.
        state = self._guest.save()
        self.report.phase("save")
        # The state goes first: the destination loads it while the last pages are looked up here.
        self._sink.state(saved.encode(state))
        # A page that was dirty before the stop and after it is sent once, as it is now.
        runs = union(self._to_send, self._log.take())
        self.report.phase("dirty-log")
        self._send_pages(runs)
        self._sink.end_of_round()
        self.report.rounds.append(Round(self._sent_early + pages_in(runs), 0, 0.0))
        self.report.remaining = 0
        self.report.phase("send")
        self._syncing.begin_last()  # while the destination loads

    def _release(self) -> None:
        """Give up what one VM alone may have, once the disks are flushed.

        Raises:
            GodwitError: they cannot be, or not for as long as the guest may be stopped, or the
                migration was given up meanwhile.
        """
        self._syncing.await_last(self._check_stop)
        self._machine.devices.release()

    def _check_stop(self) -> None:
        """Raise MigrationError if the guest was stopped for long enough, or all was given up."""
        self._check_given_up()
        if self._times.now() >= self._stop_ends:
            raise MigrationError(
                "the guest's disks were not flushed in the time for the whole of the stop: "
                "their storage hangs, or is slow"
            )

    # --- ends -------------------------------------------------------------------------------------
    def _finish(self, status: str, error: str | None = None) -> None:
        if self._connection is not None:
            self.report.bytes_sent = self._connection.sent
        self.report.error = error
        self.report.ended = self._times.now()
        # For a guest that is gone, later: ending the log keeps a CPU busy (15 ms in the lab) while
        # the guest starts, perhaps on this very host.
        if status != "completed":
            problem = self._end_log()
            self.report.error = self.report.error or problem
        self._over.set()
        self._status(status)

    def _end_log(self) -> str | None:
        """End the dirty log, and return what went wrong with that."""
        try:
            self._log.stop()
        except (GodwitError, OSError) as problem:
            return f"the dirty log cannot be ended: {problem}"
        return None

    def _fail(self, error: Exception) -> None:
        """Let the guest go on here, as before: the one way back.

        The guest comes first: a peer that takes its time for the rest must not hold it.
        """
        self._unthrottle()
        if self._gone:  # nothing that goes wrong afterwards brings the guest back
            self._finish("completed", f"{type(error).__name__}: {error}")
            return
        try:
            self._return()
        except Exception as problem:
            error = MigrationError(f"{error}; on the guest's way back: {problem}")
        if self._connection is not None:
            self._connection.deadline = None
        error = self._reason(error)
        if self._cancelled.is_set() and not self._committed:
            error = MigrationError(self._given_up)
        if not isinstance(error, PeerRefused):
            try:
                self._peer.send(Kind.FAILED, messages.Reason(str(error)[:1000]))
            except GodwitError:
                pass
        if self._cancelled.is_set() and self._by_person:
            self._finish("cancelled")
        else:
            self._finish("failed", str(error) or type(error).__name__)

    @property
    def returned(self) -> bool:
        """True if the guest of a failed migration certainly goes on here."""
        return not self._committed

    def _return(self) -> None:
        with self._machine.lock:
            stopped = self._states.current is self._stopped_as and not self._committed
            if not stopped:
                return
            if self._machine.exited is not None:
                if self._before is RunState.PAUSED:  # its reboot shall not undo the stop
                    self._states.set(self._before)
                return
            try:
                self._before_return()
            finally:  # the guest goes on without its packets, too
                self._resume()

    def _resume(self) -> None:
        """Let the guest do what it did before, or leave a guest that cannot to the operator's cont.

        Running first, state second: whoever is notified of the state finds it true.
        """
        self._syncing.end()
        running = self._before is RunState.RUNNING
        try:
            if running:
                self._machine.resume()
            else:
                self._machine.devices.acquire()
        except BaseException:
            self._machine.pause()
            self._states.set(RunState.PAUSED if running else self._before)
            raise
        self._states.set(self._before)

    # --- helpers ----------------------------------------------------------------------------------
    def _status(self, status: str) -> None:
        self.report.status = status
        self._on_status(status)

    def _send_pages(self, runs: list[Run]) -> None:
        limit = self._parameters().max_bandwidth
        # A slow connection gets small messages: the peer takes long silence for a lost one.
        most = max(1, min(messages.MAX_PAGES, limit // 4 // PAGE)) if limit else messages.MAX_PAGES
        for chunk in chunks(runs, most, messages.MAX_RUNS):
            self._check_given_up()
            size = self._sink.pages(chunk)
            self.report.bytes_sent = self._sink.sent
            self._pace(size)

    def _pace(self, size: int) -> None:
        """Keep to the bandwidth limit, except while the guest stands still."""
        limit = self._parameters().max_bandwidth
        if not limit or self.report.stopped is not None:
            return
        now = self._times.now()
        # Time not used before is not saved up beyond 50 ms.
        self._budget_start = max(self._budget_start, now - 0.05) + size / limit
        if self._budget_start > now:
            self._cancelled.wait(self._budget_start - now)
