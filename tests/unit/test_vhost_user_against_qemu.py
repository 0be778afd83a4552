"""The back end of QEMU serves a device here, without a VM: what the fake one was made after."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from struct import pack
from typing import Any, cast

import pytest

from godwit.cli.back_ends import BackEnds
from godwit.cli.formats import with_formats
from godwit.errors import HostError
from godwit.host.sandbox import landlock
from godwit.host.storage_daemon import StorageDaemon
from godwit.host.vhost_user import BackEnd, connect
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.vhost_user.device import VirtioVhostUser
from godwit.hw.virtio.vhost_user.image import OpenedImage
from godwit.spec.back_ends import ImageFile, VhostUserConfig
from godwit.spec.config import DeviceConfig, parse_devices
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from virtio_bench import SLOT, Guest

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed"
)
PATIENCE = 20.0
_IN, _OUT, _FLUSH = 0, 1, 4
SECTORS = 2048


class Disk:
    """A disk that a program started for it serves, and its guest."""

    def __init__(self, memory: GuestMemory, option: str, cpus: int = 1) -> None:
        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio, self.bus = board.ports, board.mmio, board.bus
        devices: tuple[DeviceConfig, ...] = with_formats(parse_devices([("--disk", option)]))
        self.programs = BackEnds(devices)
        config = self.programs.devices[0]
        assert isinstance(config, VhostUserConfig)
        assert isinstance(config.serves, ImageFile)
        self.image = None
        if config.control >= 0:
            daemon = StorageDaemon(socket.socket(fileno=config.control))
            self.image = OpenedImage(config.serves, daemon)

        def connect(config: VhostUserConfig) -> BackEnd:
            return BackEnd(socket.socket(fileno=config.connection))

        self.device = VirtioVhostUser(config, memory, board.loop, connect, self.image, cpus)
        self.pci = VirtioPci(self.device, board.slot(SLOT))
        self.guest = Guest(cast(Any, self))

    @property
    def driver(self) -> Driver:
        return self.guest.queues[0]

    def start(self) -> None:
        if self.image is not None:
            self.image.acquire()
        self.pci.resume()

    def add(self, kind: int, sector: int, data: bytes | int) -> tuple[int, int]:
        driver = self.driver
        parts = [Part(driver.place(pack("<IIQ", kind, 0, sector)), 16)]
        at = driver.place(data)
        size = len(data) if isinstance(data, bytes) else data
        parts += [Part(at, size, kind == _IN)] if size else []
        status = driver.place(b"\xee")
        driver.add([*parts, Part(status, 1, True)])
        self.guest.kick(0)
        return at, status

    def used(self, count: int = 1) -> None:
        fd = self.pci.msix.fds[1]
        deadline = time.monotonic() + PATIENCE
        while count:
            if self.driver.take() is not None:
                count -= 1
                continue
            assert time.monotonic() < deadline, "the request was not finished"
            select.select([fd], [], [], 0.05)

    def do(self, kind: int, sector: int, data: bytes | int) -> bytes:
        at, status = self.add(kind, sector, data)
        self.used()
        assert self.memory.read(status, 1) == b"\0"
        return self.memory.read(at, data) if isinstance(data, int) else b""

    def pause(self) -> None:
        self.pci.pause()
        assert self.pci.paused(PATIENCE)

    def close(self) -> None:
        self.pause()
        self.pci.close()
        self.programs.close()
        self.board.close()


def _image(path: Path, kind: str) -> Path:
    words = ["create", "-q", "-f", kind, str(path), str(SECTORS * 512)]
    subprocess.run(["qemu-img", *words], check=True)
    return path


def _content(path: Path) -> bytes:
    raw = path.with_suffix(".check")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize("kind", ["vmdk", "qcow2"])
def test_it_reads_writes_pauses_and_ends(shared: GuestMemory, tmp_path: Path, kind: str) -> None:
    path = _image(tmp_path / "disk", kind)
    disk = Disk(shared, f"path={path},format={kind}")
    disk.start()
    disk.guest.probe()
    assert disk.device.properties() == {"queues": 1, "size": SECTORS * 512}
    data = os.urandom(4096)
    disk.do(_OUT, 8, data)
    assert disk.do(_IN, 8, 4096) == data
    disk.do(_FLUSH, 0, 0)
    for _ in range(3):
        more = [(disk.add(_IN, 8, 4096), disk.driver.added)[0] for _ in range(8)]
        disk.pause()  # what was taken is finished
        state = disk.pci.save()
        assert state.transport.queues[0].last_avail == state.transport.queues[0].last_used
        disk.pci.resume()
        disk.used(8)
        assert all(shared.read(at, 4096) == data for at, _ in more)
    disk.guest.probe()  # a reset, and another driver
    disk.do(_OUT, 100, data)
    assert disk.board.errors == []
    disk.close()
    content = _content(path)
    assert content[4096:8192] == data
    assert content[51200 : 51200 + 4096] == data


def _encrypted(path: Path, kind: str, key: Path) -> str:
    """Make an image with a passphrase, and return the disk's options."""
    key.write_text("a secret, with a comma")
    # Few rounds: this is no test of the encryption. (It measures itself, and gives up far below.)
    names = "key-secret=s,iter-time=100"
    if kind == "qcow2":
        names = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"
    words = ["create", "-q", "-f", kind, "--object", f"secret,id=s,file={key}"]
    words += ["-o", names, str(path), str(SECTORS * 512)]
    for _ in range(20):  # it measures its own speed, now and then in vain
        done = subprocess.run(["qemu-img", *words], timeout=60, capture_output=True, text=True)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return f"path={path},format={kind},key={key}"


@pytest.mark.parametrize("kind", ["luks", "qcow2"])
def test_an_encrypted_image_is_opened_by_its_passphrase(
    shared: GuestMemory, tmp_path: Path, kind: str
) -> None:
    path, key = tmp_path / "disk", tmp_path / "key"
    options = _encrypted(path, kind, key)
    data = os.urandom(4096)
    for turn in range(2):
        disk = Disk(shared, options)
        assert disk.image is not None, "it can be opened and closed, as a migration does"
        disk.start()
        disk.guest.probe()
        assert disk.device.properties() == {"queues": 1, "size": SECTORS * 512}
        if not turn:
            disk.do(_OUT, 8, data)
        assert disk.do(_IN, 8, 4096) == data
        disk.pause()
        disk.image.release()
        disk.image.acquire()
        disk.pci.resume()
        assert disk.do(_IN, 8, 4096) == data
        disk.close()
    assert data[:64] not in path.read_bytes()
    key.write_text("another")
    disk = Disk(shared, options)
    with pytest.raises(HostError, match="Invalid password"):
        disk.start()
    disk.close()


@pytest.mark.parametrize(("form", "kind"), [("inet", "raw"), ("unix", "raw"), ("inet", "luks")])
def test_a_disk_of_an_nbd_server(shared: GuestMemory, tmp_path: Path, form: str, kind: str) -> None:
    path, key, more = tmp_path / "disk", tmp_path / "key", ""
    if kind == "luks":
        more = _encrypted(path, kind, key).removeprefix(f"path={path}")
    else:
        _image(path, kind)
    if form == "inet":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        where, url = (
            f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
            f"nbd://127.0.0.1:{port}",
        )
    else:
        where, url = f"addr.type=unix,addr.path={tmp_path}/n", "nbd+unix://"
    url += "/a%20disk" + ("" if form == "inet" else f"?socket={tmp_path}/n")
    with pytest.raises(HostError, match="the back end is gone"):
        Disk(shared, f"path={url}{more}")
    server = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={path}"),
            *("--nbd-server", where, "--pidfile", str(tmp_path / "pid")),
            *("--export", "type=nbd,id=e,node-name=d,name=a disk,writable=on"),
        ]
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "pid").exists():  # it is written once all is there
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        disk = Disk(shared, f"path={url}{more}")
        assert disk.image is None, "it is open from the start"
        assert "is a disk of an NBD server" in (disk.device.unmovable(False) or "")
        (program,) = disk.programs._programs.values()
        assert program.control is not None
        if landlock.version():
            daemon = StorageDaemon(program.control.dup())
            node = {"node-name": "x", "driver": "file", "read-only": True}
            with pytest.raises(HostError, match="Permission denied"):
                daemon.execute("blockdev-add", **node, filename="/etc/passwd")
        disk.start()
        disk.guest.probe()
        assert disk.device.properties() == {"queues": 1, "size": SECTORS * 512}
        data = os.urandom(4096)
        disk.do(_OUT, 8, data)
        disk.do(_FLUSH, 0, 0)
        assert disk.do(_IN, 8, 4096) == data
        disk.close()
        assert path.read_bytes()[4096:8192] == data or kind == "luks"
        assert (data in path.read_bytes()) == (kind == "raw")
    finally:
        server.kill()
        server.wait(PATIENCE)


def test_a_driver_without_interrupts(shared: GuestMemory, tmp_path: Path) -> None:
    disk = Disk(shared, f"path={_image(tmp_path / 'disk', 'qcow2')}")
    disk.start()
    disk.guest.probe(vectors=False)
    for sector in range(8):
        assert disk.do(_IN, sector, 512) == bytes(512)
    disk.guest.probe()
    assert disk.do(_IN, 0, 512) == bytes(512)
    disk.close()


def test_it_has_its_image_alone(shared: GuestMemory, tmp_path: Path) -> None:
    """The program is confined to the image, and cannot open a file beside it."""
    if not landlock.version():
        pytest.skip("this kernel has no Landlock")
    path, other = _image(tmp_path / "disk", "qcow2"), _image(tmp_path / "other", "qcow2")
    disk = Disk(shared, f"path={path}")
    assert disk.image is not None
    daemon = disk.image._daemon
    node = {"node-name": "x", "driver": "file", "read-only": True}
    for wrong in (str(other), "/etc/passwd"):
        with pytest.raises(HostError, match="Permission denied"):
            daemon.execute("blockdev-add", **node, filename=wrong)
    disk.start()
    disk.close()
    # One that names a further file is not: it needs that.
    words = ["create", "-q", "-f", "qcow2", "-b", str(path), "-F", "qcow2", str(other)]
    subprocess.run(["qemu-img", *words], check=True)
    disk = Disk(shared, f"path={other},format=qcow2")
    disk.start()
    disk.close()


def test_a_queue_for_each_of_two_vcpus(shared: GuestMemory, tmp_path: Path) -> None:
    disk = Disk(shared, f"path={_image(tmp_path / 'disk', 'qcow2')}", cpus=2)
    disk.start()
    disk.guest.probe()
    assert len(disk.guest.queues) == 2
    assert disk.guest.device_config()[:8] == pack("<Q", SECTORS)
    driver = disk.guest.queues[1]
    for _ in range(4):
        status = driver.place(b"\xee")
        header = driver.place(pack("<IIQ", _IN, 0, 1))
        driver.add([Part(header, 16), Part(driver.place(512), 512, True), Part(status, 1, True)])
        disk.guest.kick(1)
        disk.do(_IN, 0, 512)
        disk.pause()
        assert driver.take() is not None
        assert shared.read(status, 1) == b"\0"
        disk.pci.resume()
    assert disk.board.errors == []
    disk.close()


def test_what_it_writes_is_logged(shared: GuestMemory, tmp_path: Path) -> None:
    path = _image(tmp_path / "disk", "qcow2")
    disk = Disk(shared, f"path={path}")
    disk.start()
    disk.guest.probe()

    def logged(address: int) -> bool:
        return bool(log[address // 4096 // 8] & 1 << address // 4096 % 8)

    for _ in range(2):
        disk.device.start_log()
        for sector in range(4):
            at, status = disk.add(_IN, sector, 8192)
            disk.used()
            log = disk.device.take_log()
            assert logged(at)
            assert logged(at + 8191)
            assert logged(status)
            assert logged(disk.driver.used)
        assert not any(disk.device.take_log())
        disk.device.stop_log()
        disk.do(_IN, 0, 512)
        assert not any(disk.device.take_log())
    assert disk.board.errors == []
    disk.close()


def test_a_qcow2_image_goes_from_one_to_the_other(shared: GuestMemory, tmp_path: Path) -> None:
    path = _image(tmp_path / "disk", "qcow2")
    one, other = Disk(shared, f"path={path}"), Disk(shared, f"path={path}")
    one.start()
    one.guest.probe()
    data = os.urandom(4096)
    one.do(_OUT, 8, data)
    one.pause()
    assert other.image is not None
    with pytest.raises(HostError, match='Failed to get "write" lock'):
        other.image.acquire()
    state = one.pci.save()
    assert one.image is not None
    one.image.release()
    other.pci.load(state)
    other.guest.queues, other.guest.msix_at = one.guest.queues, one.guest.msix_at
    other.start()
    assert other.do(_IN, 8, 4096) == data
    other.do(_OUT, 16, data)
    with pytest.raises(HostError, match='Failed to get "write" lock'):
        one.image.acquire()
    one.close()
    other.close()
    content = _content(path)
    assert content[4096:8192] == content[8192:12288] == data


def test_it_is_lost(shared: GuestMemory, tmp_path: Path) -> None:
    path = _image(tmp_path / "disk", "qcow2")
    disk = Disk(shared, f"path={path}")
    disk.start()
    disk.guest.probe()
    changes: list[str | None] = []
    disk.device.on_back_end = changes.append
    disk.do(_OUT, 8, bytes(512))
    disk.programs.close()
    deadline = time.monotonic() + PATIENCE
    while not changes:
        assert time.monotonic() < deadline
        disk.loop.run_once(0.05)
    disk.add(_OUT, 8, bytes(512))
    disk.pause()
    assert "program behind 'disk0' has ended" in (disk.device.unmovable(False) or "")
    assert disk.image is not None
    with pytest.raises(HostError, match="qemu-storage-daemon does not answer"):
        disk.image.release()
    disk.close()


def _silence(*_: object) -> None:
    raise TimeoutError("timed out")


@pytest.mark.parametrize("late", [True, False], ids=["late", "refused"])
def test_a_release_that_failed_leaves_the_guest_its_disk(
    shared: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The storage stalls for longer than is waited for, and the migration fails."""
    path = _image(tmp_path / "disk", "qcow2")
    disk = Disk(shared, f"path={path}")
    assert disk.image is not None
    disk.start()
    disk.guest.probe()
    data = os.urandom(4096)
    disk.do(_OUT, 8, data)
    disk.pause()
    if late:
        with monkeypatch.context() as patch:
            patch.setattr(StorageDaemon, "_answer", _silence)
            with pytest.raises(HostError, match=r"may still be open: .* timed out"):
                disk.image.release()  # done nevertheless
            with pytest.raises(HostError, match="nobody knows whether it is open"):
                disk.image.acquire()
    else:
        daemon = disk.image._daemon
        daemon.execute("blockdev-add", node_name="user", driver="raw", file="image")
        with pytest.raises(HostError, match=r"may still be open: .* in use"):
            disk.image.release()
        daemon.execute("blockdev-del", node_name="user")
    disk.image.acquire()
    disk.pci.resume()
    assert disk.do(_IN, 8, 4096) == data
    disk.do(_OUT, 16, data)
    disk.pause()
    for _ in range(2):
        disk.image.release()
        disk.image.acquire()
    disk.pci.resume()
    assert disk.do(_IN, 16, 4096) == data
    disk.close()
    assert _content(path)[4096:12288] == data * 2


def test_the_documents_example_leaves_nothing_in_this_hosts_cache(tmp_path: Path) -> None:
    """Its image is opened with O_DIRECT: another host may read it after a migration."""
    text = Path("docs/devices.md").read_text().replace("\\\n", "")
    (line,) = (line for line in text.splitlines() if "qemu-storage-daemon --blockdev" in line)
    image, listens = tmp_path / "disk.raw", tmp_path / "disk.sock"
    image.write_bytes(bytes(SECTORS * 512))
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    words = line.replace("disk.raw", str(image)).replace("/run/disk.sock", str(listens)).split()
    with subprocess.Popen([*words, "--daemonize", "--pidfile", str(tmp_path / "pid")]) as started:
        assert started.wait(PATIENCE) == 0
    pid = int((tmp_path / "pid").read_text())
    try:
        with connect(str(listens)):
            files = Path(f"/proc/{pid}/fd").iterdir()
            (fd,) = (file.name for file in files if file.readlink() == image)
            flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
            assert int(flags, 8) & os.O_DIRECT
    finally:
        os.kill(pid, signal.SIGTERM)
