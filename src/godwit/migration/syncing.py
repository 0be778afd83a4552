"""The sync of a guest's disks while the guest still runs, so that less is left for the stop."""

from __future__ import annotations

import threading
from collections.abc import Callable

from godwit.hw.capabilities import OwnsHostState
from godwit.hw.devices import Devices

from .times import Times


class Syncing:
    """A thread that syncs all parts that own state of the host, again and again."""

    def __init__(self, devices: Devices, times: Times) -> None:
        self._devices = devices
        self._pause = times.look
        self._ended = threading.Event()
        self._last: threading.Event | None = None
        self._problem: Exception | None = None

    def start(self) -> None:
        """Begin to sync the parts again and again, if there is one."""
        if self._devices.having(OwnsHostState):
            threading.Thread(target=self._main, name="syncing", daemon=True).start()

    def end(self) -> None:
        """End the thread, whose sync under way ends by itself."""
        self._ended.set()

    def begin_last(self) -> None:
        """Begin to sync each of the parts once more, in a thread, as storage may hang."""
        if self._devices.having(OwnsHostState):
            self._last = threading.Event()
            threading.Thread(target=self._sync_last, name="last-sync", daemon=True).start()

    def await_last(self, check: Callable[[], None]) -> None:
        """Wait for the last sync, and call ``check`` now and then, which may raise.

        A sync that nobody waits for any more harms nobody: all is left where it was.
        """
        if self._last is None:
            return
        while not self._last.wait(self._pause):
            check()
        if self._problem is not None:
            raise self._problem

    def _sync_last(self) -> None:
        assert self._last is not None
        try:
            self._once()
        except Exception as problem:
            self._problem = problem
        finally:
            self._last.set()

    def _once(self) -> None:
        for part in self._devices.having(OwnsHostState):
            part.sync()

    def _main(self) -> None:
        while not self._ended.is_set():
            self._once()
            self._ended.wait(self._pause)
