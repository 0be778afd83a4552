"""Devices that QEMU's own back ends serve: a disk that moves, and back ends that die."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disk_bench import SIZE, digest_inside, digest_of, ends_come_to_who_asked, goes_on, writing
from vm_bench import Bench

from lab import guest as guest_image
from lab import kernels
from lab.agent import Agent
from lab.scenario import wait_for


class Storage:
    """A qemu-storage-daemon that serves an image at a socket, for anybody to connect."""

    def __init__(self, image: Path, socket: Path) -> None:
        self.socket = socket
        # Both ends of a migration have the image open; only the one with the guest uses it.
        file = f"driver=file,node-name=disk,filename={image},locking=off"
        export = f"type=vhost-user-blk,id=x,node-name=disk,writable=on,addr.path={socket}"
        argv = ["qemu-storage-daemon", "--blockdev", file]
        argv += ["--export", f"{export},addr.type=unix,num-queues=2"]
        self._process = subprocess.Popen(argv, umask=0)
        wait_for(socket.exists, 30)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)


@contextmanager
def _storage(image: Path, socket: Path) -> Iterator[Storage]:
    storage = Storage(image, socket)
    try:
        yield storage
    finally:
        storage.kill()


def _device(storage: Storage) -> tuple[str, str]:
    return "--device", f"vhost-user,socket={storage.socket},type=blk"


@pytest.mark.parametrize("kernel", ["cloud-6.12", "cloud-6.1"])
def test_a_disk_moves_while_it_is_written(bench: Bench, image: Path, kernel: str) -> None:
    here, there = bench.folder / "here.sock", bench.folder / "there.sock"
    with _storage(image, here) as source, _storage(image, there) as destination:
        shared: dict[str, Any] = {"memory": "128M,shared=on"}
        target = bench.run(bench.net.b, "--incoming", "defer", *_device(destination), **shared)
        guest = bench.boot(*_device(source), kernel=kernel, keep=[target], **shared)
        agent = guest.agent
        agent.sh("modprobe virtio_blk")
        assert int(agent.sh("cat /sys/block/vda/size")) == SIZE // 512
        assert digest_inside(agent) == digest_of(image)
        with writing(agent):
            bench.move(guest, target)
        ends_come_to_who_asked(agent)
        assert digest_inside(agent) == digest_of(image)
        assert target.news("GUEST_ERROR", "BACK_END_LOST") == []
        agent.power_off()
        assert target.wait(60) == 0


def test_a_back_end_that_dies_is_replaced(bench: Bench, image: Path) -> None:
    socket = bench.folder / "disk.sock"
    storage = Storage(image, socket)
    try:
        guest = bench.boot(*_device(storage), memory="128M,shared=on")
        agent, vm = guest.agent, guest.vm
        agent.sh("modprobe virtio_blk")
        assert digest_inside(agent) == digest_of(image)
        storage.kill()  # with nothing in flight, as it keeps no record
        vm.event("BACK_END_LOST", lambda data: data["device"] == "vhost-user0")
        with writing(agent, waits=True):
            # A guest whose disk is gone does not leave.
            with pytest.raises(Exception, match="the back end of 'vhost-user0' is gone"):
                vm.qmp.execute("migrate", {"uri": f"file:{bench.folder / 'never'}"})
            agent.ping(10)
            storage = Storage(image, socket)
            vm.event("BACK_END_BACK")
        assert digest_inside(agent) == digest_of(image)
        assert vm.news("GUEST_ERROR") == []
        (found,) = [d for d in vm.qmp.execute("query-devices") if d["id"] == "vhost-user0"]
        assert found["counters"]["losses"] == 1
    finally:
        storage.kill()


@pytest.fixture
def share(bench: Bench) -> Iterator[Path]:
    path = bench.folder / "a, share"
    path.mkdir()
    (path / "from-host").write_text("hello")
    yield path
    bench.drop_guest()
    shutil.rmtree(path)


def _share(path: Path, tag: str, more: str = "") -> tuple[str, str]:
    return "--share", f"path={str(path).replace(',', ',,')},tag={tag}{more}"


def _mount(agent: Agent, tag: str) -> None:
    agent.sh(f"modprobe virtiofs; mkdir -p /{tag}; mount -t virtiofs {tag} /{tag}")


@pytest.mark.parametrize("kernel", ["cloud-6.12", "cloud-6.1"])
def test_a_folder_is_shared(bench: Bench, share: Path, kernel: str) -> None:
    guest = bench.boot(
        *(*_share(share, "work"), *_share(share, "look", ",readonly")),
        kernel=kernel,
        memory="128M,shared=on",
    )
    agent, vm = guest.agent, guest.vm
    _mount(agent, "work")
    _mount(agent, "look")
    assert agent.sh("cat /work/from-host /look/from-host") == "hellohello"
    agent.sh("head -c 3000000 /dev/urandom > /work/big; sync")
    assert agent.sh("sha256sum /look/big").split()[0] == digest_of(share / "big")
    (share / "later").write_text("from the host")
    assert agent.sh("cat /work/later") == "from the host"
    assert agent.sh("touch /look/new 2>/dev/null || echo refused").strip() == "refused"
    assert agent.sh("rm /work/big; ls /work").split() == ["from-host", "later"]

    # What keeps the guest here is named before the stop.
    vm.mark()
    with pytest.raises(Exception, match=r"'share0' is a share \(tag 'work'\)"):
        vm.qmp.execute("migrate", {"uri": "unix:/nowhere", "insecure": True})
    with pytest.raises(Exception, match="run the guest without it"):
        vm.qmp.execute("migrate", {"uri": f"file:{bench.folder / 'never'}"})
    assert vm.news("STOP") == []
    vm.qmp.execute("stop")
    vm.qmp.execute("cont")
    assert agent.sh("cat /work/from-host") == "hello"

    # It dies, and the guest lives; it ends with the VM.
    children = _children(vm.pid)
    assert len(children) == 2
    os.kill(children[0], signal.SIGKILL)
    vm.event("BACK_END_LOST")
    agent.ping(10)
    assert vm.quit() == 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10)


def _children(pid: int) -> list[int]:
    """The programs that a VM has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_programs_end_with_a_vm_that_is_killed(bench: Bench, share: Path) -> None:
    vm = bench.run(
        *(bench.net.b, "--incoming", "defer", *_share(share, "work")), memory="128M,shared=on"
    )
    vm.qmp.execute("query-status")
    (child,) = _children(vm.pid)
    os.kill(vm.pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists(), 10)
    vm.wait(10)


# --- images that are not raw ----------------------------------------------------------------------
@pytest.fixture
def qcow2(bench: Bench) -> Iterator[Path]:
    path = bench.folder / "disk.qcow2"
    _qemu_img("create", "-q", "-f", "qcow2", str(path), f"{SIZE}")
    yield path
    bench.drop_guest()
    path.unlink()


def _qemu_img(*words: str) -> str:
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_qcow2_image_is_a_disk(bench: Bench, qcow2: Path) -> None:
    disk = "--disk", f"path={qcow2},discard=on"
    guest = bench.boot(*disk, memory="128M,shared=on")
    agent, vm = guest.agent, guest.vm
    agent.sh("modprobe virtio_blk")
    assert int(agent.sh("cat /sys/block/vda/size")) == SIZE // 512
    agent.sh("dd if=/dev/urandom of=/dev/vda bs=64k count=40 conv=fsync 2>/dev/null")
    digest = digest_inside(agent)
    with pytest.raises(Exception, match=r"'disk0' is a disk image .*qemu-img convert -O raw"):
        vm.qmp.execute("migrate", {"uri": f"file:{bench.folder / 'never'}"})
    ends_come_to_who_asked(agent)
    # In use: another VM is refused in the program's own words.
    other = bench.run(bench.net.b, *_bootable(), *disk, memory="128M,shared=on")
    assert other.wait(60) != 0
    assert 'Failed to get "write" lock' in other.console
    vm.qmp.execute("stop")
    vm.qmp.execute("cont")
    assert digest_inside(agent) == digest
    # Not synced, but the image is closed in good order.
    agent.sh("dd if=/dev/urandom of=/dev/vda bs=64k seek=100 count=4 oflag=direct 2>/dev/null")
    digest = digest_inside(agent)
    agent.power_off()
    assert vm.wait(60) == 0
    _qemu_img("check", "-q", str(qcow2))  # the lock is free once the VM has ended
    raw = qcow2.with_suffix(".raw")
    _qemu_img("convert", "-O", "raw", str(qcow2), str(raw))
    assert digest_of(raw) == digest
    raw.unlink()


def _bootable() -> list[str]:
    kernel = kernels.cached("cloud-6.12")
    assert kernel is not None
    argv = ["--kernel", str(kernel.vmlinuz), "--initrd", str(guest_image.build(kernel))]
    return [*argv, "--append", f"{guest_image.CMDLINE} godwit.net=off"]


def test_a_qcow2_image_goes_over_with_its_guest(bench: Bench, qcow2: Path) -> None:
    given: dict[str, Any] = {"memory": "128M,shared=on"}
    disk = "--disk", f"path={qcow2},discard=on"
    target = bench.run(bench.net.b, "--incoming", "defer", *disk, **given)
    back = bench.run(bench.net.a, "--incoming", "defer", *disk, **given)
    guest = bench.boot(*disk, keep=[target, back], **given)
    agent = guest.agent
    agent.sh("modprobe virtio_blk")
    agent.sh("dd if=/dev/urandom of=/dev/vda bs=64k count=40 conv=fsync 2>/dev/null")
    with writing(agent):
        # One that fails first: the image is opened again where the guest goes on.
        wrong = bench.run(bench.net.b, "--incoming", "defer", **given)
        guest.vm.start_migration(bench.listen(wrong))
        assert guest.vm.wait_migration()["status"] == "failed"
        goes_on(agent)
        bench.move(guest, target)
        goes_on(agent)
        bench.move(guest, back)
    ends_come_to_who_asked(agent)
    digest = digest_inside(agent)
    assert back.news("GUEST_ERROR", "BACK_END_LOST") == []
    agent.power_off()
    assert back.wait(60) == 0
    target.wait(60)
    _qemu_img("check", "-q", str(qcow2))
    raw = qcow2.with_suffix(".raw")
    _qemu_img("convert", "-O", "raw", str(qcow2), str(raw))
    assert digest_of(raw) == digest
    raw.unlink()


def test_an_encrypted_image_goes_over_with_its_guest(bench: Bench) -> None:
    path, key = bench.folder / "disk.luks", bench.folder / "key"
    key.write_text("secret")
    secret = "--object", f"secret,id=s,file={key}"
    # It measures its own speed for that long, now and then in vain.
    slow = "-o", "key-secret=s,iter-time=100"
    wait_for(lambda: _made("create", "-q", "-f", "luks", *secret, *slow, str(path), f"{SIZE}"), 60)
    given: dict[str, Any] = {"memory": "128M,shared=on"}
    disk = "--disk", f"path={path},format=luks,key={key}"
    target = bench.run(bench.net.b, "--incoming", "defer", *disk, **given)
    guest = bench.boot(*disk, keep=[target], **given)
    agent = guest.agent
    agent.sh("modprobe virtio_blk")
    with writing(agent):
        bench.move(guest, target)
        goes_on(agent)
    inside = digest_inside(agent)
    agent.power_off()
    assert target.wait(60) == 0
    opened = "--image-opts", f"driver=luks,key-secret=s,file.filename={path}"
    raw = path.with_suffix(".raw")
    _qemu_img("convert", *secret, *opened, "-O", "raw", str(raw))
    assert digest_of(raw) == inside
    for made in (path, key, raw):
        made.unlink()


def _made(*words: str) -> bool:
    return not subprocess.run(["qemu-img", *words], capture_output=True).returncode


@pytest.fixture
def server(bench: Bench, image: Path) -> Iterator[Path]:
    """The socket of an NBD server, QEMU's, of the image."""
    socket = bench.folder / "nbd.sock"
    argv = ["qemu-nbd", "--persistent", "--format=raw", f"--socket={socket}", str(image)]
    with subprocess.Popen(argv, umask=0) as process:
        try:
            wait_for(socket.exists, 30)
            yield socket
            bench.drop_guest()
        finally:
            process.terminate()
    socket.unlink(missing_ok=True)


def test_a_disk_of_an_nbd_server(bench: Bench, image: Path, server: Path) -> None:
    disk = "--disk", f"path=nbd+unix:///?socket={server}"
    guest = bench.boot(*disk, memory="128M,shared=on")
    agent, vm = guest.agent, guest.vm
    agent.sh("modprobe virtio_blk")
    assert int(agent.sh("cat /sys/block/vda/size")) == SIZE // 512
    assert digest_inside(agent) == digest_of(image)
    with writing(agent):
        goes_on(agent)
        vm.mark()
        with pytest.raises(Exception, match="'disk0' is a disk of an NBD server"):
            vm.qmp.execute("migrate", {"uri": "unix:/nowhere", "insecure": True})
        assert vm.news("STOP") == []
        goes_on(agent)
    inside = digest_inside(agent)
    agent.power_off()
    assert vm.wait(60) == 0
    assert digest_of(image) == inside


def test_an_image_in_another_format_stays(bench: Bench) -> None:
    path = bench.folder / "disk.vmdk"
    _qemu_img("create", "-q", "-f", "vmdk", str(path), f"{SIZE}")
    disk = "--disk", f"path={path},format=vmdk"
    guest = bench.boot(*disk, memory="128M,shared=on")
    agent, vm = guest.agent, guest.vm
    agent.sh("modprobe virtio_blk")
    assert int(agent.sh("cat /sys/block/vda/size")) == SIZE // 512
    with pytest.raises(Exception, match=r"'disk0' is a disk image .*qemu-img convert -O raw"):
        vm.qmp.execute("migrate", {"uri": "unix:/nowhere", "insecure": True})
    bench.drop_guest()
    path.unlink()


def test_ram_that_is_not_shared_is_refused(bench: Bench) -> None:
    vm = bench.run(
        bench.net.b, "--incoming", "defer", "--device", "vhost-user,socket=/nowhere,type=blk"
    )
    assert vm.wait(60) == 1
    assert "give --memory SIZE,shared=on" in vm.console
    vm = bench.run(
        bench.net.b,
        *("--incoming", "defer", "--device", "vhost-user,socket=/nowhere,type=blk"),
        memory="128M,shared=on",
    )
    assert vm.wait(60) == 1
    assert "the vhost-user back end at '/nowhere': No such file or directory" in vm.console
