"""The destination's side of a move: it makes everything before the stop, loads, and waits.

Nothing of the guest runs here before COMMIT. After READY was said, the guest may be ours: a lost
line is then waited out on the listening socket, where the source asks with the move's token.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from godwit.errors import GodwitError, LinkLost, MigrationError, StreamError
from godwit.machine.machine import Machine
from godwit.migration.packets.destination import Arrival
from godwit.migration.wire.compatibility import check
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SILENCE, Address, Channel

from .receiver import Receiver
from .wire import messages as codec

#: See :class:`Destination`.
OnStart = Callable[[bool, Callable[[str], None], Arrival | None, Callable[[list[str]], None]], None]
#: How long a guest that was loaded waits for its source to ask, seconds.
PATIENCE = 30.0


class Destination:
    """Waits for a guest at ``address``, in a thread of its own, where the callbacks are made.

    ``on_start(running, mark, arrival, tell)`` takes the guest over (``running``: it ran at its
    source; ``mark`` is told of each phase's end; ``arrival`` is to draw its traffic here when it
    starts, if its frames are handed over: see :mod:`.arrival`; ``tell`` gets the run states, and
    tells the source);
    ``on_failed(error)`` says that this machine's RAM is spoilt, and that no guest will come;
    ``hands_over()`` says whether frames may be handed over.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        machine: Machine,
        address: Address,
        on_start: OnStart,
        on_failed: Callable[[GodwitError], None],
        hands_over: Callable[[], bool] = lambda: True,
    ) -> None:
        self._machine = machine
        self._address = address
        self._hands_over = hands_over
        self._arrival: Arrival | None = None
        self._on_start = on_start
        self._on_failed = on_failed
        self._listener = address.listen()
        self._closing = threading.Event()
        self._channel: Channel | None = None
        self._hello: codec.Hello | None = None
        self._receiver = Receiver(machine)
        for kind in (codec.Hello, codec.Handover, codec.Frames, codec.RoadEnds):
            codec.prepare(kind)
        self._thread = threading.Thread(target=self._main, name="incoming", daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._receiver.start()
        self._thread.start()

    @property
    def arrival(self) -> Arrival | None:
        """Of the guest that came or comes, if its frames are handed over."""
        return self._arrival

    @property
    def phases(self) -> dict[str, float]:
        """Name of a phase -> ms since the state came, at the phase's end."""
        return self._receiver.phases

    def close(self) -> None:
        """Wait no more."""
        self._closing.set()
        if self._channel is not None:
            self._channel.interrupt()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed already
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(SILENCE)
        self._receiver.close()
        self._listener.close()

    # --- the conversation -------------------------------------------------------------------------
    def _main(self) -> None:
        try:
            while not self._closing.is_set():
                channel = self._accept(None)
                if channel is None or self._serve(channel):
                    return
        except GodwitError as error:
            if not self._closing.is_set():
                self._on_failed(error)
        except Exception as error:
            self._on_failed(MigrationError(f"{type(error).__name__}: {error}"))
        finally:
            self._receiver.urgency.end()
            # Nobody is awaited any more: whoever connects shall be refused, not left waiting.
            self._listener.close()

    def _accept(self, timeout: float | None) -> Channel | None:
        """The next line; None when ``timeout`` seconds went by, or it is time to close."""
        until = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self._closing.is_set():
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not poll.poll(left):
                return None
            try:
                return Channel(self._listener.accept()[0])
            except OSError:
                # A peer that gave up already, or no descriptors left: others may come.
                self._closing.wait(0.1)
        return None

    def _serve(self, channel: Channel) -> bool:
        """One source; False when it was refused and another may come.

        Raises:
            MigrationError: the move failed after RAM began to come.
        """
        self._channel = channel
        try:
            try:
                hello = channel.expect_struct(Kind.HELLO, codec.Hello)
                check(hello, self._machine)
            except GodwitError as error:
                _tell(channel, Kind.REFUSED, str(error))
                return False
            self._hello = hello
            # From now on the machine changes: what fails, fails for good.
            hands_over = bool(hello.mark) and self._hands_over()
            channel.send(Kind.WELCOME, channel.as_seen(hands_over))
            if hands_over:
                self._arrival = Arrival(self._machine, channel, hello.mark)
            self._machine.foresee([(nic.negotiated, nic.foresight) for nic in hello.nics])
            try:
                self._receiver.receive(channel)
            except LinkLost:
                raise
            except GodwitError as error:
                _tell(channel, Kind.FAILED, str(error))
                raise
            self._await_commit(channel, hello)
            return True
        finally:
            channel.close()

    def _await_commit(self, channel: Channel, hello: codec.Hello) -> None:
        arrival = self._arrival
        channel.send(Kind.READY)
        if arrival is not None:
            arrival.prepare()  # while the source is told, and answers
        try:
            handover = self._expect_commit(channel)
            if handover.token != hello.token:
                raise StreamError("COMMIT: the token of another move")
        except LinkLost as lost:
            self._receiver.urgency.end()
            if arrival is not None:
                arrival.abandon()
            channel, handover = self._await_question(hello, lost)
            line: Arrival | Channel = channel
        else:
            line = arrival or channel
        # The guest is ours.
        self._receiver.mark("commit")
        started: list[codec.Started] = []

        def tell(states: list[str]) -> None:
            started.append(codec.Started(dict(self._receiver.phases), states))
            with suppress(LinkLost):  # then it asks, and is told again
                line.send(Kind.STARTED, started[0])

        self._on_start(handover.running, self._receiver.mark, arrival, tell)
        self._receiver.mark("running")
        if isinstance(line, Arrival):
            line.listen()
            if line.heard:
                return
        self._answer(channel, hello, started[0])

    def _expect_commit(self, channel: Channel) -> codec.Handover:
        while True:
            kind, payload = channel.expect_one(Kind.COMMIT, Kind.FRAMES)
            self._receiver.urgency.look()
            if kind is Kind.COMMIT:
                return codec.decode(payload, codec.Handover)
            if self._arrival is None:
                raise StreamError("frame FRAMES: no handover was agreed on")
            self._arrival.keep(payload)

    def _await_question(self, hello: codec.Hello, lost: LinkLost) -> tuple[Channel, codec.Handover]:
        """The line broke between READY and COMMIT: did the source hand over, or resume?

        A source that resumed does not ask. One that handed over asks until it is answered; its
        question is as good as the COMMIT that was lost.
        """
        until = time.monotonic() + PATIENCE
        while True:
            channel = self._accept(max(0.0, until - time.monotonic()))
            if channel is None:
                # Never to run here: the listening socket closes before anything else can happen.
                self._listener.close()
                raise MigrationError(
                    f"the line was lost before the commit ({lost}), and the source did not ask "
                    f"for its guest in {PATIENCE:.0f} s: it runs there"
                )
            handover = _question(channel, hello.token)
            if handover is not None:
                return channel, handover
            channel.close()

    def _answer(self, channel: Channel, hello: codec.Hello, started: codec.Started) -> None:
        """Have the source hear what it was told, here or where it asks, until it has.

        For as long as it takes: a source that finds nobody listening concludes that the guest is
        not here, and would let it run there too.
        """
        while True:
            try:
                channel.expect(Kind.HEARD)
                return
            except GodwitError:
                channel.close()
            again = None
            while again is None:
                again = self._accept(None)
                if again is None:
                    return  # it is time to close: the guest ends here as well
                if _question(again, hello.token) is None:
                    again.close()
                    again = None
            channel = again
            with suppress(LinkLost):
                channel.send(Kind.STARTED, started)


def _question(channel: Channel, token: bytes) -> codec.Handover | None:
    """What a new line asks, if it asks about this move."""
    try:
        handover = channel.expect_struct(Kind.ASK, codec.Handover)
    except GodwitError as error:
        _tell(channel, Kind.REFUSED, f"a guest is here already ({error})")
        return None
    if handover.token != token:
        _tell(channel, Kind.REFUSED, "this is another move")
        return None
    return handover


def _tell(channel: Channel, kind: Kind, reason: str) -> None:
    try:
        channel.send(kind, codec.Text(reason[:4000]))
    except LinkLost:
        pass
