"""A virtio-net device and a guest that reaches it as Linux does: by ports and by its BAR alone."""

from __future__ import annotations

import os

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.net.device import NetState, VirtioNet
from godwit.hw.virtio.pci import VirtioPci, VirtioState
from tests.fakes.backend import FEATURES, FakeBackend
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from tests.fakes.tap import FakeTap

MAC = bytes.fromhex("525400123456")
BAR = 0xE000_0000
SLOT = 1
ALL = (1 << 64) - 1
ACK, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
MESSAGE = 0xFEE0_0000
F_EVENT_IDX = 1 << 29
F_ANNOUNCE = 1 << 21
F_VERSION_1 = 1 << 32


class Bench:
    """The machine's side: everything but KVM, vCPUs and a tap."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        announce: bool = True,
        mtu: int | None = None,
        queue_size: int = 256,
        resume: bool = True,
        features: int = FEATURES,
    ) -> None:
        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio, self.bus = board.ports, board.mmio, board.bus
        self.tap = FakeTap()
        self.backend = FakeBackend(features)
        self.net = VirtioNet(
            "nic0",
            MAC,
            self.tap,
            memory,
            self.loop,
            lambda device: self.backend,
            mtu=mtu,
            queue_size=queue_size,
            guest_announce=announce,
        )
        self.acks = 0
        self.net.on_ack = self._acked
        self.pci = VirtioPci(self.net, board.slot(SLOT))
        self.guest = Guest(self)
        if resume:
            self.pci.resume()

    @property
    def errors(self) -> list[str]:
        """The guest errors."""
        return [message for _, message in self.board.errors]

    def _acked(self) -> None:
        self.acks += 1

    def close(self) -> None:
        self.pci.pause()
        self.pci.close()
        self.board.close()

    def serve(self) -> None:
        """Let the event loop do what is due."""
        self.loop.run_once(0)

    def save(self) -> VirtioState[NetState]:
        self.pci.pause()
        return self.pci.save()

    def load(self, state: VirtioState[NetState]) -> None:
        self.pci.load(state)


class Guest:
    """Accesses as a guest makes them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.base = BAR
        self.capabilities: dict[int, tuple[int, int, int]] = {}  # cfg_type: at, offset, length
        self.msix_at = 0
        self.queues: list[Driver] = []

    # --- configuration space ----------------------------------------------------------------------
    def read_config(self, offset: int, size: int = 4, slot: int = SLOT) -> int:
        self.bench.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        return self.bench.ports.read(0xCFC + (offset & 3), size)

    def write_config(self, offset: int, size: int, value: int, slot: int = SLOT) -> None:
        self.bench.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        self.bench.ports.write(0xCFC + (offset & 3), size, value)

    def walk(self) -> list[tuple[int, int]]:
        """(id, offset) of each capability, as found by the list."""
        found: list[tuple[int, int]] = []
        at = self.read_config(0x34, 1) & 0xFC
        while at:
            kind = self.read_config(at, 1)
            found.append((kind, at))
            if kind == 9:
                self.capabilities[self.read_config(at + 3, 1)] = (
                    at,
                    self.read_config(at + 8),
                    self.read_config(at + 12),
                )
            elif kind == 0x11:
                self.msix_at = at
            at = self.read_config(at + 1, 1) & 0xFC
        return found

    # --- the BAR ----------------------------------------------------------------------------------
    def read(self, offset: int, size: int) -> int:
        return self.bench.mmio.read(self.base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.bench.mmio.write(self.base + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(0x14, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write(0x14, 1, value)

    def offered(self) -> int:
        self.write(0, 4, 0)
        low = self.read(4, 4)
        self.write(0, 4, 1)
        return low | self.read(4, 4) << 32

    def accept(self, features: int) -> bool:
        """Write the features, and whether the device took them."""
        for select in (0, 1):
            self.write(8, 4, select)
            self.write(0xC, 4, features >> 32 * select & 0xFFFFFFFF)
        self.status = self.status | FEATURES_OK
        return bool(self.status & FEATURES_OK)

    def device_config(self) -> bytes:
        return bytes(self.read(0x800 + i, 1) for i in range(12))

    def net_status(self) -> int:
        return self.read(0x806, 2)

    # --- the driver -------------------------------------------------------------------------------
    def probe(self, features: int = ALL, size: int = 64, *, vectors: bool = True) -> None:
        """From reset to DRIVER_OK."""
        self.walk()
        self.write_config(4, 2, 6)
        self.status = 0
        self.status = ACK
        self.status = ACK | DRIVER
        negotiated = self.offered() & features
        assert self.accept(negotiated)
        if vectors:
            self.enable_msix()
            self.write(0x10, 2, 0)
        self.set_up_queues(bool(negotiated & F_EVENT_IDX), size, vectors)
        self.status = self.status | DRIVER_OK

    def enable_msix(self) -> None:
        for vector in range(4):
            at = 0x1000 + 16 * vector
            self.write(at, 4, MESSAGE)
            self.write(at + 4, 4, 0)
            self.write(at + 8, 4, 0x40 + vector)
            self.write(at + 12, 4, 0)
        self.write_config(self.msix_at + 2, 2, 1 << 15)

    def set_up_queues(self, event_idx: bool, size: int, vectors: bool) -> None:
        self.queues = []
        for index in range(self.read(0x12, 2)):
            self.write(0x16, 2, index)
            entries = min(size, self.read(0x18, 2))
            self.write(0x18, 2, entries)
            base = 0x10_0000 * (index + 1)
            driver = Driver(
                self.bench.memory, entries, base, event_idx=event_idx, capacity=0x8_0000
            )
            self.queues.append(driver)
            for at, address in ((0x20, driver.desc), (0x28, driver.avail), (0x30, driver.used)):
                self.write(at, 4, address & 0xFFFFFFFF)
                self.write(at + 4, 4, address >> 32)
            if vectors:
                self.write(0x1A, 2, index + 1)
                assert self.read(0x1A, 2) == index + 1
            self.write(0x1C, 2, 1)

    def kick(self, index: int, size: int = 2) -> None:
        """Notify; with the width that has an ioeventfd, the kernel does the rest."""
        address = self.base + 0x2000 + 4 * index
        fd = self.bench.vm.ioeventfds.get((address, size))
        if fd is None:
            self.bench.mmio.write(address, size, index)
        else:
            os.eventfd_write(fd, 1)

    def interrupts(self, vector: int) -> int:
        """Interrupts of a vector that KVM would have delivered since the last call."""
        fd = self.bench.pci.msix.fds[vector]
        assert fd in self.bench.vm.irqfds, "this vector has no irqfd now"
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def command(self, kind: int, command: int, *data: bytes) -> int:
        """A request on the control queue, sent and waited for as Linux does; the answer's byte."""
        driver = self.queues[2]
        parts = [Part(driver.place(piece), len(piece)) for piece in (bytes((kind, command)), *data)]
        answer = driver.place(b"\xee")
        head = driver.add([*parts, Part(answer, 1, True)])
        if driver.must_kick():
            self.kick(2)
        self.bench.serve()
        assert driver.take() == (head, 1), "the request was not answered"
        return self.bench.memory.read(answer, 1)[0]
