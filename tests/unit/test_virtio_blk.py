"""virtio-blk: requests, errors, pauses and resets, as a guest meets them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack, unpack_from
from typing import Any

import pytest
from msgspec.structs import replace

from blk_bench import PATIENCE, Disk, Gate, disks, make_image
from godwit.errors import HostError, StreamError
from godwit.host import iovec
from godwit.host.iovec import Vector
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.blk.device import F_DISCARD, F_MQ, F_RO, F_WRITE_ZEROES, Retry
from godwit.hw.virtio.blk.request import DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES
from godwit.spec import saved
from godwit.spec.config import DiskConfig, OnError
from tests.fakes.driver import Part

OK, IOERR, UNSUPPORTED = 0, 1, 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.raw")


@pytest.fixture
def disk(memory: GuestMemory, path: Path) -> Iterator[Callable[..., Disk]]:
    with disks(memory, path) as make:
        yield make


# --- what the guest sees --------------------------------------------------------------------------
def test_the_configuration_is_the_specifications(disk: Callable[..., Disk]) -> None:
    one = disk(queues=2, queue_size=128, discard=True)
    config = one.blk.config()
    assert len(config) == 60
    assert unpack_from("<Q", config)[0] == 2048
    assert unpack_from("<I", config, 12)[0] == 126, "seg_max"
    assert unpack_from("<I", config, 20)[0] == 512, "blk_size"
    assert unpack_from("<BxH", config, 32) == (1, 2), "writeback, num_queues"
    assert unpack_from("<III", config, 36) == (1 << 22, 16, 1), "discard"
    assert unpack_from("<IIB", config, 48) == (131072, 16, 1), "write zeroes"
    assert (
        one.blk.offered & (F_MQ | F_DISCARD | F_WRITE_ZEROES) == F_MQ | F_DISCARD | F_WRITE_ZEROES
    )
    assert not one.blk.offered & F_RO
    assert one.guest.read(0x800, 4) == 2048
    one.guest.write(0x800, 4, 1)
    assert one.guest.read(0x800, 4) == 2048, "nothing of it is the guest's to write"


def test_data_is_read_and_written(disk: Callable[..., Disk], path: Path) -> None:
    one = disk()
    status, data = one.request(IN, 5, into=1024)
    assert status == OK
    assert (data[:8], data[512:520]) == (pack("<Q", 5), pack("<Q", 6))
    new = os.urandom(4096)
    assert one.request(OUT, 8, out=new)[0] == OK
    assert one.request(FLUSH)[0] == OK
    assert path.read_bytes()[4096:8192] == new
    assert one.request(IN, 8, into=4096) == (OK, new)
    assert one.blk.counters() == {
        "reads": 2,
        "read-bytes": 5120,
        "writes": 1,
        "written-bytes": 4096,
        "flushes": 1,
        "errors": 0,
    }


def test_identity_zeroes_and_discard(disk: Callable[..., Disk], path: Path) -> None:
    one = disk(serial="disk-1", discard=True)
    assert one.request(GET_ID, into=20) == (OK, b"disk-1".ljust(20, b"\0"))
    assert one.request(WRITE_ZEROES, out=pack("<QIIQII", 1, 2, 0, 5, 1, 1))[0] == OK
    assert one.request(DISCARD, out=pack("<QII", 128, 256, 0))[0] == OK
    data = path.read_bytes()
    assert data[512:1536] == bytes(1024)
    assert data[1536:1544] == pack("<Q", 3)
    assert data[2560:3072] == bytes(512)
    assert data[128 * 512 : 384 * 512] == bytes(256 * 512)


@pytest.mark.parametrize(
    ("kind", "sector", "given", "status"),
    [
        (IN, 2047, {"into": 1024}, IOERR),
        (IN, 1 << 63, {"into": 512}, IOERR),
        (IN, (1 << 64) - 1, {"into": 512}, IOERR),
        (IN, 0, {"into": 100}, IOERR),
        (IN, 0, {}, IOERR),
        (OUT, 2048, {"out": bytes(512)}, IOERR),
        (OUT, 0, {"out": bytes(511)}, IOERR),
        (99, 0, {"into": 512}, UNSUPPORTED),
        (DISCARD, 0, {"out": pack("<QII", 0, 1, 0)}, UNSUPPORTED),
        (WRITE_ZEROES, 0, {"out": pack("<QII", 2047, 2, 0)}, IOERR),
        (WRITE_ZEROES, 0, {"out": pack("<QII", (1 << 64) - 1, 2, 0)}, IOERR),
        (WRITE_ZEROES, 0, {"out": pack("<QII", 0, 1, 2)}, UNSUPPORTED),
        (WRITE_ZEROES, 0, {"out": bytes(15)}, IOERR),
        (WRITE_ZEROES, 0, {"out": pack("<QII", 0, 1, 0) * 17}, IOERR),
    ],
)
def test_what_is_no_request_of_this_disk_fails(
    disk: Callable[..., Disk], path: Path, kind: int, sector: int, given: Any, status: int
) -> None:
    before = path.read_bytes()
    one = disk()
    assert one.request(kind, sector, **given)[0] == status
    assert path.read_bytes() == before
    assert one.errors == []
    assert one.io_errors == [], "the host is not to blame"
    assert one.request(IN, 0, into=512)[0] == OK


def test_a_disk_that_is_only_read_is_not_written(disk: Callable[..., Disk], path: Path) -> None:
    before = path.read_bytes()
    one = disk(readonly=True)
    assert one.blk.offered & (F_RO | F_WRITE_ZEROES) == F_RO
    for kind, out in ((OUT, bytes(512)), (WRITE_ZEROES, pack("<QII", 0, 1, 0))):
        assert one.request(kind, 0, out=out)[0] == IOERR
    assert one.request(FLUSH)[0] == OK
    assert one.request(IN, 1, into=512)[1][:8] == pack("<Q", 1)
    assert path.read_bytes() == before


def test_a_disk_that_is_written_may_not_be_twice(disk: Callable[..., Disk], path: Path) -> None:
    assert str(path) in (disk().blk.why_no_copy() or "")
    assert disk(readonly=True).blk.why_no_copy() is None


def test_header_and_status_may_be_anywhere_in_the_pieces(disk: Callable[..., Disk]) -> None:
    one = disk()
    driver = one.driver
    header = pack("<IIQ", IN, 0, 3)
    parts = [Part(driver.place(piece), len(piece)) for piece in (header[:3], header[3:])]
    at = driver.place(513)
    driver.add([*parts, Part(at, 100, True), Part(at + 100, 413, True)], indirect=True)
    one.kick()
    assert one.take()[1] == 513
    data = one.memory.read(at, 513)
    assert data[:8] == pack("<Q", 3)
    assert data[512] == OK


@pytest.mark.parametrize(
    ("parts", "says"),
    [([Part(0x1000, 15)], "header of 15 bytes"), ([Part(0x1000, 16)], "space for its status")],
)
def test_what_is_no_request_at_all_stops_the_device(
    disk: Callable[..., Disk], parts: list[Part], says: str
) -> None:
    one = disk()
    one.driver.add(parts)
    one.kick()
    assert one.pci.paused(PATIENCE)
    _wait(lambda: bool(one.errors))
    assert says in one.errors[0]
    one.guest.probe()
    assert one.request(IN, 0, into=512)[0] == OK


def test_pages_that_are_written_are_marked(disk: Callable[..., Disk], memory: GuestMemory) -> None:
    one = disk()
    data, status = one.add(IN, 0, into=8192)
    memory.start_log()
    try:
        one.kick()
        one.take()
        marked = memory.take_log()
    finally:
        memory.stop_log()
    pages = set(range(data.address >> 12, (data.address + 8191 >> 12) + 1))
    assert pages | {status.address >> 12} <= marked


@pytest.mark.parametrize(
    ("kind", "sector", "marks_data"),
    [(IN, 0, False), (IN, 1 << 40, True), (9, 0, False), (FLUSH, 0, False), (GET_ID, 0, True)],
)
def test_a_request_marks_no_more_than_may_be_written(
    disk: Callable[..., Disk], memory: GuestMemory, kind: int, sector: int, marks_data: bool
) -> None:
    """The driver says how large its memory is: a request marks what the disk may have written."""
    one = disk()
    driver, pages = one.driver, 16 << 20 >> 12
    # 16 MiB at a time, over and over: of a read, it is too long if that is wanted.
    parts = 2 if marks_data else 8
    status = driver.place(b"\xee")
    data = [Part(0, 16 << 20, True) for _ in range(parts)]
    header = Part(driver.place(pack("<IIQ", kind, 0, sector)), 16)
    memory.start_log()
    marked = memory.mark_dirty
    sizes: list[int] = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "mark_dirty", lambda at, n: (sizes.append(n), marked(at, n)))
            driver.add([header, *data, Part(status, 1, True)], indirect=True)
            one.kick()
            one.take()
        log = memory.take_log()
    finally:
        memory.stop_log()
    assert status >> 12 in log
    if marks_data and kind == IN:
        assert len(log) >= pages  # a read that failed may have written some
    else:
        assert sum(sizes) < 4096, "nothing but the status and the ring was written"


def test_too_many_pieces_are_the_guests_error(disk: Callable[..., Disk]) -> None:
    one = disk(on_error=OnError.STOP, queue_size=256)
    data = [Part(one.driver.place(bytes(512)), 512) for _ in range(1100)]
    assert len(data) > iovec.MOST_PIECES
    vector = Vector(iovec.ENTRY.pack(0, 1) * len(data), 512 * len(data))
    assert not one.blk._doer._inside(0, vector)


# --- errors of the host ---------------------------------------------------------------------------
def test_an_error_is_reported_to_the_guest(disk: Callable[..., Disk], path: Path) -> None:
    gate = Gate(path)
    gate.open.set()
    gate.error = OSError(errno.EIO, "Input/output error")
    one = disk(gate)
    assert one.request(IN, 0, into=512)[0] == IOERR
    assert one.request(OUT, 0, out=bytes(512))[0] == IOERR
    assert [(e.operation, e.action, e.nospace) for e in one.io_errors] == [
        ("read", "report", False),
        ("write", "report", False),
    ]
    gate.error = None
    assert one.request(IN, 0, into=512)[0] == OK


@pytest.mark.parametrize(
    ("on_error", "number", "stops"),
    [
        (OnError.ENOSPC, errno.ENOSPC, True),
        (OnError.ENOSPC, errno.EIO, False),
        (OnError.STOP, errno.EIO, True),
        (OnError.REPORT, errno.ENOSPC, False),
    ],
)
def test_a_full_disk_stops_the_vm_and_is_tried_again(
    disk: Callable[..., Disk], path: Path, on_error: OnError, number: int, stops: bool
) -> None:
    gate = Gate(path)
    gate.error = OSError(number, os.strerror(number))
    one = disk(gate, on_error=on_error)
    data = os.urandom(512)
    _, status = one.add(OUT, 9, out=data)
    one.kick()
    _wait(lambda: bool(one.io_errors))
    (error,) = one.io_errors
    assert error.action == ("stop" if stops else "report")
    assert error.nospace == (number == errno.ENOSPC)
    one.pause()
    if not stops:
        assert one.memory.read(status.address, 1)[0] == IOERR
        return
    assert one.driver.take() is None
    gate.error = None
    one.pci.resume()
    one.take()
    assert one.memory.read(status.address, 1)[0] == OK
    assert path.read_bytes()[9 * 512 : 10 * 512] == data


@pytest.mark.parametrize("on_error", list(OnError))
def test_a_flush_that_fails_never_stops_the_vm(
    disk: Callable[..., Disk], path: Path, monkeypatch: pytest.MonkeyPatch, on_error: OnError
) -> None:
    one = disk(on_error=on_error)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        assert one.request(FLUSH)[0] == IOERR
    assert one.request(FLUSH)[0] == IOERR, "for good: what was lost is lost"
    assert [(e.operation, e.action, e.nospace) for e in one.io_errors] == [
        ("write", "report", True)
    ] * 2
    assert one.request(OUT, 0, out=bytes(512))[0] == OK


WITHOUT_FLUSH = 1 << 32


@pytest.mark.parametrize(
    ("kind", "out"),
    [
        (OUT, bytes(512)),
        (WRITE_ZEROES, pack("<QII", 1, 1, 0)),
        (DISCARD, pack("<QII", 128, 256, 0)),
    ],
)
def test_what_a_driver_writes_that_cannot_flush_is_flushed(
    disk: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch, kind: int, out: bytes
) -> None:
    one = disk(discard=True)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    assert one.request(kind, 1, out=out)[0] == OK
    assert not synced
    one.guest.probe(WITHOUT_FLUSH)
    assert one.request(kind, 1, out=out)[0] == OK
    assert len(synced) == 1
    one.request(IN, 1, into=512)
    assert len(synced) == 1
    one.guest.probe()
    assert one.request(kind, 1, out=out)[0] == OK
    assert len(synced) == 1


def test_a_write_whose_flush_fails_is_reported(
    disk: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = disk(on_error=OnError.STOP)
    one.guest.probe(WITHOUT_FLUSH)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert one.request(OUT, 1, out=bytes(512))[0] == IOERR
    assert [(e.operation, e.action) for e in one.io_errors] == [("write", "report")]


def test_what_is_to_be_tried_again_migrates(
    disk: Callable[..., Disk], path: Path, memory: GuestMemory
) -> None:
    gate = Gate(path)
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    one, other = disk(gate), Disk(memory, DiskConfig("disk0", str(path)), probe=False)
    _, status = one.add(OUT, 9, out=b"\x77" * 512)
    one.kick()
    _wait(lambda: bool(one.io_errors))
    one.pause()
    state = saved.decode(saved.encode(one.pci.save()), one.pci.State)
    assert state.device.retries == [Retry(0, 0)]
    other.pause()
    other.pci.load(state)
    other.pci.resume()
    _wait(lambda: memory.read(status.address, 1)[0] == OK)
    assert path.read_bytes()[9 * 512 : 10 * 512] == b"\x77" * 512
    other.close()


def test_a_hostile_retry_is_refused(disk: Callable[..., Disk]) -> None:
    one = disk()
    one.pause()
    state = one.pci.save()
    for retries in ([Retry(1, 0)], [Retry(0, 64)], [Retry(0, 0)] * 65):
        with pytest.raises(StreamError, match="retries"):
            one.pci.load(replace(state, device=replace(state.device, retries=retries)))


# --- what one VM alone may have -------------------------------------------------------------------
def test_the_lock_goes_over(disk: Callable[..., Disk], path: Path, memory: GuestMemory) -> None:
    one, other = disk(), Disk(memory, DiskConfig("disk0", str(path)), probe=False)
    one.blk.acquire()
    with pytest.raises(HostError, match="another process uses it"):
        other.blk.acquire()
    one.blk.sync()
    one.blk.release()
    other.blk.acquire()
    with pytest.raises(HostError, match="another process uses it"):
        one.blk.acquire()
    other.close()
    one.blk.acquire()


def test_a_release_after_a_sync_waits_for_no_disk(
    disk: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = disk()
    one.blk.acquire()
    assert one.request(OUT, 0, out=bytes(512))[0] == OK
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    one.blk.sync()
    assert len(synced) == 1
    one.blk.release()
    assert len(synced) == 1
    one.blk.acquire()
    one.blk.release()
    assert len(synced) == 2, "without a sync before, it flushes itself"


def test_the_image_is_known_by_its_file(
    disk: Callable[..., Disk], path: Path, tmp_path: Path
) -> None:
    one, status = disk(), path.stat()
    assert one.blk.is_file(status.st_dev, status.st_ino)
    other = make_image(tmp_path / "other.raw").stat()
    assert not one.blk.is_file(other.st_dev, other.st_ino)


def test_a_disk_that_cannot_be_flushed_is_not_given_up(
    disk: Callable[..., Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = disk()
    one.blk.acquire()

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(one.image, "flush", fail)
    one.blk.sync()
    with pytest.raises(HostError, match="cannot be flushed: Input/output error"):
        one.blk.release()


def test_a_disk_written_after_the_guest_was_saved_is_refused(
    disk: Callable[..., Disk], path: Path, memory: GuestMemory, tmp_path: Path
) -> None:
    one = disk()
    one.pause()
    state = one.pci.save()
    one.pci.load(state)
    one.blk.check_kept()
    copy = make_image(tmp_path / "copy.raw")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 4_000_000))
    one.pci.load(state)
    with pytest.raises(HostError, match="was written after the guest was saved"):
        one.blk.check_kept()
    other = Disk(memory, DiskConfig("disk0", str(copy)), probe=False)
    other.pause()
    other.pci.load(state)
    other.blk.check_kept()
    other.close()


def test_the_same_file_on_another_host_is_known_again(
    disk: Callable[..., Disk], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = disk()
    one.pause()
    state, fstat = one.pci.save(), os.fstat

    def elsewhere(fd: int) -> os.stat_result:
        found = fstat(fd)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:]), _times(found))

    def _times(found: os.stat_result) -> dict[str, int]:
        return {"st_mtime_ns": found.st_mtime_ns}

    monkeypatch.setattr(os, "fstat", elsewhere)
    one.pci.load(state)
    one.blk.check_kept()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 4_000_000))
    with pytest.raises(HostError, match="was written after the guest was saved"):
        one.blk.check_kept()


def _wait(condition: Callable[[], bool]) -> None:
    """Wait until a worker has done its work."""
    until = threading.Event()
    for _ in range(int(PATIENCE * 1000)):
        if condition():
            return
        until.wait(0.001)
    raise AssertionError("it did not happen")
