"""Disks with a stock driver: data, locks, errors and migrations of a guest that writes."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disk_bench import SIZE, digest_inside, digest_of, ends_come_to_who_asked, writing
from vm_bench import Bench, Watched

from lab.scenario import wait_for


def _disk(path: Path, more: str = "") -> tuple[str, str]:
    return "--disk", f"path={path}{more}"


def _refused(path: Path) -> bool:
    """Whether qemu-io, which would write, is refused the image."""
    argv = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 or "lock" in done.stderr
    return done.returncode != 0


@contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """While the block runs, qemu-io has the image."""
    argv = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        assert holder.stdout.readline()
        yield
        holder.stdin.close()
        holder.wait()


@pytest.mark.parametrize("kernel", ["cloud-6.12", "cloud-6.1"])
def test_a_guest_reads_and_writes_its_disk_here_and_there(
    bench: Bench, image: Path, kernel: str
) -> None:
    disk = _disk(image, ",serial=lab-disk-1,discard=on")
    target = bench.run(bench.net.b, "--incoming", "defer", *disk)
    guest = bench.boot(*disk, kernel=kernel, keep=[target])
    agent = guest.agent
    agent.sh("modprobe virtio_blk")
    assert agent.sh("cat /sys/block/vda/serial") == "lab-disk-1"
    assert int(agent.sh("cat /sys/block/vda/size")) == SIZE // 512
    assert agent.sh("cat /sys/block/vda/queue/write_cache").strip() == "write back"
    assert int(agent.sh("cat /sys/block/vda/queue/discard_max_bytes")) > 0
    assert digest_inside(agent) == digest_of(image)
    ends_come_to_who_asked(agent)
    assert _refused(image), "the source has the lock"

    with writing(agent):
        bench.move(guest, target)
    assert _refused(image), "the destination has the lock"
    ends_come_to_who_asked(agent)
    assert digest_inside(agent) == digest_of(image)
    (counts,) = [d for d in target.qmp.execute("query-devices") if d["kind"] == "virtio-blk"]
    assert counts["counters"]["written-bytes"] > 0
    assert counts["counters"]["errors"] == 0
    agent.power_off()
    assert target.wait(60) == 0
    assert not _refused(image)


@contextmanager
def _small(folder: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = folder / "small-disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # a failed test leaves a VM


def test_a_full_host_stops_the_vm_until_there_is_space(bench: Bench) -> None:
    with _small(bench.folder) as folder:
        image = folder / "sparse.raw"
        with image.open("wb") as file:
            file.truncate(SIZE)
        guest = bench.boot(*_disk(image))
        vm, agent = guest.vm, guest.agent
        agent.sh("modprobe virtio_blk")
        vm.mark()
        agent.sh(
            "(dd if=/dev/urandom of=/tmp/data bs=1M count=6; dd if=/tmp/data of=/dev/vda bs=1M "
            "conv=fsync; echo $? > /tmp/result) > /dev/null 2>&1 &"
        )
        error = vm.event("BLOCK_IO_ERROR")["data"]
        assert error["device"] == "disk0"
        assert (error["operation"], error["action"], error["nospace"]) == ("write", "stop", True)
        vm.event("STOP")
        assert vm.status() == "io-error"
        subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
        vm.qmp.execute("cont")
        assert vm.status() == "running"
        wait_for(lambda: agent.sh("cat /tmp/result 2>/dev/null || true").strip() == "0", 60)
        there = agent.sh("sha256sum /tmp/data", 60).split()[0]
        assert hashlib.sha256(image.read_bytes()[: 6 << 20]).hexdigest() == there
        bench.drop_guest()


def _fails(bench: Bench, *arguments: str) -> str:
    """The message of a VM that does not start."""
    vm = bench.run(bench.net.b, *arguments)
    assert vm.wait(60) == 1
    return vm.console


def test_images_that_cannot_be_used_are_named(bench: Bench, image: Path) -> None:
    guest = bench.boot(*_disk(image))
    for path, says in (
        (bench.folder / "absent.raw", "there is no such file"),
        (Path("/dev/zero"), "it is no file and no block device"),
    ):
        assert says in _fails(bench, "--incoming", "defer", *_disk(path))
    # The very image that a guest has: refused when a second guest would run.
    other = bench.run(bench.net.b, "--incoming", "defer", *_disk(image))
    other.qmp.execute("query-status")
    guest.agent.ping()
    assert _refused(image)


def test_a_guest_whose_disk_cannot_be_had_stays(bench: Bench, image: Path) -> None:
    """The destination's lock is asked for at COMMIT, and a refusal brings the guest back."""
    copy, short = bench.folder / "copy.raw", bench.folder / "short.raw"
    copy.write_bytes(image.read_bytes())
    short.write_bytes(bytes(SIZE // 2))
    wait = ("--incoming", "defer")
    targets = [bench.run(bench.net.b, *wait, *_disk(path)) for path in (short, copy, image)]
    guest = bench.boot(*_disk(image), keep=targets)
    agent, source = guest.agent, guest.vm
    agent.sh("modprobe virtio_blk")

    source.start_migration(bench.listen(targets[0]))
    info = source.wait_migration()
    assert info["status"] == "failed"
    assert "size" in info["error-desc"]
    assert not source.news("STOP"), "refused before the stop"

    with _in_use(copy):
        source.start_migration(bench.listen(targets[1]))
        info = source.wait_migration()
        assert info["status"] == "failed"
        assert "another process uses it" in info["error-desc"], info
        assert source.status() == "running"
        agent.sh("dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync")
        assert _refused(image), "it has its lock again"
    assert targets[1].wait(60) == 1

    bench.move(guest, targets[2])
    assert digest_inside(agent) == digest_of(image)


def test_a_saved_guest_comes_back_to_its_disk_once(bench: Bench, image: Path) -> None:
    path = bench.folder / "with-disk"
    guest = bench.boot(*_disk(image))
    agent, vm = guest.agent, guest.vm
    agent.sh("modprobe virtio_blk; dd if=/dev/urandom of=/dev/vda bs=64k count=4 2>/dev/null")
    vm.start_migration(f"file:{path}")
    assert vm.wait_migration()["status"] == "completed"
    assert not _refused(image), "who is in a file has no lock"
    assert vm.quit() == 0

    back = _restore(bench, path, image)
    guest.vm = back
    back.event("RESUME")
    agent.ping(60)
    agent.sh("dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync 2>/dev/null")
    assert back.quit() == 0

    again = _restore(bench, path, image)
    assert again.wait(60) == 1
    assert "was written after the guest was saved" in again.console


def _restore(bench: Bench, path: Path, image: Path) -> Watched:
    return bench.run(bench.net.b, "--incoming", f"file:{path}", *_disk(image))
