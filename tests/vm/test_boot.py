"""Stock kernels boot, are on the network, announce nothing by themselves, and end as they say."""

from __future__ import annotations

import re
import subprocess
import sys

from vm_bench import Bench, Guest, rarps

from lab import kernels
from lab.guest import CMDLINE, READY
from lab.judge import announcements
from lab.scenario import MAC, wait_for


def _boots(bench: Bench, kernel: str, cpus: int) -> Guest:
    """All vCPUs are there, six flows answer, and a cold boot is not announced."""
    with bench.capture("boot") as capture:
        guest = bench.boot(kernel=kernel, cpus=cpus)
        assert guest.agent.cpus() == cpus
        _one_socket(guest, cpus)
        assert guest.vm.status() == "running"
        bench.answers()
        capture.stop()
    # While it configures its interfaces, a guest may say what it likes.
    assert [f for f in announcements(capture.path, MAC) if f.at > guest.ready] == []
    assert rarps(capture.path) == []
    assert not guest.vm.news("ANNOUNCE_STARTED", "ANNOUNCE_HOST", "ANNOUNCE_ACKED")
    return guest


def _one_socket(guest: Guest, cpus: int) -> None:
    """As the guest's scheduler sees it: all vCPUs in one package, the last cache is theirs all."""
    cpu0 = "/sys/devices/system/cpu/cpu0"
    everyone = f"0-{cpus - 1}"
    lists = guest.agent.sh(f"cat {cpu0}/topology/package_cpus_list {cpu0}/topology/core_cpus_list")
    assert lists.split() == [everyone, "0"]
    caches = guest.agent.sh(f"cat {cpu0}/cache/index*/shared_cpu_list").split()
    assert not caches or caches[-1] == everyone


def _ended(guest: Guest, code: int, reason: str) -> None:
    assert guest.vm.wait(90) == code
    (event,) = guest.vm.news("SHUTDOWN")
    assert event["data"] == {"guest": True, "reason": reason}


def test_6_1_cloud_loses_no_console_output_and_powers_off(bench: Bench) -> None:
    guest = _boots(bench, "cloud-6.1", 2)
    count = 500
    loop = f'i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo "line $i"; done >/dev/ttyS0'
    guest.agent.sh(loop, 90)
    printed = guest.vm.wait_console(f"line {count}\r\n")
    assert [int(n) for n in re.findall(r"^line (\d+)\r$", printed, re.M)] == [*range(1, count + 1)]
    guest.agent.power_off()
    _ended(guest, 0, "guest-shutdown")


def test_6_12_cloud_with_eight_cpus_reboots_and_crashes(bench: Bench) -> None:
    guest = _boots(bench, "cloud-6.12", 8)
    vm = guest.vm
    vm.mark()
    guest.agent.reboot()
    assert vm.event("RESET")["data"] == {"guest": True, "reason": "guest-reset"}
    wait_for(lambda: vm.console.count(READY) == 2, 120)
    guest.agent.ping(60)
    assert guest.agent.cpus() == 8
    assert vm.transitions() == [("running", "prelaunch"), ("prelaunch", "running")]

    guest.agent.crash()
    _ended(guest, 4, "guest-panic")
    assert vm.transitions()[-1] == ("running", "guest-panicked")


def test_a_tap_that_is_none_ends_a_guest_that_has_its_head_start(bench: Bench) -> None:
    kernel = kernels.get("cloud-6.12")
    argv = [sys.executable, "-m", "godwit.cli.main", "run", "--kernel", str(kernel.vmlinuz)]
    argv += ["--memory", "128M", "--append", CMDLINE, "--nic", "tap=lo"]  # which is no tap
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=90)
    assert done.returncode == 1
    assert b"tap 'lo'" in done.stderr
    assert done.stdout == b""  # nothing of the guest was seen


def test_6_12_full_obeys_the_power_button(bench: Bench) -> None:
    guest = _boots(bench, "full-6.12", 2)
    guest.vm.qmp.execute("system_powerdown")
    _ended(guest, 0, "guest-shutdown")
