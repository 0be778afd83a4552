"""Disk images: sizes, locks, errors, and bytes."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blk_bench import make_image
from godwit.errors import ConfigError, HostError
from godwit.host import image as module
from godwit.host.image import Image
from godwit.host.iovec import Vector

#: What vectors are made of.
_parts: list[bytearray] = []


def _of(data: bytes) -> Vector:
    _parts.append(bytearray(data))
    return Vector.of(_parts[-1:])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.raw")


@pytest.fixture
def opened() -> Iterator[Callable[..., Image]]:
    with ExitStack() as stack:

        def open_image(path: Path, **given: bool) -> Image:
            image = Image(str(path), **given)
            stack.callback(image.close)
            return image

        yield open_image


def test_an_image_that_cannot_be_one_is_refused_in_a_sentence(tmp_path: Path) -> None:
    empty, odd, folder = tmp_path / "empty", tmp_path / "odd", tmp_path / "folder"
    empty.touch()
    odd.write_bytes(bytes(1000))
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        (tmp_path / "absent", "there is no such file; make one with: truncate"),
        (empty, "it is empty; make one with: truncate"),
        (odd, "its 1000 bytes are no multiple of 512; lengthen it with: truncate -s %512"),
        (folder, "Is a directory"),
        (tmp_path / "pipe", "it is no file and no block device"),
        ("a\0b", "embedded null"),
    ):
        with pytest.raises(ConfigError, match=f"disk image '.*': .*{says}"):
            Image(str(name))


def test_what_cannot_be_written_is_refused_with_the_remedy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(ConfigError, match="it cannot be written; give readonly=on"):
        Image(str(path))
    with pytest.raises(ConfigError, match="Read-only file system"):
        Image(str(path), readonly=True)


def test_one_writer_alone_has_an_image(path: Path, opened: Callable[..., Image]) -> None:
    one, other, reader = opened(path), opened(path), opened(path, readonly=True)
    one.lock()
    one.lock()
    with pytest.raises(HostError, match=r"another process uses it; .* readonly=on"):
        other.lock()
    with pytest.raises(HostError, match="another process uses it"):
        reader.lock()
    one.unlock()
    other.lock()
    other.unlock()
    other.unlock()
    one.lock()
    one.close()
    other.lock()


def test_an_image_that_another_wrote_meanwhile_is_not_gone_on_with(
    path: Path, opened: Callable[..., Image]
) -> None:
    mine, third = opened(path), opened(path)
    mine.lock()
    mine.write(0, _of(b"m" * 512))
    mine.unlock()
    third.lock()
    with pytest.raises(HostError, match="another process uses it"):
        mine.lock()
    third.flush()
    third.unlock()  # as a destination that failed, and did not write
    mine.lock()
    mine.unlock()
    before = path.stat().st_mtime_ns
    third.lock()
    third.write(0, _of(b"x" * 512))
    os.utime(path, ns=(0, before + 4_000_000))  # whatever the clock's steps
    third.unlock()
    for _ in range(2):
        with pytest.raises(HostError, match=r"was written by another .* end this VM"):
            mine.lock()
    third.lock()  # nothing is left locked


def test_an_image_whose_file_does_not_show_who_wrote_is_gone_on_with(
    path: Path, opened: Callable[..., Image]
) -> None:
    image, reader = opened(path), opened(path, readonly=True)
    image.is_device = True
    for one in (image, reader):
        one.lock()
        one.unlock()
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 4_000_000))
        one.lock()
        one.unlock()


def test_readers_share_an_image_that_nobody_writes(
    path: Path, opened: Callable[..., Image]
) -> None:
    readers = [opened(path, readonly=True) for _ in range(3)]
    for reader in readers:
        reader.lock()
    writer = opened(path)
    with pytest.raises(HostError):
        writer.lock()
    for reader in readers:
        reader.close()
    writer.lock()


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_qemu_refuses_an_image_in_use_and_is_refused(
    path: Path, opened: Callable[..., Image]
) -> None:
    write = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(path)]
    image = opened(path)
    assert subprocess.run(write, capture_output=True).returncode == 0
    image.lock()
    refused = subprocess.run(write, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    image.unlock()
    held = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        assert holder.stdout.readline()  # it has the image open
        with pytest.raises(HostError, match="another process uses it"):
            image.lock()
        holder.stdin.close()
        holder.wait()
    image.lock()


@pytest.mark.parametrize("direct", [False, True])
def test_bytes_are_read_and_written_in_pieces(
    path: Path, opened: Callable[..., Image], direct: bool
) -> None:
    try:
        image = opened(path, direct=direct)
    except ConfigError:
        pytest.skip("this file system has no O_DIRECT")
    block = image.block
    data = os.urandom(4 * block)
    # Not aligned, in the middle of a page: what a disk cannot reach is copied.
    memory = memoryview(bytearray(8 * block + 3))
    memory[3 : 3 + len(data)] = data
    parts = [memory[3 : 3 + block], memory[3 + block : 3 + 4 * block]]
    image.write(2 * block, Vector.of(parts))
    image.flush()
    assert path.read_bytes()[2 * block : 6 * block] == data
    into = [memoryview(bytearray(size)) for size in (1, 3 * block - 1, block)]
    image.read(2 * block, Vector.of(into))
    assert b"".join(into) == data


def test_what_comes_in_parts_is_whole_or_would_wait(
    path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = opened(path)
    calls = []
    read, write = module.iovec.read, module.iovec.write

    def half(call: Any) -> Any:
        def part(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
            calls.append(at)
            address, length = module.iovec.ENTRY.unpack_from(vector.iovecs)
            size = max(1, length // 2)
            done: int = call(fd, Vector(module.iovec.ENTRY.pack(address, size), size), at, flags)
            return done

        return part

    monkeypatch.setattr(module.iovec, "read", half(read))
    monkeypatch.setattr(module.iovec, "write", half(write))
    into = [bytearray(size) for size in (1000, 24, 512)]
    with pytest.raises(BlockingIOError):
        image.read(512, Vector.of(into), os.RWF_NOWAIT)
    assert calls == [512]
    image.read(512, Vector.of(into))
    assert b"".join(into) == path.read_bytes()[512:2048]
    assert len(calls) > 12
    data = os.urandom(1536)
    image.write(1024, _of(data))
    assert path.read_bytes()[1024:2560] == data


@pytest.mark.parametrize("direct", [False, True])
def test_many_pieces_are_written_some_at_a_time(
    tmp_path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """But where the disk itself takes them, which would have several requests of one."""
    path = tmp_path / "large.raw"
    path.write_bytes(bytes(2 << 20))
    try:
        image = opened(path, direct=direct)
    except ConfigError:
        pytest.skip("this file system has no O_DIRECT")
    written: list[tuple[int, int]] = []
    write = module.iovec.write

    def noted(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
        written.append((at, vector.pieces))
        return write(fd, vector, at, flags)

    monkeypatch.setattr(module.iovec, "write", noted)
    data = os.urandom(200 * 4096)
    with mmap.mmap(-1, len(data)) as pages, memoryview(pages) as view:
        view[:] = data
        vector = Vector.of([view[at : at + 4096] for at in range(0, len(data), 4096)])
        image.write(8192, vector)
    assert path.read_bytes()[8192 : 8192 + len(data)] == data
    if direct:
        assert written == [(8192, 200)]
    else:
        assert written == [(8192 + 4096 * at, min(64, 200 - at)) for at in (0, 64, 128, 192)]


@pytest.mark.parametrize(
    ("at", "sizes"),
    [(8192 + 512, [4096] * 100), (8192, [512, *[4096] * 100]), (8192, [4096] * 64 + [512])],
)
def test_no_cut_falls_into_a_page(
    tmp_path: Path,
    opened: Callable[..., Image],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    sizes: list[int],
) -> None:
    """The kernel would read the rest of the page first, from a disk perhaps."""
    path = tmp_path / "large.raw"
    path.write_bytes(bytes(1 << 20))
    image = opened(path)
    written: list[int] = []
    write = module.iovec.write

    def noted(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
        written.append(at)
        return write(fd, vector, at, flags)

    monkeypatch.setattr(module.iovec, "write", noted)
    buffers = [bytearray(os.urandom(size)) for size in sizes]
    image.write(at, Vector.of(buffers))
    data = b"".join(buffers)
    assert path.read_bytes()[at : at + len(data)] == data
    assert not any(place % 4096 for place in written[1:])


def test_an_error_or_a_short_write_in_a_later_part(
    tmp_path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.raw"
    path.write_bytes(bytes(2 << 20))
    image = opened(path)
    image.flush()
    write = module.iovec.write
    left = [64 * 4096, 100, 64 * 4096 - 100]

    def limited(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = left.pop(0)
        head = bytearray(vector.read()[:size])
        return write(fd, Vector.of([head]), at, flags)

    monkeypatch.setattr(module.iovec, "write", limited)
    data = os.urandom(200 * 4096)
    whole = memoryview(bytearray(data))
    vector = Vector.of([whole[at : at + 4096] for at in range(0, len(data), 4096)])
    with pytest.raises(OSError, match="No space left"):
        image.write(4096, vector)
    done = 128 * 4096
    assert path.read_bytes()[4096 : 4096 + len(data)] == data[:done] + bytes(len(data) - done)
    assert not image.is_written
    monkeypatch.setattr(module.iovec, "write", write)
    image.write(4096, vector)
    assert path.read_bytes()[4096 : 4096 + len(data)] == data


def test_much_that_the_disk_cannot_reach_is_copied_by_parts(
    tmp_path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request of 64 MiB, of which there may be sixteen at once."""
    path = make_image(tmp_path / "large.raw", 1 << 20)
    image = opened(path)
    image.direct = True  # for a file system that takes no O_DIRECT, too
    sizes: list[int] = []
    real = {name: getattr(module.iovec, name) for name in ("read", "write")}

    def picky(name: str) -> Any:
        def call(fd: int, vector: Vector, at: int, flags: int = 0) -> int:
            address, _ = module.iovec.ENTRY.unpack_from(vector.iovecs)
            if address % 4096:
                raise OSError(errno.EINVAL, "Invalid argument")
            sizes.append(vector.size)
            done: int = real[name](fd, vector, at, flags)
            return done

        return call

    monkeypatch.setattr(module, "_BOUNCED", 64 << 10)
    for name in real:
        monkeypatch.setattr(module.iovec, name, picky(name))
    data = os.urandom(300 << 10)
    memory = memoryview(bytearray(8192 + len(data)))
    start = -module.iovec.address_of(memory) % 4096 + 1
    parts = [memory[start : start + 1000], memory[start + 1000 : start + len(data)]]
    memory[start : start + len(data)] = data
    image.write(4096, Vector.of(parts))
    assert path.read_bytes()[4096 : 4096 + len(data)] == data
    memory[:] = bytes(len(memory))
    image.read(4096, Vector.of(parts))
    assert memory[start : start + len(data)] == data
    assert sizes == [64 << 10] * 4 + [44 << 10] + [64 << 10] * 4 + [44 << 10]


def test_a_file_that_was_truncated_is_neither_read_nor_written_beyond_its_end(
    path: Path, opened: Callable[..., Image]
) -> None:
    image = opened(path)
    os.truncate(path, 4096)
    for call in (
        lambda: image.read(0, _of(bytes(8192))),
        lambda: image.write(8192, _of(bytes(512))),
        lambda: image.write_zeroes(8192, 512, unmap=True),
        lambda: image.discard(8192, 512),
    ):
        with pytest.raises(OSError, match="has become shorter"):
            call()
    assert path.stat().st_size == 4096


def test_discarded_and_zeroed_bytes_are_zeros(path: Path, opened: Callable[..., Image]) -> None:
    image = opened(path)
    before = path.stat().st_blocks
    image.write_zeroes(512, 1024, unmap=False)
    image.write_zeroes(2048, 512, unmap=True)
    image.discard(64 << 10, 128 << 10)
    data = path.read_bytes()
    assert data[512:1536] == bytes(1024)
    assert data[1536:1544] == (3).to_bytes(8, "little")
    assert data[2048:2560] == bytes(512)
    assert data[64 << 10 : 192 << 10] == bytes(128 << 10)
    assert path.stat().st_blocks < before
    assert path.stat().st_size == 1 << 20


def test_zeroes_are_written_where_the_file_system_cannot_punch(
    path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Image, mode: int, at: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(Image, "_allocate", refuse)
    monkeypatch.setattr(module, "_ZEROS", 4096)
    image = opened(path)
    image.write_zeroes(512, 10240, unmap=True)
    image.discard(0, 512)
    data = path.read_bytes()
    assert data[512:10752] == bytes(10240)
    assert data[10752:10760] == (21).to_bytes(8, "little")


def test_a_flush_that_failed_once_fails_for_good(
    path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = opened(path)
    answers = [OSError(errno.EIO, "Input/output error"), None]

    def fdatasync(fd: int) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(module.os, "fdatasync", fdatasync)
    for _ in range(2):  # the kernel tells of a lost write once, and the guest must not miss it
        with pytest.raises(OSError, match="Input/output error"):
            image.flush()


def test_of_two_flushes_at_once_none_misses_a_lost_write(
    path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = opened(path)
    inside, goes_on = threading.Event(), threading.Event()
    calls, failures = [], []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        inside.set()
        assert goes_on.wait(10)
        if len(calls) == 1:  # errseq: the first is told, and no other
            raise OSError(errno.EIO, "Input/output error")

    def flush() -> None:
        try:
            image.flush()
        except OSError as error:
            failures.append(error.errno)

    monkeypatch.setattr(module.os, "fdatasync", fdatasync)
    flushes = [threading.Thread(target=flush) for _ in range(2)]
    flushes[0].start()
    assert inside.wait(10)
    flushes[1].start()
    goes_on.set()
    for one in flushes:
        one.join()
    assert failures == [errno.EIO] * 2
    assert len(calls) == 1


def test_what_is_written_during_a_flush_is_for_the_next(
    path: Path, opened: Callable[..., Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = opened(path)
    calls = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            image.write(0, _of(bytes(512)))

    monkeypatch.setattr(module.os, "fdatasync", fdatasync)
    for done in (1, 2, 2):
        image.flush()
        assert len(calls) == done
    for change in (
        lambda: image.write(0, _of(bytes(512))),
        lambda: image.write_zeroes(0, 512, unmap=False),
        lambda: image.discard(0, 512),
        image.lock,  # what another process has written is flushed too
    ):
        change()
        before = len(calls)
        image.flush()
        assert len(calls) == before + 1
