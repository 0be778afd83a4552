"""Disks of guests: an image that is read on both sides, and a guest that writes all the time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.agent import Agent
from lab.scenario import wait_for

SIZE = 8 << 20


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_inside(agent: Agent) -> str:
    """Of the disk itself, not of what the guest has cached."""
    agent.sh("sync; echo 3 > /proc/sys/vm/drop_caches")
    return agent.sh("sha256sum /dev/vda", 120).split()[0]


def ends_come_to_who_asked(agent: Agent) -> None:
    """Each vCPU has a queue, whose interrupt comes to that vCPU alone."""
    for cpu in range(agent.cpus()):
        before = _interrupts(agent)
        agent.sh(f"taskset {1 << cpu:x} dd if=/dev/vda of=/dev/null bs=4k count=32 iflag=direct")
        came = [now - then for now, then in zip(_interrupts(agent), before, strict=True)]
        assert came[cpu] >= 32
        assert sum(came) == came[cpu], f"reads by vCPU {cpu}: interrupts {came}"


def _interrupts(agent: Agent) -> list[int]:
    """Of the disk's queues, at each vCPU."""
    lines = agent.sh("grep -e -req /proc/interrupts").splitlines()
    rows = [[int(word) for word in line.split()[1 : 1 + agent.cpus()]] for line in lines]
    assert len(rows) == agent.cpus(), lines
    return [sum(column) for column in zip(*rows, strict=True)]


@contextmanager
def writing(agent: Agent, waits: bool = False) -> Iterator[None]:
    """While the block runs, the guest writes, one request after the other; no write fails."""
    agent.sh(
        "(n=0; while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/dev/vda bs=64k seek=64 count=8 "
        "conv=fsync 2>/dev/null || touch /tmp/broken; n=$((n+1)); echo $n > /tmp/rounds; done) "
        "> /dev/null 2>&1 &"
    )
    if not waits:
        goes_on(agent)
    yield
    goes_on(agent)
    agent.sh("touch /tmp/stop")
    wait_for(lambda: agent.sh("ps | grep -c '[d]d if=' || true").strip() == "0", 30)
    agent.sh("[ ! -e /tmp/broken ]; rm /tmp/stop")


def goes_on(agent: Agent) -> None:
    """The guest that writes has done so some times more."""
    before = _rounds(agent)
    wait_for(lambda: _rounds(agent) > before + 2, 60)


def _rounds(agent: Agent) -> int:
    return int(agent.sh("cat /tmp/rounds 2>/dev/null || echo 0") or 0)
