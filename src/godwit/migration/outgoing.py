"""A guest's way out of this VM: RAM in passes while it runs, the stop, the rest.

One method a phase, one list of phases, one failure path: until the guest was handed over, any
failure lets it go on here. Where it goes is for :mod:`.source` and :mod:`.snapshot` to say.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from godwit.errors import GodwitError, LinkLost, MigrationError, PeerRefused, StateError
from godwit.hw.memory import PAGE
from godwit.machine.machine import Machine
from godwit.migration.ram.convergence import GOOD_ENOUGH_MS, Action, Convergence, why_not
from godwit.migration.ram.page_runs import pages_in, portions, union
from godwit.migration.ram.throttle import Throttle
from godwit.migration.wire.compatibility import describe
from godwit.migration.wire.messages import Kind, Run
from godwit.migration.wire.stream import Line
from godwit.spec.parameters import ConvergenceParameters, MigrationParameters
from godwit.spec.runstate import RunState, RunStates

from .ram import dirty_log as ram
from .report import Report, Round
from .wire import messages as codec

#: Returns the operator's parameters of now: they may change while a guest is on its way.
Limits = Callable[[], MigrationParameters]


class Outgoing(ABC):
    """Takes the guest out of ``machine`` in a thread of its own; ``on_status`` is called there."""

    def __init__(
        self,
        machine: Machine,
        states: RunStates,
        limits: Limits,
        on_status: Callable[[str], None],
    ) -> None:
        self._machine = machine
        self._states = states
        self._limits = limits
        self._on_status = on_status
        self._before = states.current
        self._cancelled = threading.Event()
        self._abandoned = threading.Event()
        self._over = threading.Event()
        self._decision = threading.Lock()  # between a cancel and the commit
        self._committed = False
        self._token = os.urandom(16)
        #: Not the token, which is a secret of the two ends: everybody sees the marks.
        self._mark = b""
        self._log = ram.DirtyLog(machine)
        self._left: list[Run] = []
        self._ahead = 0  # pages of the last round that were sent before the stop
        self._throttle = Throttle(lambda: machine.vcpus)
        self._budget_start = time.monotonic()
        self.report = Report(ram_total=machine.memory.size)
        self._line: Line | None = None
        self._thread = threading.Thread(target=self._main, name="migration", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether the move is still under way."""
        return not self._over.is_set()

    def cancel(self) -> bool:
        """Give the move up; False when it is too late, because the guest was handed over."""
        with self._decision:
            if self._committed:
                return False
            self._cancelled.set()
        self._unthrottle()  # at once: the thread may be waiting for the line
        if self._line is not None:
            # Only what waits for an answer is woken: the destination shall still be told why.
            self._line.stop_receiving()
        return True

    @property
    def farewell(self) -> str:
        """What became of the guest, for its operator."""
        return "the guest has moved away"

    @property
    def exposed(self) -> bool:
        """Whether somebody else may have shown the guest to the network."""
        return False

    def abandon(self) -> None:
        """The process ends."""
        self._abandoned.set()
        self.cancel()

    def join(self, timeout: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(timeout)

    # --- phases -----------------------------------------------------------------------------------
    @abstractmethod
    def _phases(self) -> tuple[Callable[[], None], ...]:
        """The phases in their order; the last one hands the guest over."""

    def _main(self) -> None:
        try:
            for phase in self._phases():
                if self._cancelled.is_set() and not self._committed:
                    raise MigrationError("cancelled")
                phase()
            self._finish("completed")
        except Exception as error:
            self._fail(error)
        else:
            self._linger()
        finally:
            self._over.set()  # whatever went wrong, another move may be tried
            if self._line is not None:
                self._line.close()
            self._end_log()  # if it has not ended; what is wrong with it harms nobody any more

    def _linger(self) -> None:  # noqa: B027 - most ways out need none
        """The guest is gone, and its operator knows: what is left to do for it."""

    def _reason(self, error: Exception) -> Exception:
        """Why the move failed, if more is known than its error says."""
        return error

    def _before_return(self) -> None:  # noqa: B027
        """The guest is about to go on here."""

    @property
    def _channel(self) -> Line:
        if self._line is None:
            raise LinkLost("there is no line to the destination")
        return self._line

    def _check_alive(self) -> None:
        """A dead guest migrates happily, so it is asked first. Raises StateError."""
        if self._machine.ended is not None:
            raise StateError(f"the guest is dead: {self._machine.ended[1]}")

    def _introduce(self) -> None:
        """Say what will come, and what of it exists."""
        self._channel.send(Kind.HELLO, describe(self._machine, self._token, self._mark))
        self.report.mark("hello")
        # Logging starts before the first page is read: what changes afterwards is sent again.
        self._log.start()
        self.report.mark("log-started")
        self._left = self._log.populated()
        self.report.mark("pages-found")

    def _precopy(self) -> None:
        """Send RAM while the guest runs, until little enough is left for the stop."""
        runs = self._left
        for part in _tables(runs):
            self._channel.send_parts([codec.frame(Kind.TOUCH, codec.encode_runs(part))])
        judge = Convergence()
        looked = time.monotonic()
        while True:
            runs, looked = self._round(runs, looked)
            done = self.report.rounds[-1]
            limit, parameters = self._limits().downtime_limit, self._convergence
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
            self._ahead, runs = pages_in(runs), []
        self._left = runs

    def _round(self, runs: list[Run], looked: float) -> tuple[list[Run], float]:
        """Send these pages while the guest runs; which are dirty by then, and when that was seen.

        ``looked`` is when the dirty log was looked at before, time.monotonic().
        """
        throttle, sent_before = self._throttle.percent, self._channel.sent
        before = time.monotonic()
        first = not self.report.rounds
        sent = zeros = 0
        # In portions: while one is looked through here, the one before is on its way. (A thread
        # that looks ahead was no quicker where it was measured: both CPUs are busy by then.)
        for portion in portions(runs):
            data, zero = ram.split_zeros(self._machine, portion)
            if zero and not first:  # at first, the destination's RAM is zeros anyway
                self._channel.send_parts([codec.frame(Kind.ZERO, codec.encode_runs(zero))])
            self._send_pages(data)
            sent += pages_in(data)
            zeros += pages_in(zero)
        self._channel.send(Kind.ROUND)
        ms = (time.monotonic() - before) * 1000
        left = self._log.take()
        now = time.monotonic()
        dirty, carried = pages_in(left), self._channel.sent - sent_before
        done = Round(sent, zeros, ms, carried, dirty, (now - looked) * 1000, throttle)
        self.report.rounds.append(done)
        self.report.remaining = dirty * PAGE
        return left, now

    @property
    def _convergence(self) -> ConvergenceParameters:
        """What to do about a guest that writes faster than the line takes."""
        return self._limits().convergence

    def _unthrottle(self) -> None:
        """The guest runs as it likes, or not at all; from now on."""
        self._throttle.end()
        self.report.throttle = 0

    def _stop(self) -> None:
        """Stop the guest: vCPUs, then backends."""
        self._status("device")
        with self._machine.lock:
            self._before = self._states.current  # the operator may have paused it meanwhile
            self._states.set(RunState.FINISH_MIGRATE)
            self.report.stopped = time.monotonic()  # until now it ran, and others were told
            self._machine.pause(self.report.mark)
        self._unthrottle()
        if self._machine.ended is not None:
            raise StateError(f"the guest died before it could move: {self._machine.ended[1]}")

    def _final(self) -> None:
        """Send everything else and the last dirty pages."""
        # The state is saved first: saving it makes KVM and the devices write their last bits of
        # RAM (the paravirtual clock, say), and the log is read after that.
        state = self._machine.save()
        self.report.mark("save")
        # It goes first, so that the destination loads it while the last pages are looked up here.
        payload = codec.encode(state)
        self._channel.send_parts([codec.header(Kind.STATE, len(payload)), payload])
        # A page that was dirty before the stop and after it is sent once, as it is now.
        runs = union(self._left, self._log.take())
        self.report.mark("dirty-log")
        self._send_pages(runs)
        self._channel.send(Kind.ROUND)
        self.report.rounds.append(Round(self._ahead + pages_in(runs), 0, 0.0))
        self.report.remaining = 0
        self.report.mark("send")

    # --- ends -------------------------------------------------------------------------------------
    def _finish(self, status: str, error: str | None = None) -> None:
        if self._line is not None:
            self.report.bytes_sent = self._line.sent
        self.report.error = error
        self.report.ended = time.monotonic()
        # For a guest that is gone, later: to end the log keeps a CPU busy (15 ms in the lab) while
        # the guest starts, perhaps on this very host.
        if status != "completed":
            problem = self._end_log()
            self.report.error = self.report.error or problem
        self._over.set()
        self._status(status)

    def _end_log(self) -> str | None:
        """Log no more; what went wrong with that."""
        try:
            self._log.stop()
        except (GodwitError, OSError) as problem:
            return f"the dirty log cannot be ended: {problem}"
        return None

    def _fail(self, error: Exception) -> None:
        """The one way back: the guest goes on here, as it was."""
        error = self._reason(error)
        self._unthrottle()
        if not isinstance(error, PeerRefused):
            try:
                reason = "cancelled" if self._cancelled.is_set() else str(error)
                self._channel.send(Kind.FAILED, codec.Text(reason[:4000]))
            except GodwitError:
                pass
        with self._machine.lock:
            if self._states.current is RunState.FINISH_MIGRATE and not self._committed:
                ended = self._machine.ended
                if ended is None:
                    # Running first, state second: who hears of the state finds it true.
                    self._before_return()
                    if self._before is RunState.RUNNING:
                        self._machine.resume()
                    self._states.set(self._before)
        if self._cancelled.is_set():
            self._finish("cancelled")
        else:
            self._finish("failed", str(error) or type(error).__name__)

    # --- helpers ----------------------------------------------------------------------------------
    def _status(self, status: str) -> None:
        self.report.status = status
        self._on_status(status)

    def _send_pages(self, runs: list[Run]) -> None:
        limit = self._limits().max_bandwidth
        # A slow line gets small frames: the peer takes long silence for a lost line.
        most = max(1, min(codec.MAX_PAGES, limit // 4 // PAGE)) if limit else codec.MAX_PAGES
        for batch in codec.batches(runs, most):
            if self._cancelled.is_set():
                raise MigrationError("cancelled")
            table = codec.encode_runs(batch)
            size = len(table) + pages_in(batch) * PAGE
            parts: list[bytes | memoryview] = [codec.header(Kind.RAM, size) + table]
            parts += self._machine.memory.views(batch)
            self._channel.send_parts(parts)
            self.report.bytes_sent = self._channel.sent
            self._pace(size)

    def _pace(self, size: int) -> None:
        """Keep to the bandwidth limit, except in the stop, where it would only hurt."""
        limit = self._limits().max_bandwidth
        if not limit or self.report.stopped is not None:
            return
        now = time.monotonic()
        # Time not used before is not saved up beyond 50 ms.
        self._budget_start = max(self._budget_start, now - 0.05) + size / limit
        if self._budget_start > now:
            self._cancelled.wait(self._budget_start - now)


def _tables(runs: list[Run]) -> list[list[Run]]:
    return [runs[i : i + 4096] for i in range(0, len(runs), 4096)]
