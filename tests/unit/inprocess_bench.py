"""The in-process backend between a guest's two rings and a network, for its tests."""

import os
import threading
from collections.abc import Callable, Sequence

from godwit.host.loop import Loop
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.virtio.chain import Chain
from godwit.hw.virtio.net.backend import Ring
from godwit.hw.virtio.net.userspace import UserspaceBackend
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue
from tests.fakes.driver import Driver, Part
from tests.fakes.tap import FakeTap

MERGE = 1 << 15
ALL = MERGE | F_EVENT_IDX | F_INDIRECT_DESC
HEADER = 12


class Bench:
    """The backend between a guest's two rings and a network."""

    def __init__(self, memory: GuestMemory, features: int = ALL, size: int = 16) -> None:
        self.memory = memory
        self.loop = Loop()
        self.tap = FakeTap()
        self.errors: list[str] = []
        self.refused: set[bytes] = set()
        self.outgoing: Callable[[Chain], Sequence[bytes | memoryview]] = lambda c: c.readable
        lock = threading.RLock()
        self.backlog = RxBacklog(self.tap, lock)
        self.backend = UserspaceBackend(
            self.tap,
            self.backlog,
            self.loop,
            lock,
            self._accepts,
            self._guest_error,
            lambda chain: self.outgoing(chain),
        )
        event_idx = bool(features & F_EVENT_IDX)
        self.drivers = [
            Driver(memory, size, 0x10_0000 * (i + 1), event_idx=event_idx, capacity=0x8_0000)
            for i in range(2)
        ]
        self.rx, self.tx = self.drivers
        self.features = features
        self.queues = [Virtqueue(memory, 256) for _ in range(2)]
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        for driver, queue in zip(self.drivers, self.queues, strict=True):
            driver.set_up(queue, features)
        self.start()

    def start(self) -> None:
        rings = [
            Ring(q, k, c) for q, k, c in zip(self.queues, self.kicks, self.calls, strict=False)
        ]
        self.backend.start(self.features, rings[0], rings[1])

    def _accepts(self, frame: memoryview) -> bool:
        return bytes(frame[:6]) not in self.refused

    def _guest_error(self, message: str) -> None:
        self.errors.append(message)
        self.backend.stop()

    def close(self) -> None:
        self.backend.close()
        self.tap.close()
        for fd in self.kicks + self.calls:
            os.close(fd)
        self.loop.close()

    def serve(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)

    def kick(self, index: int) -> bool:
        wanted = self.drivers[index].must_kick()
        if wanted:
            os.eventfd_write(self.kicks[index], 1)
        return wanted

    def interrupts(self, index: int) -> int:
        try:
            return os.eventfd_read(self.calls[index])
        except BlockingIOError:
            return 0

    def offer(self, *lengths: int) -> list[list[Part]]:
        """Receive buffers of these lengths, one descriptor each, announced."""
        parts = [self.rx.add_in(length) for length in lengths]
        self.kick(0)
        self.serve()
        return parts

    def received(self, buffers: list[list[Part]]) -> list[bytes]:
        """What the used buffers hold, in order; ``buffers`` in the order they were offered."""
        frames = []
        for (_, length), parts in zip(self.rx.take_all(), buffers, strict=False):
            data = b"".join(self.memory.read(part.address, part.length) for part in parts)
            frames.append(data[:length])
        return frames


def make_frame(number: int, size: int = 60) -> bytes:
    return (b"\xff" * 12 + number.to_bytes(4, "little")).ljust(size, bytes((number & 0xFF,)))
