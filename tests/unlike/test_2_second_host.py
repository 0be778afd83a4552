"""On the second host, whose CPU has less: one guest is refused with the names of what it misses.

The other one, with the CPU of a level that both hosts have, goes on and sees no other CPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vm_bench import Bench, Guest

from lab.agent import Agent

_GODWIT = (sys.executable, "-m", "godwit.cli.main")


def _here(bench: Bench, path: Path) -> Path:
    """A copy in this host's own memory: Landlock knows files by inodes, and a 9p share has others
    at each look."""
    return Path(shutil.copy(path, bench.folder / path.name))


def test_a_guest_that_was_told_more_is_refused_by_name(bench: Bench, between: Path) -> None:
    vm = bench.run(bench.net.b, "--incoming", f"file:{_here(bench, between / 'host')}")
    assert vm.wait(60) == 1
    assert "the guest was told" in vm.console
    assert "UMIP" in vm.console
    assert "this CPU has none" in vm.console


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_a_guest_of_a_level_goes_on_and_sees_the_same_cpu(
    bench: Bench, between: Path, level: str
) -> None:
    bench.drop_guest()
    vm = bench.run(bench.net.b, "--incoming", f"file:{_here(bench, between / level)}")
    vm.qmp.execute("query-status")
    vm.event("RESUME")
    agent = Agent("10.0.0.2", bench.net.client.netns)
    agent.ping(60)
    guest = bench.guest = Guest(vm, agent, 0.0)
    told = (between / f"{level}.cpuid").read_text()
    assert agent.cpuid() == told
    assert agent.sh("grep -m1 'model name' /proc/cpuinfo").count(f"Godwit {level}") == 1
    # A host that got the CPU itself hands it on.
    target = bench.run(bench.net.a, "--incoming", "defer")
    target.qmp.execute("query-status")
    bench.move(guest, target)
    assert agent.cpuid() == told
    bench.answers()


def test_the_hosts_have_a_baseline_and_the_first_alone_does_not_do(
    bench: Bench, between: Path
) -> None:
    for name, files in (("both", ("first", "second")), ("one", ("first",))):
        with (between / "second.json").open("wb") as file:
            subprocess.run([*_GODWIT, "cpu", "describe"], stdout=file, check=True)
        given = [between / f"{one}.json" for one in files]
        with (between / f"{name}.json").open("wb") as file:
            subprocess.run([*_GODWIT, "cpu", "baseline", *given], stdout=file, check=True)
    refused = bench.run(
        bench.net.a, "--incoming", "defer", "--cpu", str(_here(bench, between / "one.json"))
    )
    assert refused.wait(60) == 1
    assert "UMIP" in refused.console
    guest = bench.boot("--cpu", str(_here(bench, between / "both.json")), deadline=180.0)
    assert guest.agent.cpus() == 2
