"""A stock Debian image boots from its disk, learns who it is, and moves while fio writes.

Judges: fio's own verify, the guest's kernel log, and fsck on the image afterwards.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from vm_bench import Bench, Watched

from godwit.client.qmp import VmGone
from lab import debian
from lab.scenario import wait_for

pytestmark = pytest.mark.timeout(700)  # it boots for a minute, and longer beside other work

_MEMORY = "768M"
#: Writes of random blocks, each read back and compared soon after, until it is stopped.
_FIO = (
    "fio --name=verify --filename=/var/tmp/fio.data --size=48m --rw=randwrite --bs=4k --direct=1 "
    "--ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_backlog=64 "
    "--fsync=32 --loops=1000000 --output=/var/tmp/fio.txt"
)


@dataclass
class Debian:
    """A Debian guest, wherever it runs."""

    bench: Bench
    image: Path
    disk: tuple[str, ...]
    shell: debian.Shell
    argv: list[str]
    vm: Watched

    @property
    def cid(self) -> int:
        """Its CID, which goes with it."""
        devices = self.vm.qmp.execute("query-devices")
        (cid,) = [d["properties"]["cid"] for d in devices if d["kind"] == "virtio-vsock"]
        return int(cid)

    @property
    def by_vsock(self) -> debian.Shell:
        return debian.Shell(self.shell.key, self.shell.netns, qmp=self.vm.qmp_path)

    def target(self) -> Watched:
        """A process on the other host that waits for it, and has the same image."""
        host = self.bench.other(self.vm)
        argv = ("--incoming", "defer", *self.disk)
        vm = self.bench.run(host, *argv, memory=_MEMORY)
        vm.qmp.execute("query-status")
        return vm

    def boot(self) -> None:
        """Start it, and wait until it can be reached."""
        self.vm = self.bench.run(self.bench.net.a, *self.argv, memory=_MEMORY)
        self.vm.wait_console("login:", 400)

    def fio_runs(self) -> bool:
        return self.shell.run("systemctl is-active verify || true").strip() == "active"

    def start_fio(self) -> None:
        self.shell.run(
            f"systemctl reset-failed verify 2>/dev/null; systemd-run --unit=verify {_FIO}"
        )
        wait_for(self.fio_runs, 60)

    def check_disk(self) -> None:
        """The guest is gone: its file system is whole."""
        argv = ["e2fsck", "-fn", str(self.image)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def replay(self) -> None:
        """The guest is gone as by a power cut: its journal makes the file system whole."""
        argv = ["e2fsck", "-fp", str(self.image)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        self.check_disk()


@pytest.fixture(scope="module")
def guest(bench: Bench) -> Iterator[Debian]:
    bench.drop_guest()
    image = debian.cached()
    assert image is not None, "no Debian image in the cache: run scripts/setup"
    disk = image.copy(bench.folder / "debian.raw")
    disk.chmod(0o600)
    key = debian.make_key(bench.folder)
    given = ("--disk", f"path={disk},discard=on", "--vsock", "cid=auto")
    argv = [*image.boot, *debian.identity("lab-guest", key), *given]
    vm = bench.run(bench.net.a, *argv, memory=_MEMORY)
    guest = Debian(bench, disk, given, debian.Shell(key, bench.net.client.netns), argv, vm)
    vm.wait_console("login:", 400)
    yield guest
    bench.drop_guest()
    disk.unlink()


def test_it_boots_and_knows_who_it_is(guest: Debian) -> None:
    shell = guest.shell
    assert shell.run("hostname").strip() == "lab-guest"
    as_op = debian.Shell(guest.shell.key, guest.shell.netns, "op")
    assert as_op.run("id -un").strip() == "op"
    assert "done" in shell.run("cloud-init status --wait", 300)
    assert shell.run("systemctl --failed --no-legend").strip() == ""
    assert shell.run("systemd-detect-virt").strip() == "kvm"
    assert shell.run("findmnt -no SOURCE /").strip() == "/dev/vda"


def test_it_is_reached_without_a_network(guest: Debian) -> None:
    shell = guest.by_vsock
    wait_for(lambda: shell.answers, 120)
    nic = "$(basename $(dirname /sys/class/net/*/device))"
    shell.run(f"ip link set {nic} down")
    assert shell.run("hostname").strip() == "lab-guest"
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as agent:
        agent.settimeout(60)
        agent.connect((guest.cid, 1234))
        agent.sendall(b'{"execute": "guest-get-host-name"}\n')
        assert json.loads(agent.makefile().readline()) == {"return": {"host-name": "lab-guest"}}
    shell.run(f"ip link set {nic} up")
    wait_for(lambda: guest.shell.answers, 120)


def test_it_moves_while_fio_writes_and_checks(guest: Debian) -> None:
    guest.start_fio()
    for _ in range(2):
        target = guest.target()
        guest.vm.start_migration(guest.bench.listen(target))
        info = guest.vm.wait_migration(120)
        assert info["status"] == "completed", info
        guest.bench.retire(guest.vm)
        guest.vm = target
        assert guest.by_vsock.run("hostname").strip() == "lab-guest"
        assert guest.fio_runs(), guest.shell.run("cat /var/tmp/fio.txt; journalctl -u verify -n 20")
    guest.shell.run("systemctl kill --signal=INT verify")
    wait_for(lambda: not guest.fio_runs(), 120)
    assert "err= 0" in guest.shell.run("cat /var/tmp/fio.txt")
    log = guest.shell.run("journalctl -k --no-pager")
    assert not [line for line in log.splitlines() if "vda" in line and "error" in line.lower()]
    (disk,) = [d for d in guest.vm.qmp.execute("query-devices") if d["kind"] == "virtio-blk"]
    assert disk["counters"]["errors"] == 0


#: Prints a PTP clock's time: FD_TO_CLOCKID of clock_getres(2).
_READ_PTP = "import os, time; print(time.clock_gettime(~os.open('/dev/ptp0', 0) << 3 | 3))"


def test_it_reads_the_hosts_clock(guest: Debian) -> None:
    """By ptp_kvm, of the host that it is on now: chrony keeps the time by that, with no network."""
    shell = guest.shell
    shell.run("modprobe ptp_kvm")
    assert shell.run("cat /sys/class/ptp/ptp0/clock_name").strip() == "KVM virtual PTP"
    before = time.time()
    read = float(shell.run(f'python3 -c "{_READ_PTP}"'))
    assert before <= read <= time.time()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Three kills, or with ``--whole`` twenty."""
    if "seed" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        # After it went, early at the source, and in the stop at the destination.
        metafunc.parametrize("seed", range(1, 21) if whole else (1, 2, 12))


def test_kills_at_random_moments_leave_one_guest_and_a_whole_disk(guest: Debian, seed: int) -> None:
    kill_one(guest, random.Random(seed))


def kill_one(guest: Debian, dice: random.Random) -> None:
    """Kill one end of a migration at a random moment: one guest is left, or none and its disk."""
    if not guest.vm.alive:
        guest.boot()
    if not guest.fio_runs():
        guest.start_fio()
    source, target = guest.vm, guest.target()
    uri = guest.bench.listen(target)
    source.start_migration(uri)
    victim = dice.choice((source, target))
    moment = dice.choice(("active", "device", "later"))
    if moment != "later":
        source.event("MIGRATION", lambda data: data["status"] == moment, 60)
    else:
        source.wait_migration(120)
    victim.kill()
    survivor = target if victim is source else source
    if victim is target:
        wait_for(lambda: _settled(source), 120)
    else:
        wait_for(lambda: _status(target) in ("gone", "running") or _waits_on(target, uri), 120)
    if _status(survivor) == "running":
        guest.vm = survivor
        assert guest.fio_runs(), guest.shell.run("cat /var/tmp/fio.txt; journalctl -u verify -n 20")
    else:
        for vm in (source, target):
            vm.close()
        guest.vm = victim
        guest.replay()


def _status(vm: Watched) -> str:
    """Its status, or 'gone': a destination ends if its source does between RAM and the commit."""
    try:
        return vm.status() if vm.alive else "gone"
    except VmGone:
        return "gone"


def _waits_on(target: Watched, uri: str) -> bool:
    """Whether no source is connected: one went before any RAM came, and another may come.

    A destination ends a connection whose source was killed only once it has dealt with that.
    """
    sockets = Path(f"/proc/{target.pid}/net/unix").read_text().splitlines()
    mine = [line.split() for line in sockets if line.endswith(uri.removeprefix("unix:"))]
    connected = [fields for fields in mine if fields[5] == "03"]
    return not connected and _status(target) == "inmigrate"


def _settled(source: Watched) -> bool:
    """Whether it is known where the guest is: it runs here, or went."""
    return source.status() in ("running", "postmigrate")


def test_it_powers_off_and_leaves_a_clean_disk(guest: Debian) -> None:
    if not guest.vm.alive:
        guest.boot()
    guest.vm.qmp.execute("system_powerdown")
    assert guest.vm.wait(240) == 0
    guest.check_disk()
