"""Moves that succeed: ten in a row, and one by the command line."""

from __future__ import annotations

import subprocess
import sys

from vm_bench import Bench, Guest

from lab import clocks

_CLOCK_S = 0.2


def test_ten_moves_in_a_row_keep_memory_and_clock(bench: Bench, guest: Guest) -> None:
    agent = guest.agent
    targets = bench.targets(guest, 10)
    checksum = agent.mem_start(16)
    agent.hot_start(8)
    source = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
    clocksource = agent.sh(source)
    before = clocks.read(agent).realtime
    for target in targets:
        moved = bench.move(guest, target)
        passes = agent.hot_check()  # its chain would have broken at a page of another time
        assert moved.info["status"] == "completed"
    assert passes > 0
    assert agent.hot_stop() > 0
    assert agent.mem_check() == checksum
    assert abs(clocks.read(agent).realtime - before) < _CLOCK_S
    assert agent.sh(source) == clocksource
    assert agent.sh("dmesg | grep -i -e unstable -e stall -e lockup || true") == ""
    assert agent.cpus() == 2


def test_the_command_line_moves_a_guest_and_reports(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest)
    uri = bench.listen(target, f"tcp:{target.host.management}:4444")
    guest.vm.mark()
    argv = [sys.executable, "-m", "godwit.cli.main", "migrate", "--insecure"]
    argv += ["--qmp", str(guest.vm.qmp_path), uri]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for word in ("downtime", "total time", "prelaunch-migrate > running"):
        assert word in done.stdout
    bench.moved(guest, target, guest.vm.qmp.execute("query-migrate"))
    guest.agent.ping()
