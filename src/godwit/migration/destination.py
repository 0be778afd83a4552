"""The destination's side of a move: it makes everything before the stop, loads, and waits.

Nothing of the guest runs here before COMMIT. After READY was said, the guest may be ours: a lost
line is then waited out on the listening socket, where the source asks with the move's token.
"""

from __future__ import annotations

import ctypes
import select
import socket
import threading
import time
from collections.abc import Callable

from ..errors import GodwitError, GuestError, LinkLost, MigrationError, StreamError
from ..hw.memory import PAGE
from ..kvm.ioctl import address_of
from ..machine import Machine
from ..machine_state import MachineState
from . import codec
from .channel import SILENCE, Address, Channel
from .codec import Kind, Run
from .hello import check
from .touch import Toucher

#: How long a guest that was loaded waits for its source to ask, seconds.
PATIENCE = 30.0


class Destination:
    """Waits for a guest at ``address``, in a thread of its own, where the callbacks are made.

    ``on_start(running, mark) -> run states`` takes the guest over (``running``: it ran at its
    source; ``mark`` is told of each phase's end);
    ``on_failed(error)`` says that this machine's RAM is spoilt, and that no guest will come.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        machine: Machine,
        address: Address,
        on_start: Callable[[bool, Callable[[str], None]], list[str]],
        on_failed: Callable[[GodwitError], None],
    ) -> None:
        self._machine = machine
        self._address = address
        self._on_start = on_start
        self._on_failed = on_failed
        self._listener = address.listen()
        self._closing = threading.Event()
        self._channel: Channel | None = None
        self._hello: codec.Hello | None = None
        self._toucher = Toucher(machine.memory)
        self._touched_pages = 0
        codec.prepare(MachineState)
        codec.prepare(codec.Handover)
        self.phases: dict[str, float] = {}
        self.bytes_received = 0
        self._thread = threading.Thread(target=self._main, name="incoming", daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._toucher.start()
        self._thread.start()

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
        self._toucher.finish()
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
            channel.send(Kind.WELCOME, channel.as_seen())
            try:
                self._receive(channel)
            except LinkLost:
                raise
            except GodwitError as error:
                _tell(channel, Kind.FAILED, str(error))
                raise
            self._await_commit(channel, hello)
            return True
        finally:
            channel.close()

    def _receive(self, channel: Channel) -> None:
        """RAM, and the state, which is loaded while the last pages are still on their way."""
        loaded = False
        while True:
            kind, length = channel.receive()
            if kind is Kind.RAM:
                self._receive_ram(channel, length)
            elif kind is Kind.STATE:
                payload = channel.read(length)
                self._received_at = time.monotonic()
                if loaded:
                    raise StreamError("frame STATE: a second one")
                state = codec.decode(payload, MachineState)
                self._mark("decoded")
                self._load(state)
                loaded = True
            elif kind in (Kind.TOUCH, Kind.ZERO):
                payload = channel.read(length)
                count = codec.decode_count(payload, length)
                runs = codec.decode_runs(memoryview(payload)[4:], count)
                if codec.table_size(count) != length:
                    raise StreamError(f"frame {kind.name}: {length} bytes for {count} runs")
                if kind is Kind.TOUCH:
                    self._touch(runs)
                else:
                    self._clear(runs)
            elif kind is Kind.ROUND:
                channel.read(length)
                self._toucher.finish()
                if loaded:
                    for nic in self._machine.nics:
                        nic.drain()  # what waits in the tap is older than the guest's arrival
                    self._mark("loaded")
                    return
            elif kind is Kind.FAILED:
                text = codec.decode(channel.read(length), codec.Text)
                raise MigrationError(f"the source gave up: {text.reason}")
            else:
                raise StreamError(f"frame {kind.name} where RAM was due")

    def _receive_ram(self, channel: Channel, length: int) -> None:
        first = channel.read(4)
        count = codec.decode_count(first, length)
        runs = codec.decode_runs(channel.read(codec.table_size(count) - 4), count)
        if codec.table_size(count) + sum(pages for _, pages in runs) * PAGE != length:
            raise StreamError(f"frame RAM: {length} bytes, but its runs say otherwise")
        views = self._views(runs)
        if not self._toucher.finished:
            self._toucher.use(views)
        for start in range(0, len(views), 512):
            channel.read_into(views[start : start + 512])
        self.bytes_received += length

    def _views(self, runs: list[Run]) -> list[memoryview]:
        try:
            return [self._machine.memory.view(address, pages * PAGE) for address, pages in runs]
        except GuestError as error:
            raise StreamError(str(error)) from error

    def _touch(self, runs: list[Run]) -> None:
        """The first pass will bring these pages."""
        self._touched_pages += sum(pages for _, pages in runs)
        if self._touched_pages > self._machine.memory.size // PAGE:
            raise StreamError("frame TOUCH: more pages than there are")
        self._toucher.want(self._views(runs))

    def _clear(self, runs: list[Run]) -> None:
        for view in self._views(runs):
            ctypes.memset(address_of(view), 0, len(view))

    def _load(self, state: MachineState) -> None:
        """Everything that can be wrong with the state is found here, before READY."""
        self._toucher.finish()
        self._machine.load(state, self._received_at, self._mark)
        self._mark("state-loaded")

    def _await_commit(self, channel: Channel, hello: codec.Hello) -> None:
        channel.send(Kind.READY)
        try:
            handover = channel.expect_struct(Kind.COMMIT, codec.Handover)
            if handover.token != hello.token:
                raise StreamError("COMMIT: the token of another move")
        except LinkLost as lost:
            channel, handover = self._await_question(hello, lost)
        # The guest is ours.
        self._mark("commit")
        states = self._on_start(handover.running, self._mark)
        self._mark("running")
        self._answer(channel, hello, codec.Started(self.phases, states))

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
        """Tell the source, on this line or on those where it asks, until it has heard.

        For as long as it takes: a source that finds nobody listening concludes that the guest is
        not here, and would let it run there too.
        """
        while True:
            try:
                channel.send(Kind.STARTED, started)
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

    def _mark(self, phase: str) -> None:
        """ms since the state came."""
        self.phases[phase] = round((time.monotonic() - self._received_at) * 1000, 3)


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
