"""The source's side of a migration: the messages, and how the guest is handed over.

Until COMMIT is sent, any failure lets the guest go on here. From then on the destination may have
the guest, so the source queries for certainty (see :meth:`Source._resolve`): exactly one side runs
whatever dies when. docs/decisions/0002-commit.md has the argument.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from godwit.errors import (
    GodwitError,
    LinkLost,
    MigrationError,
    PeerRefused,
    StreamError,
    as_godwit_error,
)
from godwit.spec import saved
from godwit.spec.runstate import RunState, RunStates

from .guest import Guest
from .outgoing import Outgoing, Parameters
from .packets.source import PacketSource
from .realtime import LONGEST_S, RealtimeSection
from .times import TIMES, Times
from .wire import messages
from .wire.address import Address
from .wire.messages import Kind
from .wire.stream import WaitingConnection

# The decoders of the destination's answers, before their time counts.
for _answer in (messages.Welcome, messages.Switched, messages.Started):
    saved.prepare(_answer)


class Source(Outgoing):
    """A migration of a guest to ``address``.

    ``holding()`` returns whether packets of the guest's previous host are still awaited here:
    the guest does not stop before all of them are there, or those would be sent on after younger
    ones.
    """

    def __init__(
        self,
        guest: Guest,
        states: RunStates,
        address: Address,
        parameters: Parameters,
        on_status: Callable[[str], None],
        holding: Callable[[], bool] = lambda: False,
        times: Times = TIMES,
        checked: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(guest, states, parameters, on_status, times, checked)
        self._holding = holding
        self._address = address
        self._first: WaitingConnection | None = None
        self._exposed = False
        self._direct = False
        self._hands_over = False
        self._packets: PacketSource | None = None
        self._realtime = RealtimeSection(times)

    @property
    def exposed(self) -> bool:
        """True if the destination may have shown the guest to the network: COMMIT was sent."""
        return self._exposed

    @property
    def _live(self) -> WaitingConnection:
        """The connection on which the migration began."""
        if self._first is None:
            raise LinkLost("there is no connection to the destination")
        return self._first

    def _phases(self) -> tuple[Callable[[], None], ...]:
        return (
            self._await_previous,
            self._await_check,
            self._hello,
            self._precopy,
            self._stop,
            self._final,
            self._ready,
            self._commit,
        )

    def _await_previous(self) -> None:
        """Wait for the end of the guest's previous packet handover, some seconds at the most.

        First of all: no log is on meanwhile, and what the guest writes is still to be judged.
        """
        while self._holding() and not self._cancelled.wait(self._times.look):
            pass

    def _hello(self) -> None:
        """Send HELLO, by which the destination refuses a guest it could not run."""
        self._check_alive()
        connection = self._address.connect(given_up=self._cancelled.is_set, on_open=self._opened)
        self.report.phase("connected")
        if self._parameters().handover and self._guest.nics:
            self._cookie = os.urandom(16)
        self._introduce()  # the log starts while the destination compares
        welcome = connection.expect_struct(Kind.WELCOME, messages.Welcome)
        self._direct = connection.is_direct(welcome)
        self._hands_over = bool(self._cookie) and welcome.packets
        self.report.phase("welcomed")
        self._status("active")

    def _opened(self, connection: WaitingConnection) -> None:
        """Take over a connection to which the other end has not answered yet."""
        self._connection = self._first = connection
        if self._cancelled.is_set():  # just now, before there was a connection to give up
            connection.give_up()

    def _stop(self) -> None:
        # A downtime that is to be long (on-no-convergence) is no matter of milliseconds.
        limit = self._parameters().downtime_limit
        if (self.report.expected_ms or 0.0) <= min(limit, LONGEST_S * 1000):
            self._realtime.begin()
        super()._stop()

    def _ready(self) -> None:
        """Wait until all is loaded, and send packets that come for the guest meanwhile."""
        if self._hands_over:
            self._packets = PacketSource(self._guest, self._live, self._cookie, self._times)
            until = self._times.now() + self._times.silence
            while not self._packets.serve(min(until, self._times.now() + LONGEST_S)):
                self._realtime.expire()
                self._check_silence(until)
        self._peer.expect(Kind.READY)
        self.report.phase("ready")

    def _commit(self) -> None:
        """Hand the guest over, which from here on may not run here until we know."""
        self._release()
        with self._decision:
            self._check_given_up()
            self._committed = self._exposed = True
        self._live.deadline = None
        commit = messages.Commit(self._token, self._before is RunState.RUNNING)
        try:
            self._peer.send(Kind.COMMIT, commit)
            self._realtime.end()  # the rest is the destination's
            started = self._await_started()
        except Exception as error:  # whatever it is, the guest may run there now
            self._realtime.end()
            started = self._resolve(as_godwit_error(error), commit)
        self._gone = True
        self.report.phase("started")
        self._started(started)
        try:
            self._peer.send(Kind.ACK)
        except LinkLost:
            pass  # then the destination goes on listening, which harms nobody

    def _check_stop(self) -> None:
        self._realtime.expire()
        super()._check_stop()

    def _await_started(self) -> messages.Started:
        """Send packets after the guest until the destination sends STARTED."""
        packets = self._packets
        until = self._times.now() + self._times.silence
        while packets is not None and not packets.over:
            if packets.serve(until):
                answer = self._handle(packets)
                if answer is not None:
                    return answer
            else:
                self._check_silence(until)
        return _decode_started(self._peer.expect_one(Kind.STARTED)[1])

    def _check_silence(self, until: float) -> None:
        if self._times.now() >= until:
            raise LinkLost(f"the peer was silent for {self._times.silence:g} s")

    def _handle(self, packets: PacketSource) -> messages.Started | None:
        """Handle the destination's next message."""
        kind, payload = self._peer.expect_one(Kind.STARTED, Kind.SWITCHED)
        if kind is Kind.STARTED:
            return _decode_started(payload)
        packets.switched(saved.decode(payload, messages.Switched).markers)
        return None

    def _post_completion(self) -> None:
        """Send packets on, as the guest may start later, and packets may take a longer way.

        A process that is to exit still sends what is known to be on its way.
        """
        packets = self._packets
        if packets is None:
            return
        try:
            while self._connection is self._first and not packets.over:
                if self._abandoned.is_set() and not packets.expecting:
                    break
                if packets.serve(self._times.now() + self._times.look):
                    self._handle(packets)
                self.report.handover = packets.info()
        except (GodwitError, OSError):
            pass  # the destination closed the connection, or a tap is gone
        finally:
            self.report.handover = {**packets.info(), "over": True}

    def _reason(self, error: Exception) -> Exception:
        """Return why the migration failed, by the destination's last message if there is one.

        A destination that fails sends why and closes the connection, which may break before that is
        received.
        """
        self._realtime.end()
        first = self._first
        if isinstance(error, LinkLost) and first is not None and not self._cancelled.is_set():
            first.deadline = self._times.now() + self._times.last_messages
            try:
                first.set_silence(self._times.last_message)
                while True:
                    first.expect_one(*Kind)
            except PeerRefused as refusal:
                return refusal
            except GodwitError:
                pass  # it sent nothing
            finally:
                first.deadline = None
        return error

    def _before_return(self) -> None:
        """Requeue the packets that were sent after the guest, and switch the traffic back."""
        if self._packets is not None:
            self._packets.requeue()
        if self._exposed:
            for uplink in self._guest.uplinks:
                uplink.switch_back()

    def _started(self, started: messages.Started) -> None:
        if self._packets is not None:
            self._packets.settled()
            self.report.handover = self._packets.info()
        # Until READY came by this clock, from READY to the running vCPUs by the destination's: the
        # latency of READY is counted twice, and that of STARTED, when the guest runs, not at all.
        phases = started.phases
        self.report.downtime_ms = self.report.stop_phases["ready"] + max(
            0.0, phases.get("vcpus-started", 0.0) - phases.get("loaded", 0.0)
        )
        self.report.destination_phases = started.phases
        self.report.destination_runstates = started.runstates
        self._states.set(RunState.POSTMIGRATE)

    def _resolve(self, cause: GodwitError, commit: messages.Commit) -> messages.Started:
        """Query until the answer is certain: the connection was lost with COMMIT on its way.

        A destination that has the guest, or could still take the guest, listens until the source
        knows. So a refused connection proves that the guest does not run there, if the connection
        is a direct one: a tunnel's end refuses for itself. A destination out of reach proves
        nothing, and the guest stays stopped here meanwhile.

        Raises:
            MigrationError: the guest is not there and never will be, and may run here.
        """
        self.report.error = f"{cause}; querying the destination for the outcome"
        # If it is only silent: the other end is to listen elsewhere.
        self._live.interrupt()
        while True:
            try:
                connection = self._address.connect(
                    self._times.query_connect, self._abandoned.is_set
                )
            except LinkLost as lost:
                reason = lost.__cause__
                refused = isinstance(reason, OSError) and reason.errno == errno.ECONNREFUSED
                if refused and self._direct:
                    self._committed = False
                    raise MigrationError(
                        f"the destination is gone ({cause}); it did not take the guest"
                    ) from cause
                if self._abandoned.wait(self._times.query_again):
                    raise
                continue
            except GodwitError:  # whoever listens there now is not the destination
                if self._abandoned.wait(self._times.query_again):
                    raise
                continue
            try:
                connection.send(Kind.QUERY, commit)
                started = _decode_started(connection.expect_one(Kind.STARTED)[1])
            except PeerRefused as refusal:
                connection.close()
                self._committed = False
                raise MigrationError(f"the destination gave the guest up: {refusal}") from cause
            except GodwitError:
                if self._abandoned.wait(self._times.query_again):
                    raise
            else:
                self._live.close()
                self._connection = connection
                self.report.error = None
                return started
            connection.close()


def _decode_started(payload: bytearray) -> messages.Started:
    """Return the content of a STARTED: with nonsense, too, the guest is there."""
    try:
        return saved.decode(payload, messages.Started)
    except StreamError:
        return messages.Started({}, [])
