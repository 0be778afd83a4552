"""What comes over a line goes into a machine: RAM, then everything else."""

from __future__ import annotations

import ctypes
import time

from godwit.errors import GuestError, MigrationError, StreamError
from godwit.host.ioctl import address_of
from godwit.hw.memory import PAGE
from godwit.machine.machine import Machine
from godwit.machine.state import MachineState
from godwit.migration.ram.page_runs import pages_in
from godwit.migration.ram.prefault import Toucher
from godwit.migration.wire.messages import Kind, Run
from godwit.migration.wire.stream import Line

from .realtime import Urgency
from .wire import messages as codec


class Receiver:
    """Loads ``machine``; its RAM is made from :meth:`start` on, before anything comes."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._toucher = Toucher(machine.memory)
        self._touched_pages = 0
        self._received_at = time.monotonic()
        #: Name of a phase -> ms since the state came, at the phase's end.
        self.phases: dict[str, float] = {}
        #: Of the thread that receives.
        self.urgency = Urgency()
        codec.prepare(MachineState)

    def start(self) -> None:
        """Begin to make RAM."""
        self._toucher.start()

    def close(self) -> None:
        """Make no more of it."""
        self._toucher.finish()

    def mark(self, phase: str) -> None:
        """A phase ended."""
        if phase in ("vcpus-started", "running"):  # or will run when its operator says so
            self.urgency.end()
        self.phases[phase] = round((time.monotonic() - self._received_at) * 1000, 3)

    def receive(self, line: Line) -> None:
        """RAM, and the state, which is loaded while the last pages are still on their way.

        Raises:
            LinkLost: the line ended.
            StreamError, MigrationError: what came is wrong, or the source gave up.
        """
        loaded = False
        while True:
            kind, length = line.receive()
            self.urgency.look()
            if kind is Kind.RAM:
                self._receive_ram(line, length)
            elif kind is Kind.STATE:
                self.urgency.begin()
                payload = line.read(length)
                self._received_at = time.monotonic()
                if loaded:
                    raise StreamError("frame STATE: a second one")
                state = codec.decode(payload, MachineState)
                self.mark("decoded")
                self._load(state)
                loaded = True
            elif kind in (Kind.TOUCH, Kind.ZERO):
                payload = line.read(length)
                count = codec.decode_count(payload, length)
                runs = codec.decode_runs(memoryview(payload)[4:], count)
                if codec.table_size(count) != length:
                    raise StreamError(f"frame {kind.name}: {length} bytes for {count} runs")
                if kind is Kind.TOUCH:
                    self._touch(runs)
                else:
                    self._clear(runs)
            elif kind is Kind.ROUND:
                line.read(length)
                self._toucher.finish()
                if loaded:
                    for nic in self._machine.nics:
                        nic.drain()  # what waits in the tap is older than the guest's arrival
                    self.mark("loaded")
                    return
            elif kind is Kind.FAILED:
                text = codec.decode(line.read(length), codec.Text)
                raise MigrationError(f"the source gave up: {text.reason}")
            else:
                raise StreamError(f"frame {kind.name} where RAM was due")

    def _receive_ram(self, line: Line, length: int) -> None:
        first = line.read(4)
        count = codec.decode_count(first, length)
        runs = codec.decode_runs(line.read(codec.table_size(count) - 4), count)
        if codec.table_size(count) + pages_in(runs) * PAGE != length:
            raise StreamError(f"frame RAM: {length} bytes, but its runs say otherwise")
        views = self._views(runs)
        if not self._toucher.finished:
            self._toucher.use(views)
        for start in range(0, len(views), 512):
            line.read_into(views[start : start + 512])

    def _views(self, runs: list[Run]) -> list[memoryview]:
        try:
            return self._machine.memory.views(runs)
        except GuestError as error:
            raise StreamError(str(error)) from error

    def _touch(self, runs: list[Run]) -> None:
        """The first pass will bring these pages."""
        self._touched_pages += pages_in(runs)
        if self._touched_pages > self._machine.memory.size // PAGE:
            raise StreamError("frame TOUCH: more pages than there are")
        self._toucher.want(self._views(runs))

    def _clear(self, runs: list[Run]) -> None:
        if pages_in(runs) > self._machine.memory.size // PAGE:
            raise StreamError("frame ZERO: more pages than there are")
        for view in self._views(runs):
            ctypes.memset(address_of(view), 0, len(view))

    def _load(self, state: MachineState) -> None:
        """Everything that can be wrong with the state is found here, before READY."""
        self._toucher.finish()
        self._machine.load(state, self._received_at, self.mark)
        self.mark("state-loaded")
