"""The source's side of a move: what it says to a destination, and how it hands the guest over.

Until COMMIT is sent, any failure lets the guest go on here. Once it is sent, the destination may
have the guest, so the source asks until it knows (see :meth:`Source._resolve`): exactly one side
runs whatever dies when. docs/decisions/0002-commit.md has the argument.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from godwit.errors import GodwitError, LinkLost, MigrationError, PeerRefused
from godwit.machine.machine import Machine
from godwit.migration.packets.source import Forwarder
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SILENCE, Address
from godwit.spec.runstate import RunState, RunStates

from .outgoing import Limits, Outgoing
from .realtime import LONGEST_S, Urgency
from .wire import messages as codec

# What the destination answers, before it matters how long that takes.
for _answer in (codec.Welcome, codec.Drawn, codec.Started):
    codec.prepare(_answer)
#: Between two attempts to ask the destination what became of the guest, seconds.
_ASK_AGAIN = 0.5
#: For what a destination said before it hung up, seconds: it is here, or was never sent.
_LAST_WORD_S = 0.1
#: For all that it said, s: it may have no end of words.
_LAST_WORDS_S = 1.0
#: Between two looks at whether the process ends, seconds.
_SLICE_S = 0.05


class Source(Outgoing):
    """Moves ``machine`` to ``address``.

    ``arriving()`` says whether frames of the host that it came from are still awaited here: the
    guest does not stop before they are all there, or they would be sent on after younger ones.
    """

    def __init__(
        self,
        machine: Machine,
        states: RunStates,
        address: Address,
        limits: Limits,
        on_status: Callable[[str], None],
        arriving: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(machine, states, limits, on_status)
        self._arriving = arriving
        self._address = address
        self._exposed = False
        self._direct = False
        self._hands_over = False
        self._forwarder: Forwarder | None = None
        self._urgency = Urgency()

    @property
    def exposed(self) -> bool:
        """Whether the destination may have shown the guest to the network: COMMIT was sent."""
        return self._exposed

    def _phases(self) -> tuple[Callable[[], None], ...]:
        return (
            self._arrive,
            self._hello,
            self._precopy,
            self._stop,
            self._final,
            self._ready,
            self._commit,
        )

    def _hello(self) -> None:
        """Say what will come; the destination refuses what it could not run."""
        self._check_alive()
        self._line = self._socket = channel = self._address.connect()
        self.report.mark("connected")
        if self._limits().handover and self._machine.nics:
            self._mark = os.urandom(16)
        self._introduce()  # the log starts while the destination compares
        welcome = channel.expect_struct(Kind.WELCOME, codec.Welcome)
        self._direct = channel.is_direct(welcome)
        self._hands_over = bool(self._mark) and welcome.handover
        self.report.mark("welcomed")
        self._status("active")

    def _arrive(self) -> None:
        """Wait for the end of its last move; that takes seconds at the most (see arrival.Hold).

        First of all: no log is on meanwhile, and what the guest writes is still to be judged.
        """
        while self._arriving() and not self._cancelled.wait(_SLICE_S):
            pass

    def _stop(self) -> None:
        # A stop that is to be long (on-no-convergence) is no matter of milliseconds.
        if (self.report.expected_ms or 0.0) <= min(self._limits().downtime_limit, LONGEST_S * 1000):
            self._urgency.begin()
        super()._stop()

    def _ready(self) -> None:
        """Wait until all is loaded; what came for the guest since the stop is sent meanwhile."""
        if self._hands_over:
            self._forwarder = Forwarder(self._machine, self._socket, self._mark)
            until = time.monotonic() + SILENCE
            while not self._forwarder.serve(min(until, time.monotonic() + LONGEST_S)):
                self._urgency.look()
                if time.monotonic() >= until:
                    raise LinkLost(f"the peer was silent for {SILENCE:.0f} s")
        self._channel.expect(Kind.READY)
        self.report.mark("ready")

    def _commit(self) -> None:
        """Hand the guest over. From here on it may not run here until we know."""
        with self._decision:
            if self._cancelled.is_set():
                raise MigrationError("cancelled")
            self._committed = self._exposed = True
        handover = codec.Handover(self._token, self._before is RunState.RUNNING)
        try:
            self._channel.send(Kind.COMMIT, handover)
            self._urgency.end()  # the rest is the destination's
            started = self._await_started()
        except GodwitError as error:
            self._urgency.end()
            started = self._resolve(error, handover)
        self.report.mark("started")
        self._started(started)
        try:
            self._channel.send(Kind.HEARD)
        except LinkLost:
            pass  # then the destination goes on listening, which harms nobody

    def _await_started(self) -> codec.Started:
        """Send frames after the guest until the destination says that it is there."""
        forwarder = self._forwarder
        until = time.monotonic() + SILENCE
        while forwarder is not None and not forwarder.over:
            if forwarder.serve(until):
                answer = self._heed(forwarder)
                if answer is not None:
                    return answer
            elif time.monotonic() >= until:
                raise LinkLost(f"the peer was silent for {SILENCE:.0f} s")
        return self._channel.expect_struct(Kind.STARTED, codec.Started)

    def _heed(self, forwarder: Forwarder) -> codec.Started | None:
        """The destination's next word."""
        kind, payload = self._channel.expect_one(Kind.STARTED, Kind.DRAWN)
        if kind is Kind.STARTED:
            return codec.decode(payload, codec.Started)
        forwarder.drawn(codec.decode(payload, codec.Drawn).marks)
        return None

    def _linger(self) -> None:
        """The guest may be started later, and frames may take a longer way. One that is to end
        still sends what is known to be on its way."""
        forwarder = self._forwarder
        if forwarder is None:
            return
        try:
            while self._line is self._socket and not forwarder.over:
                if self._abandoned.is_set() and not forwarder.expecting:
                    break
                if forwarder.serve(time.monotonic() + _SLICE_S):
                    self._heed(forwarder)
                self.report.handover = forwarder.info()
        except (GodwitError, OSError):
            pass  # the destination hung up, or a tap is gone
        finally:
            self.report.handover = {**forwarder.info(), "over": True}

    def _reason(self, error: Exception) -> Exception:
        """A destination that fails says why and hangs up; the line may break before it is read."""
        self._urgency.end()
        if isinstance(error, LinkLost) and self._line is not None and not self._cancelled.is_set():
            until = time.monotonic() + _LAST_WORDS_S
            try:
                self._socket.set_timeout(_LAST_WORD_S)
                while time.monotonic() < until:
                    self._socket.expect_one(*Kind)
            except PeerRefused as refusal:
                return refusal
            except GodwitError:
                pass  # it said nothing
        return error

    def _before_return(self) -> None:
        """What was sent after the guest it gets here; switches are told where it is."""
        if self._forwarder is not None:
            self._forwarder.give_back()
        if self._exposed:
            for station in self._machine.stations:
                station.draw_back()

    def _started(self, started: codec.Started) -> None:
        if self._forwarder is not None:
            self._forwarder.settled()
            self.report.handover = self._forwarder.info()
        # Until READY came by this clock, from READY to the running vCPUs by the destination's: the
        # latency of READY is counted twice, and that of STARTED, when the guest runs, not at all.
        phases = started.phases
        self.report.downtime_ms = self.report.stop_phases["ready"] + max(
            0.0, phases.get("vcpus-started", 0.0) - phases.get("loaded", 0.0)
        )
        self.report.destination_phases = started.phases
        self.report.destination_runstates = started.runstates
        self._states.set(RunState.POSTMIGRATE)

    def _resolve(self, cause: GodwitError, handover: codec.Handover) -> codec.Started:
        """The line was lost with COMMIT on its way: ask until the answer is certain.

        A destination that has the guest, or could still take it, listens until its source heard of
        it; so a connection that it refuses proves that the guest does not run there, if the line
        is a direct one: a tunnel's end refuses for itself. A destination that cannot be reached
        proves nothing, and the guest stays stopped here meanwhile.

        Raises:
            MigrationError: the guest is not there and never will be: it may run here.
        """
        self.report.error = f"{cause}; asking the destination what became of the guest"
        self._socket.interrupt()  # if it is only silent: the other end is to listen elsewhere
        while True:
            try:
                channel = self._address.connect(2.0)
            except LinkLost as lost:
                reason = lost.__cause__
                refused = isinstance(reason, OSError) and reason.errno == errno.ECONNREFUSED
                if refused and self._direct:
                    self._committed = False
                    raise MigrationError(
                        f"the destination is gone ({cause}); it did not take the guest"
                    ) from cause
                if self._abandoned.wait(_ASK_AGAIN):
                    raise
                continue
            try:
                channel.send(Kind.ASK, handover)
                started = channel.expect_struct(Kind.STARTED, codec.Started)
            except PeerRefused as refusal:
                self._committed = False
                raise MigrationError(f"the destination gave the guest up: {refusal}") from cause
            except GodwitError:
                if self._abandoned.wait(_ASK_AGAIN):
                    raise
            else:
                self._socket.close()
                self._line = channel
                self.report.error = None
                return started
            channel.close()
