"""A guest restored from a file: ``--incoming file:PATH``.

Read and checked whole before a vCPU runs; or, lazily, mapped: then all but RAM is checked before,
and RAM while the guest runs (:mod:`.lazy`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from godwit.errors import GodwitError, LinkLost, StreamError
from godwit.hw.memory import PAGE
from godwit.spec import saved
from godwit.spec.restore import FULL, Restore

from ..guest import Guest
from ..incoming import Incoming, TakeOver
from ..times import TIMES, Times
from ..wire import messages
from ..wire.compatibility import adopt, check
from ..wire.messages import Run
from .format import CHUNK, Index
from .lazy import Lazy
from .reader import Snapshot, named


def prepare() -> None:
    """Build the decoders of a file that will be read."""
    saved.prepare(Index)
    saved.prepare(messages.Hello)


class Restorer(Incoming):
    """A migration of a guest from the file at ``path``.

    ``on_damaged(error)`` is called when RAM of a lazily restored guest, paused by then, turns out
    to be wrong.

    Raises:
        ConfigError: the file cannot be read, or not lazily.
    """

    def __init__(
        self,
        guest: Guest,
        path: Path,
        take_over: TakeOver,
        on_failed: Callable[[GodwitError], None],
        times: Times = TIMES,
        restore: Restore = FULL,
        on_damaged: Callable[[GodwitError], None] = lambda error: None,
    ) -> None:
        self._lazy: Lazy | None = None
        self._copied = restore.clone
        with ExitStack() as undo:
            self._snapshot = Snapshot(path)
            undo.callback(self._snapshot.close)
            if restore.lazy:
                self._lazy = Lazy(self._snapshot, guest.machine, on_damaged, times.now)
            super().__init__(
                guest, take_over, on_failed, times, kept=True, clock_now=restore.clock_now
            )
            undo.pop_all()

    def start(self) -> None:
        """Begin to load the guest."""
        if self._lazy is None:
            self._receiver.start()
        self._thread.start()

    def checked(self) -> bool:
        """Return whether all of RAM was checked, which is hurried from now on.

        Raises:
            StreamError: RAM is wrong.
        """
        return self._lazy is None or self._lazy.hurry()

    def close(self) -> None:
        """Load no further, and check no further what was loaded."""
        super().close()
        if self._lazy is not None:
            self._lazy.close()
            self._snapshot.close()

    def _run(self) -> None:
        try:
            running = self._load()
        except StreamError as error:
            raise named(self._snapshot.path, error) from error
        self.phase("commit")
        try:
            self._take_over(self, running)
        finally:
            if self._lazy is not None:
                self._lazy.begin()  # no sooner: it would take its time from the guest's start

    def _load(self) -> bool:
        """Load the guest, and return True for a guest that ran when saved."""
        machine, snapshot = self._guest.machine, self._snapshot
        snapshot.look(machine.config.machine.name, machine.memory.size)
        hello = saved.decode(snapshot.index.hello, messages.Hello)
        check(hello, machine, kept=True, copied=self._copied)
        adopt(hello, machine)
        self._check_closing()
        if self._lazy is not None:
            self._lazy.map()
        else:
            self._receiver.expect_pages(self._used())
            snapshot.read_ram(machine.memory, self._check_closing)
        self._receiver.load(snapshot.index.state)
        if self._lazy is not None:
            self._lazy.start()
        return snapshot.index.running

    def _used(self) -> list[Run]:
        memory = self._guest.machine.memory
        return [
            (memory.address_of(chunk.number * CHUNK), CHUNK // PAGE)
            for chunk in self._snapshot.used
        ]

    def _check_closing(self) -> None:
        if self._closing.is_set():
            raise LinkLost(f"'{self._snapshot.path}' is read no further")

    def _interrupt(self) -> None:
        """Do nothing, as the reading thread looks for the end between chunks."""

    def _finish(self) -> None:
        if self._lazy is None:
            self._snapshot.close()
