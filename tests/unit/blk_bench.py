"""A virtio-blk device on a file, and a guest that reaches it by ports and by its BAR alone."""

from __future__ import annotations

import errno
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from struct import pack
from typing import Any, cast

from godwit.host.image import Image
from godwit.host.iovec import Vector
from godwit.hw.capabilities import IoError
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.blk.device import VirtioBlk
from godwit.hw.virtio.pci import VirtioPci
from godwit.spec.config import DiskConfig
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from virtio_bench import SLOT, Guest

PATIENCE = 10.0


def make_image(path: Path, size: int = 1 << 20) -> Path:
    """Make an image whose sectors begin with their numbers."""
    path.write_bytes(
        b"".join(pack("<Q", number).ljust(512, b"\0") for number in range(size // 512))
    )
    return path


class Disk:
    """A disk in a slot, resumed, and its guest, which has probed it."""

    def __init__(
        self,
        memory: GuestMemory,
        config: DiskConfig,
        image: Image | None = None,
        probe: bool = True,
    ) -> None:
        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio, self.bus = board.ports, board.mmio, board.bus
        self.image = image or Image(
            config.path, readonly=config.readonly, direct=config.cache == "none"
        )
        self.blk = VirtioBlk(config, memory, self.image)
        self.io_errors: list[IoError] = []
        self.blk.on_io_error = self.io_errors.append
        self.pci = VirtioPci(self.blk, board.slot(SLOT))
        self.guest = Guest(cast(Any, self))
        self.pci.resume()
        if probe:
            self.guest.probe()

    @property
    def errors(self) -> list[str]:
        """The guest errors."""
        return [message for _, message in self.board.errors]

    @property
    def driver(self) -> Driver:
        return self.guest.queues[0]

    def add(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0) -> tuple[Part, Part]:
        """Add a request, and return where its data and its status will be."""
        driver = self.driver
        header = Part(driver.place(pack("<IIQ", kind, 0, sector)), 16)
        data = Part(driver.place(out or into), len(out) or into, not out)
        status = Part(driver.place(b"\xee"), 1, True)
        driver.add([header, *([data] if data.length else []), status])
        return data, status

    def kick(self) -> None:
        self.guest.kick(0)

    def take(self) -> tuple[int, int]:
        """Wait for the next used buffer, and take it."""
        fd = self.pci.msix.fds[1]
        while (used := self.driver.take()) is None:
            assert select.select([fd], [], [], PATIENCE)[0], "no interrupt came"
            self.guest.interrupts(1)
        return used

    def request(
        self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0
    ) -> tuple[int, bytes]:
        """Make a request, and return its status and its data."""
        data, status = self.add(kind, sector, out, into)
        self.kick()
        self.take()
        return self.memory.read(status.address, 1)[0], self.memory.read(data.address, into)

    def pause(self) -> None:
        self.pci.pause()
        assert self.pci.paused(PATIENCE)

    def close(self) -> None:
        self.pause()
        self.pci.close()
        self.board.close()


@contextmanager
def disks(memory: GuestMemory, path: Path) -> Iterator[Callable[..., Disk]]:
    """What makes disks of an image, which are closed at the end."""
    with ExitStack() as stack:

        def make(image: Image | None = None, **given: Any) -> Disk:
            disk = Disk(memory, DiskConfig("disk0", str(path), **given), image)
            stack.callback(disk.close)
            return disk

        yield make


class Gate(Image):
    """An image whose transfers wait until they are let through, or fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.in_memory = False  # wherever the test runs
        self.open = threading.Event()
        self.waiting = threading.Semaphore(0)
        self.error: OSError | None = None

    def read(self, at: int, into: Vector, flags: int = 0) -> None:
        if flags:
            raise BlockingIOError(errno.EAGAIN, "it would wait")
        self.waiting.release()
        assert self.open.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        super().read(at, into)

    def write(self, at: int, data: Vector) -> None:
        if self.error is not None:
            raise self.error
        super().write(at, data)
