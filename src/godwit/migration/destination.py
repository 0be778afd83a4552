"""The destination's side of a migration: all is made before the stop, then loaded, then committed.

Nothing of the guest runs here before COMMIT. After READY was sent, the guest may be ours: a lost
connection is then waited out on the listening socket, where the source queries with the migration's
token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from godwit.errors import (
    GodwitError,
    LinkLost,
    MigrationError,
    StreamError,
    as_godwit_error,
)
from godwit.spec import saved

from .guest import Guest
from .incoming import Incoming, TakeOver
from .packets.destination import PacketDestination
from .times import TIMES, Times
from .wire import messages
from .wire.acceptor import Acceptor
from .wire.address import Address
from .wire.compatibility import adopt, check
from .wire.messages import Kind
from .wire.stream import WaitingConnection


class Destination(Incoming):
    """A destination that waits for a guest at ``address``.

    ``hands_over()`` returns whether packets may be handed over.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        guest: Guest,
        address: Address,
        take_over: TakeOver,
        on_failed: Callable[[GodwitError], None],
        hands_over: Callable[[], bool] = lambda: True,
        times: Times = TIMES,
    ) -> None:
        super().__init__(guest, take_over, on_failed, times)
        self._hands_over = hands_over
        self._acceptor = Acceptor(address, times, self._turn_away)
        self._connection: WaitingConnection | None = None
        #: Where the source awaits STARTED.
        self._answer_on: PacketDestination | WaitingConnection | None = None
        self._started: messages.Started | None = None
        for kind in (messages.Hello, messages.Commit, messages.Packets, messages.PathDrained):
            saved.prepare(kind)

    def close(self) -> None:
        """Wait for the guest no more."""
        super().close()
        self._acceptor.close()

    def started(self, states: list[str]) -> None:
        """Send STARTED, and keep the message for a source that queries."""
        super().started(states)
        self._started = messages.Started(dict(self.phases), states)
        if self._answer_on is not None:
            with suppress(LinkLost):  # then the source queries, and is answered
                self._answer_on.send(Kind.STARTED, self._started)

    def _interrupt(self) -> None:
        if self._connection is not None:
            self._connection.interrupt()
        self._acceptor.interrupt()

    def _finish(self) -> None:
        # Nobody is awaited any more: whoever connects shall be refused, not left waiting.
        self._acceptor.close()

    # --- the conversation -------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._closing.is_set():
            introduced = self._acceptor.next(None)
            if introduced is None or self._serve(*introduced):
                return

    def _serve(self, connection: WaitingConnection, kind: Kind, payload: bytes) -> bool:
        """Serve one source by its first message, which names its role.

        Returns False if the source was refused, or was gone before anything changed here: another
        may come.

        Raises:
            MigrationError: the migration failed after RAM began to come.
        """
        self._connection = connection
        try:
            try:
                hello = self._hello(kind, payload)
            except GodwitError as error:
                _refuse(connection, Kind.REFUSED, str(error))
                return False
            hands_over = bool(hello.cookie) and self._hands_over()
            try:
                connection.send(Kind.WELCOME, connection.describe(hands_over))
                if not connection.wait(self._times.begin)[0]:
                    return False  # whoever it is, it keeps others waiting
                if hands_over:
                    self.packets = PacketDestination(
                        self._guest, connection, hello.cookie, self._times
                    )
                # From its first message on the machine changes: what fails, fails for good.
                self._receiver.receive(connection, lambda: self._prepare(hello))
            except LinkLost:
                if not self._receiver.begun:
                    self.packets = None
                    return False
                raise
            except GodwitError as error:
                _refuse(connection, Kind.FAILED, str(error))
                raise
            self._await_commit(connection, hello)
            return True
        finally:
            connection.close()

    def _prepare(self, hello: messages.Hello) -> None:
        """Make the machine ready for the guest described by HELLO, whose RAM begins to come."""
        adopt(hello, self._guest.machine)
        hints = {device.id: device.hints for device in hello.devices}
        self._guest.machine.prepare({id: hint for id, hint in hints.items() if hint})

    def _turn_away(self, connection: WaitingConnection, error: GodwitError) -> None:
        """Send why somebody is not served, who may be anybody: no fact of the machine is in it.

        Not once the source may be querying, who takes a refusal for proof that nobody is here.
        """
        if not self._receiver.begun:
            _refuse(connection, Kind.REFUSED, str(error))

    def _hello(self, kind: Kind, payload: bytes) -> messages.Hello:
        """Return what a connection's first message begins: only HELLO begins something now.

        Raises:
            GodwitError: no migration begins here.
        """
        if kind is Kind.QUERY:
            raise StreamError("no guest was handed over to here")
        hello = saved.decode(payload, messages.Hello)
        if len(hello.cookie) not in (0, 16):
            raise StreamError(f"HELLO: a cookie of {len(hello.cookie)} bytes, not 16")
        check(hello, self._guest.machine)
        return hello

    def _await_commit(self, connection: WaitingConnection, hello: messages.Hello) -> None:
        packets = self.packets
        connection.send(Kind.READY)
        if packets is not None:
            packets.prepare()  # while the source receives that, and answers
        try:
            commit = self._expect_commit(connection)
            if commit.token != hello.token:
                raise StreamError("COMMIT: the token of another migration")
        except LinkLost as lost:
            self._receiver.realtime.end()
            if packets is not None:
                packets.abandon()
            connection, commit = self._await_query(hello, lost)
            self._answer_on = connection
        else:
            self._answer_on = packets or connection
        # The guest is ours.
        self.phase("commit")
        try:
            self._take_over(self, commit.running)
            self.phase("running")
            if self._answer_on is packets and packets is not None:
                packets.listen()
                if packets.acknowledged:
                    return
        except Exception as error:
            if self.owned:  # a source that found nobody would run the guest as well
                self._answer(connection, hello)
            else:
                self._decline(connection, hello.token, as_godwit_error(error))
            raise
        self._answer(connection, hello)

    def _expect_commit(self, connection: WaitingConnection) -> messages.Commit:
        while True:
            kind, payload = connection.expect_one(Kind.COMMIT, Kind.PACKETS)
            self._receiver.realtime.expire()
            if kind is Kind.COMMIT:
                return saved.decode(payload, messages.Commit)
            if self.packets is None:
                raise StreamError("message PACKETS: no packet handover was agreed on")
            self.packets.inject(payload)

    def _await_query(
        self, hello: messages.Hello, lost: LinkLost
    ) -> tuple[WaitingConnection, messages.Commit]:
        """Find out whether the source handed over or resumed: the connection broke before COMMIT.

        A source that resumed does not query. One that handed over queries until answered; its QUERY
        is as good as the COMMIT that was lost.
        """
        until = self._times.now() + self._times.patience
        while True:
            introduced = self._acceptor.next(max(0.0, until - self._times.now()))
            if introduced is None:
                # Never to run here: the listening socket closes before anything else can happen.
                self._acceptor.close()
                raise MigrationError(
                    f"the connection was lost before the commit ({lost}), and the source did not "
                    f"query for its guest in {self._times.patience:g} s: it runs there"
                )
            commit = _query(*introduced, hello.token)
            if commit is not None:
                return introduced[0], commit
            introduced[0].close()

    def _answer(self, connection: WaitingConnection, hello: messages.Hello) -> None:
        """Have the source receive STARTED, here or by a query, until the ACK.

        This has no deadline: a source that finds nobody listening concludes that the guest is not
        here, and would let the guest run there too.
        """
        while not _acknowledged(connection):
            again = self._next_query(hello.token)
            if again is None:
                return  # it is time to close: the guest ends here as well
            connection = again
            with suppress(GodwitError, OSError):
                connection.send(Kind.STARTED, self._started or messages.Started({}, []))

    def _decline(self, connection: WaitingConnection, token: bytes, error: GodwitError) -> None:
        """Have the source know why its guest will never run here, if it queries soon."""
        with suppress(OSError):
            connection.close()
        until = self._times.now() + self._times.patience
        while not self._closing.is_set():
            introduced = self._acceptor.next(max(0.0, until - self._times.now()))
            if introduced is None:
                return
            commit = _query(*introduced, token)
            if commit is not None:
                _refuse(introduced[0], Kind.REFUSED, str(error))
            with suppress(OSError):
                introduced[0].close()
            if commit is not None:
                return

    def _next_query(self, token: bytes) -> WaitingConnection | None:
        """Return the next connection that queries for this migration, or None at the close.

        Nothing that goes wrong with one of them ends this: the source is to find somebody here.
        """
        while not self._closing.is_set():
            try:
                introduced = self._acceptor.next(None)
                if introduced is not None and _query(*introduced, token) is not None:
                    return introduced[0]
                if introduced is not None:
                    introduced[0].close()
            except Exception:
                self._closing.wait(0.1)
        return None


def _acknowledged(connection: WaitingConnection) -> bool:
    """Wait for the ACK, close the connection, and return whether it came."""
    try:
        connection.expect(Kind.ACK)
        return True
    except Exception:  # whatever it is, the source may be querying
        return False
    finally:
        with suppress(OSError):
            connection.close()


def _query(
    connection: WaitingConnection, kind: Kind, payload: bytes, token: bytes
) -> messages.Commit | None:
    """Return what a new connection's QUERY holds, or None if about another migration."""
    try:
        if kind is not Kind.QUERY:
            raise StreamError(f"message {kind.name} where QUERY was due")
        commit = saved.decode(payload, messages.Commit)
    except GodwitError as error:
        _refuse(connection, Kind.REFUSED, f"a guest is here already ({error})")
        return None
    if commit.token != token:
        _refuse(connection, Kind.REFUSED, "this is another migration")
        return None
    return commit


def _refuse(connection: WaitingConnection, kind: Kind, reason: str) -> None:
    with suppress(LinkLost):
        connection.send(kind, messages.Reason(reason[:4000]))
