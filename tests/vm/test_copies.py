"""A guest that is saved and runs on, its copies, and guests whose RAM is the file itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from test_snapshots import _full
from vm_bench import ONE_BACKEND, Bench, Guest, Watched, announced, stamp

from lab import clocks, kernels
from lab import guest as guest_image
from lab.network import Host
from lab.scenario import wait_for

#: Where RAM begins in an uncompressed snapshot, and the bytes with one checksum.
_RAM_AT, _CHUNK = 2 << 20, 256 << 10
_CLONES = 10
#: A guest's clock is right by so much, seconds.
_RIGHT_S = 1.0


def _godwit_save(vm: Watched, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    vm.mark()
    command = [sys.executable, "-m", "godwit.cli.main", "save", "--qmp", str(vm.qmp_path)]
    return subprocess.run(
        [*command, *options, str(path)], capture_output=True, text=True, timeout=120, check=False
    )


def _start_restored(
    bench: Bench, host: Host, path: Path, *arguments: str, nic: str = ""
) -> Watched:
    """Load a guest, and start it once somebody listens to the events of that."""
    vm = bench.run(host, "--incoming", f"file:{path}", "--no-autostart", *arguments, nic=nic)
    wait_for(lambda: vm.status() == "prelaunch-migrate", 60)
    vm.qmp.execute("cont")
    return vm


def _restore(bench: Bench, guest: Guest, path: Path, *arguments: str) -> Watched:
    """Restore the guest on the other host; it answers."""
    vm = _start_restored(bench, bench.other(guest.vm), path, *arguments, nic=guest.nic)
    guest.vm = vm
    guest.agent.ping(60)
    return vm


def test_a_guest_runs_on_while_it_is_saved(bench: Bench, guest: Guest) -> None:
    agent, vm = guest.agent, guest.vm
    checksum = agent.mem_start(16)
    agent.hot_start(8)
    path = bench.folder / "copy"
    # A stop is compared with a migration's, of the same guest under the same load.
    done = _godwit_save(vm, path, "--keep-running")
    assert done.returncode == 0, done.stderr
    info = vm.qmp.execute("query-migrate")
    assert vm.transitions() == [("running", "save-vm"), ("save-vm", "running")]
    assert vm.news("STOP", "RESUME")
    assert not vm.news("ANNOUNCE_STARTED"), "nothing has moved"
    assert agent.hot_check() > 0
    assert path.stat().st_mode & 0o777 == 0o600
    moved = bench.move(guest, bench.target(guest))
    stop, downtime = info["godwit"]["downtime-ms"], moved.info["godwit"]["downtime-ms"]
    print(f"the stop: {stop:.1f} ms, a migration's: {downtime:.1f} ms")
    print(info["godwit"]["stop-phases"])
    assert stop <= 1.5 * downtime + 5
    assert agent.hot_stop() > 0
    assert agent.mem_check() == checksum
    # The copy is as the guest was: its threads and its memory.
    assert guest.vm.quit() == 0
    vm = _restore(bench, guest, path)
    announced(vm)
    states = vm.qmp.execute("query-migrate")["godwit"]["runstates"]
    assert states == ["prelaunch", "inmigrate", "restore-vm", "prelaunch-migrate", "running"]
    assert agent.hot_stop() > 0
    assert agent.mem_check() == checksum
    bench.answers()


@ONE_BACKEND
def test_a_guest_that_does_not_run_on_takes_its_vm_along(bench: Bench, guest: Guest) -> None:
    vm, path = guest.vm, bench.folder / "along"
    done = _godwit_save(vm, path)
    assert done.returncode == 0, done.stderr
    assert vm.wait(60) == 0
    assert f"--incoming file:{path} brings it back" in vm.console
    assert vm.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
    _restore(bench, guest, path)


@ONE_BACKEND
def test_a_save_that_fails_leaves_the_guest_running(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    with _full(bench) as folder:
        done = _godwit_save(vm, folder / "guest", "--keep-running")
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert list(folder.iterdir()) == []
    assert vm.status() == "running"
    assert not vm.news("ANNOUNCE_STARTED")
    guest.agent.ping()


@ONE_BACKEND
def test_a_compressed_guest_comes_back(bench: Bench, guest: Guest) -> None:
    pytest.importorskip("zstandard")
    checksum = guest.agent.mem_start(8)
    small, large = bench.folder / "small", bench.folder / "large"
    assert _godwit_save(guest.vm, large, "--keep-running").returncode == 0
    done = _godwit_save(guest.vm, small, "--compress", "zstd")
    assert done.returncode == 0, done.stderr
    print(f"{large.stat().st_blocks * 512} bytes, compressed {small.stat().st_size}")
    assert small.stat().st_size < large.stat().st_blocks * 512
    large.unlink()
    _restore(bench, guest, small)
    assert guest.agent.mem_check() == checksum


# --- lazily ---------------------------------------------------------------------------------------
def test_a_guest_whose_ram_is_the_file_lives_as_any_other(bench: Bench, guest: Guest) -> None:
    agent, path = guest.agent, bench.folder / "lazy"
    checksum = agent.mem_start(16)
    assert _godwit_save(guest.vm, path).returncode == 0
    kernel = kernels.cached("cloud-6.12")
    assert kernel is not None
    image = ("--kernel", str(kernel.vmlinuz), "--initrd", str(guest_image.build(kernel)))
    boot = (*image, "--append", guest_image.CMDLINE)
    vm = _restore(bench, guest, path, "--restore", "lazy", *boot)
    announced(vm)
    # It migrates with pages that nobody has touched here, and is saved with them.
    again = bench.folder / "again"
    assert _godwit_save(vm, again, "--keep-running").returncode == 0
    bench.move(guest, bench.target(guest))
    assert agent.mem_check() == checksum
    assert guest.vm.quit() == 0
    vm = _restore(bench, guest, again)
    assert agent.mem_check() == checksum
    assert vm.quit() == 0
    # After a reboot nothing of the file is left.
    vm = _restore(bench, guest, path, "--restore", "lazy", *boot)
    vm.mark()
    agent.reboot()
    vm.event("RESET")
    vm.wait_console(guest_image.READY, 120)
    agent.ping(60)
    assert "mem" not in agent.sh("dmesg | grep -i -e 'bad page' -e corrupt || true")
    # Who wants the file gets it once the guest has a copy, long before the lease is broken.
    begun = time.monotonic()
    with open(path, "r+b") as file:
        file.truncate(0)
    assert time.monotonic() - begun < 20
    agent.ping(60)


@ONE_BACKEND
def test_ram_that_was_altered_stops_the_guest(bench: Bench, guest: Guest) -> None:
    path = bench.folder / "altered"
    assert _godwit_save(guest.vm, path).returncode == 0
    at = _RAM_AT + (16 << 20) + 4321
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    host = bench.other(guest.vm)
    vm = bench.run(host, "--incoming", f"file:{path}", "--restore", "lazy", nic=guest.nic)
    assert vm.wait(60) == 5
    assert f"(offset {at // _CHUNK * _CHUNK}) was altered" in vm.console
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([byte]))
    _restore(bench, guest, path)


def _pss(vm: Watched) -> int:
    """Return the proportional set size of a process, bytes."""
    text = Path(f"/proc/{vm.pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.whole
@ONE_BACKEND
def test_ten_clones_share_their_pages(bench: Bench, guest: Guest) -> None:
    path = bench.folder / "shared"
    guest.agent.mem_fill(16)
    assert _godwit_save(guest.vm, path).returncode == 0
    size = path.stat().st_blocks * 512
    host = bench.other(guest.vm)
    for name in ("lazy", "full"):
        vms = []
        for _ in range(_CLONES):
            vm = _start_restored(bench, host, path, "--restore", name, nic=guest.nic)
            vms.append(vm)
        found = [_pss(vm) >> 20 for vm in vms]
        print(f"{name}: PSS of {_CLONES} clones of {size >> 20} MiB: {found} MiB, {sum(found)}")
        for vm in vms:
            assert vm.quit() == 0
    assert _restore(bench, guest, path)


def _rests(vm: Watched) -> bool:
    """Whether a VM's process uses no CPU for a while."""
    used = []
    for _ in range(2):
        used.append(Path(f"/proc/{vm.pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        time.sleep(0.5)
    return used[0] == used[1]


@pytest.mark.whole
def test_the_first_instruction_does_not_wait_for_all_of_ram(bench: Bench) -> None:
    guest = bench.boot(memory="2G")
    guest.agent.mem_fill(1500)
    path = bench.folder / "big"
    vm = guest.vm
    assert _godwit_save(vm, path).returncode == 0
    took: dict[str, list[float]] = {"full": [], "lazy": []}
    for name in ("full", "lazy", "full", "lazy"):
        args = ("--incoming", "defer", "--restore", name)
        vm = bench.run(bench.net.b, *args, memory="2G")
        vm.qmp.execute("query-status")
        wait_for(partial(_rests, vm), 60)  # it waits for a guest, and does nothing else
        begun = time.time()
        vm.qmp.execute("migrate-incoming", {"uri": f"file:{path}"})
        took[name].append(stamp(vm.event("RESUME", deadline=120)) - begun)
        ms, size = took[name][-1] * 1000, path.stat().st_blocks * 512 >> 20
        print(f"{name}: {ms:.0f} ms for {size} MiB")
        assert vm.quit() == 0
    path.unlink()
    bench.drop_guest()
    assert min(took["lazy"]) < min(took["full"]) / 10


# --- clocks ---------------------------------------------------------------------------------------
def _wall(guest: Guest) -> float:
    """Return how far the guest's wall clock is ahead of this host's, seconds."""
    return clocks.read(guest.agent).realtime


@ONE_BACKEND
def test_the_clock_of_a_restored_guest_is_frozen_or_right(bench: Bench, guest: Guest) -> None:
    path = bench.folder / "clock"
    before = _wall(guest)
    assert _godwit_save(guest.vm, path).returncode == 0
    saved = time.time()
    vm = _restore(bench, guest, path)
    away = stamp(vm.event("RESUME")) - saved
    frozen = _wall(guest)
    assert before - frozen >= away - 0.2
    assert vm.quit() == 0
    vm = _restore(bench, guest, path, "--restore-clock", "now")
    assert abs(_wall(guest) - before) < _RIGHT_S
    host = time.time()
    date = int(guest.agent.sh("date +%s"))
    assert abs(date - host - before) < _RIGHT_S + 1
    print(f"away {away:.1f} s: frozen {frozen - before:.3f} s, now {_wall(guest) - before:.3f} s")
    guest.agent.sh("modprobe ptp_kvm")
    assert guest.agent.sh("cat /sys/class/ptp/ptp0/clock_name").strip() == "KVM virtual PTP"
    log = guest.agent.sh("dmesg | grep -i -e unstable -e lockup -e stall || true")
    assert not log


@ONE_BACKEND
def test_a_guest_that_was_stopped_has_the_right_time(bench: Bench, guest: Guest) -> None:
    """As QEMU's with its TSC for a clock; docs/snapshots.md has the difference."""
    before = _wall(guest)
    vm = guest.vm
    vm.mark()
    vm.qmp.execute("stop")
    stopped = stamp(vm.event("STOP"))
    while time.time() < stopped + 3:
        time.sleep(0.1)
    vm.qmp.execute("cont")
    guest.agent.ping(60)
    assert abs(_wall(guest) - before) < 0.1


def test_nothing_is_left_beside_the_files(bench: Bench) -> None:
    assert not [name for name in os.listdir(bench.folder) if name.endswith(".partial")]
