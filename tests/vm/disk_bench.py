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
