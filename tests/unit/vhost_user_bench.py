"""A device behind vhost-user, the back end that serves it, and its guest."""

from __future__ import annotations

import time
from collections.abc import Callable
from struct import pack
from typing import Any, cast

from godwit.host.vhost_user import BackEnd
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.vhost_user.device import VirtioVhostUser
from godwit.spec.back_ends import VhostUserConfig
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from tests.fakes.vhost_user import FakeBackEnd
from virtio_bench import SLOT, Guest

PATIENCE = 20.0
BLK = VhostUserConfig("disk0", "vhost-user-blk", "/disk")


class Bench:
    """A disk of a fake back end in a slot, and its guest."""

    def __init__(
        self,
        memory: GuestMemory,
        back_end: FakeBackEnd | None = None,
        config: VhostUserConfig = BLK,
        reply_s: float = PATIENCE,
        cpus: int = 1,
    ) -> None:
        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio, self.bus = board.ports, board.mmio, board.bus
        self.back_end = back_end or FakeBackEnd()
        self.reply_s = reply_s
        self.changes: list[str | None] = []
        self.device = VirtioVhostUser(config, memory, board.loop, self.connect, cpus=cpus)
        self.device.on_back_end = self.changes.append
        self.requests_lost = 0
        self.device.on_requests_lost = self.lose_requests
        self.pci = VirtioPci(self.device, board.slot(SLOT))
        self.guest = Guest(cast(Any, self))
        self.pci.resume()

    def connect(self, _: VhostUserConfig) -> BackEnd:
        return BackEnd(self.back_end.connect(), self.reply_s)

    def lose_requests(self) -> None:
        self.requests_lost += 1

    @property
    def errors(self) -> list[str]:
        return [message for _, message in self.board.errors]

    @property
    def driver(self) -> Driver:
        return self.guest.queues[0]

    def add(self, sector: int) -> int:
        driver = self.driver
        header, data = Part(driver.place(pack("<IIQ", 0, 0, sector)), 16), driver.place(513)
        driver.add([header, Part(data, 513, True)])
        self.guest.kick(0)
        return data

    def used(self, count: int = 1) -> None:
        for _ in range(count):
            self.until(lambda: self.driver.take() is not None)

    def reads(self, sector: int = 3) -> bool:
        data = self.add(sector)
        self.used()
        return self.memory.read(data, 9) == pack("<QB", sector, 0)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, "it does not come"
            self.loop.run_once(0.005)

    def lost(self) -> None:
        self.until(lambda: len(self.changes) > 0 and self.changes[-1] is not None)

    def back(self) -> None:
        self.until(lambda: len(self.changes) > 0 and self.changes[-1] is None)

    def pause(self) -> None:
        self.pci.pause()
        assert self.pci.paused(PATIENCE)

    def close(self) -> None:
        self.back_end.hold = False
        self.pause()
        self.pci.close()
        self.back_end.kill()
        self.board.close()
