"""The sync of a guest's disks while the guest still runs, so that less is left for the stop."""

from __future__ import annotations

import threading

from godwit.hw.capabilities import OwnsHostState
from godwit.hw.devices import Devices

from .times import Times


class Syncing:
    """A thread that syncs all parts that own state of the host, again and again."""

    def __init__(self, devices: Devices, times: Times) -> None:
        self._devices = devices
        self._pause = times.look
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to sync the parts again and again, if there is one."""
        if self._devices.having(OwnsHostState):
            threading.Thread(target=self._main, name="syncing", daemon=True).start()

    def end(self) -> None:
        """End the thread, whose sync under way ends by itself."""
        self._ended.set()

    def once(self) -> None:
        """Sync each of the parts now."""
        for part in self._devices.having(OwnsHostState):
            part.sync()

    def _main(self) -> None:
        while not self._ended.is_set():
            self.once()
            self._ended.wait(self._pause)
