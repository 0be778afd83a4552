"""The receiving half of a migration: RAM goes into a guest, then everything else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from godwit.errors import GuestError, MigrationError, StreamError
from godwit.host.ioctl import address_of
from godwit.hw.memory import PAGE
from godwit.machine.state import MachineState
from godwit.spec import saved

from .guest import Guest
from .ram.page_runs import pages_in
from .ram.prefault import Prefault
from .realtime import RealtimeSection
from .times import TIMES, Times
from .wire import messages
from .wire.messages import Kind, Run
from .wire.stream import Connection


class Receiver:
    """A loader of a guest, whose RAM is populated from :meth:`start` on, before anything comes.

    The guest was ``kept`` somewhere for a time that only the real-time clock knows, or comes right
    from its source. ``clock_now``: the guest's clocks make up for that time.

    Attributes:
        phases: name of a phase -> ms since the state came, at the phase's end.
        realtime: the realtime section of the receiving thread.
        begun: a message has come by which the machine changes.
    """

    def __init__(
        self, guest: Guest, times: Times = TIMES, *, kept: bool = False, clock_now: bool = False
    ) -> None:
        self._guest = guest
        self._kept = kept
        self._clock_now = clock_now
        self._memory = guest.machine.memory
        self._times = times
        self._prefault = Prefault(self._memory)
        self._prefaulted_pages = 0
        self._received_at = times.now()
        self.phases: dict[str, float] = {}
        self.begun = False
        self.realtime = RealtimeSection(times)
        guest.prepare()

    def start(self) -> None:
        """Begin to populate the guest's RAM."""
        self._prefault.start()

    def close(self) -> None:
        """Populate the guest's RAM no more."""
        self._prefault.finish()

    def phase(self, name: str) -> None:
        """Note the end of a phase."""
        if name in ("vcpus-started", "running"):  # or will run at its operator's command
            self.realtime.end()
        self.phases[name] = round((self._times.now() - self._received_at) * 1000, 3)

    def receive(self, connection: Connection, on_begin: Callable[[], None] = lambda: None) -> None:
        """Receive RAM and the state, which is loaded while the last pages are on their way.

        ``on_begin`` is called once the first message comes.

        Raises:
            LinkLost: the connection ended.
            StreamError, MigrationError: what came is wrong, or the source gave up.
        """
        loaded = False
        while True:
            kind, length = connection.receive()
            if not self.begun:
                self.begun = True
                on_begin()
            self.realtime.expire()
            if kind is Kind.RAM:
                self._receive_ram(connection, length)
            elif kind is Kind.STATE:
                self.realtime.begin()
                connection.on_wait = self.realtime.expire  # the message may trickle in
                payload = connection.read(length)
                if loaded:
                    raise StreamError("message STATE: a second one")
                self._take_state(payload)
                loaded = True
            elif kind in (Kind.PREFAULT, Kind.ZERO):
                self._receive_runs(connection, kind, length)
            elif kind is Kind.ROUND:
                if length:
                    raise StreamError("message ROUND has a payload")
                self._prefault.finish()
                if loaded:
                    self._settle()
                    return
            elif kind is Kind.FAILED:
                reason = saved.decode(connection.read(length), messages.Reason).reason
                raise MigrationError(f"the source gave up: {reason}")
            else:
                raise StreamError(f"message {kind.name} where RAM was due")

    def expect_pages(self, runs: list[Run]) -> None:
        """Populate these pages next, which somebody else will bring."""
        self._want(runs)
        self._prefault.use(self._views(runs))

    def load(self, payload: bytes) -> None:
        """Load a state whose RAM is here.

        Raises:
            StreamError, MigrationError: the state is wrong.
        """
        self.realtime.begin()
        self._take_state(payload)
        self._settle()

    def _take_state(self, payload: bytes | bytearray) -> None:
        self._received_at = self._times.now()
        state = saved.decode(payload, MachineState)
        self.phase("decoded")
        self._load(state)

    def _settle(self) -> None:
        for nic in self._guest.nics:
            # What waits in the tap is older than the guest's arrival.
            nic.rx_backlog.drain()
        self.phase("loaded")

    def _receive_runs(self, connection: Connection, kind: Kind, length: int) -> None:
        payload = connection.read(length)
        count = messages.decode_count(payload, length)
        runs = messages.decode_runs(memoryview(payload)[4:], count)
        if messages.table_size(count) != length:
            raise StreamError(f"message {kind.name}: {length} bytes for {count} runs")
        if kind is Kind.PREFAULT:
            self._want(runs)
        else:
            self._clear(runs)

    def _receive_ram(self, connection: Connection, length: int) -> None:
        first = connection.read(4)
        count = messages.decode_count(first, length)
        runs = messages.decode_runs(connection.read(messages.table_size(count) - 4), count)
        if messages.table_size(count) + pages_in(runs) * PAGE != length:
            raise StreamError(f"message RAM: {length} bytes, but its runs have more or fewer")
        views = self._views(runs)
        if not self._prefault.finished:
            self._prefault.use(views)
        for start in range(0, len(views), 512):
            connection.read_into(views[start : start + 512])

    def _views(self, runs: list[Run]) -> list[memoryview]:
        try:
            return self._memory.views(runs)
        except GuestError as error:
            raise StreamError(str(error)) from error

    def _want(self, runs: list[Run]) -> None:
        """Populate these pages next, as the first round will bring them."""
        self._prefaulted_pages += pages_in(runs)
        if self._prefaulted_pages > self._memory.size // PAGE:
            raise StreamError("message PREFAULT: more pages than there are")
        self._prefault.want(self._views(runs))

    def _clear(self, runs: list[Run]) -> None:
        if pages_in(runs) > self._memory.size // PAGE:
            raise StreamError("message ZERO: more pages than there are")
        for view in self._views(runs):
            ctypes.memset(address_of(view), 0, len(view))

    def _load(self, state: MachineState) -> None:
        """Load the state, and find everything that can be wrong there before READY."""
        self._prefault.finish()
        self._guest.load(
            state, self._received_at, self.phase, kept=self._kept, clock_now=self._clock_now
        )
        self.phase("state-loaded")
