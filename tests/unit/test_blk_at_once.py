"""virtio-blk: several requests at once, and who waits for whom."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blk_bench import PATIENCE, Disk, Gate, disks, make_image
from godwit.host.iovec import Vector
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.blk.request import IN, OUT, Guess

OK = 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.raw")


@pytest.fixture
def disk(memory: GuestMemory, path: Path) -> Iterator[Callable[..., Disk]]:
    with disks(memory, path) as make:
        yield make


def test_requests_that_wait_for_the_disk_do_not_wait_for_each_other(
    disk: Callable[..., Disk], path: Path
) -> None:
    gate = Gate(path)
    one = disk(gate)
    for sector in range(8):
        one.add(IN, sector, into=512)
    one.kick()
    for _ in range(8):
        assert gate.waiting.acquire(timeout=PATIENCE), "one waits behind another"
    assert one.request(OUT, 100, out=bytes(512))[0] == OK, "and one that need not wait is done"
    gate.open.set()
    heads = {one.take()[0] for _ in range(8)}
    assert len(heads) == 8


class Untold(Gate):
    """An image in a file system that does not say whether a read would wait, as NFS."""

    def read(self, at: int, into: Vector, flags: int = 0) -> None:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        super().read(at, into)


def test_a_write_that_would_wait_for_another_is_handed_over(
    disk: Callable[..., Disk], path: Path
) -> None:
    one = disk()
    with one.image._writing:  # as one that the kernel holds up
        _, status = one.add(OUT, 3, out=b"\x33" * 512)
        one.kick()
        for sector in range(4):
            one.add(IN, sector, into=512)
            one.kick()
            assert one.take()[0] != 0, "reads go on"
        assert one.memory.read(status.address, 1) != b"\0"
    one.take()
    assert one.memory.read(status.address, 1) == b"\0"
    assert path.read_bytes()[3 * 512 : 4 * 512] == b"\x33" * 512


def test_where_a_file_system_does_not_say_what_waits_time_does(
    disk: Callable[..., Disk], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Untold(path)
    one = disk(image)
    image.open.set()
    took = [0.0]
    clock = itertools.count()
    monkeypatch.setattr(
        "godwit.hw.virtio.blk.request.time.monotonic", lambda: next(clock) * took[0]
    )
    for sector in range(3):
        assert one.request(IN, sector, into=512)[0] == OK
    took[0] = 0.1  # the disk has to be asked now: all wait beside each other
    assert one.request(IN, 0, into=512)[0] == OK
    image.open.clear()
    for _ in range(4):
        assert image.waiting.acquire(timeout=PATIENCE)
    for sector in range(8):
        one.add(IN, sector, into=512)
    one.kick()
    for _ in range(8):
        assert image.waiting.acquire(timeout=PATIENCE), "one waits behind another"
    image.open.set()
    assert len({one.take()[0] for _ in range(8)}) == 8


def test_a_guess_is_made_again_after_some_requests() -> None:
    guess = Guess(0.001, 1e9)
    guess.took(0.002, 1 << 20)
    assert guess.is_quick()
    guess.took(0.002, 4096)
    assert [guess.is_quick() for _ in range(66)] == [False] * 64 + [True] * 2


def test_a_pause_waits_for_what_is_in_flight(disk: Callable[..., Disk], path: Path) -> None:
    gate = Gate(path)
    one = disk(gate)
    one.add(IN, 7, into=512)
    one.kick()
    assert gate.waiting.acquire(timeout=PATIENCE)
    one.pci.pause()
    assert not one.pci.paused(0.01)
    gate.open.set()
    assert one.pci.paused(PATIENCE)
    assert one.driver.take() is not None
    assert one.pci.save().transport.queues[0].last_used == 1


def test_a_reset_waits_for_what_is_in_flight(disk: Callable[..., Disk], path: Path) -> None:
    gate = Gate(path)
    one = disk(gate)
    data, status = one.add(IN, 7, into=512)
    one.kick()
    assert gate.waiting.acquire(timeout=PATIENCE)
    began = threading.Event()

    def reset() -> None:
        began.set()
        one.guest.status = 0

    driver = threading.Thread(target=reset)
    driver.start()
    assert began.wait(PATIENCE)
    # Another vCPU gets at the registers, and changes nothing meanwhile.
    one.guest.write(0x14, 1, 0xF)
    assert driver.is_alive()
    gate.open.set()
    driver.join(PATIENCE)
    assert not driver.is_alive()
    assert one.guest.status == 0
    one.memory.write(data.address, b"\x55" * 512)
    one.guest.probe()
    assert one.request(IN, 1, into=512)[0] == OK
    assert status.length == 1
