"""virtio-rng with a stock driver: the guest reads from it, migrates, and reads on."""

from __future__ import annotations

import pytest
from vm_bench import Bench

from lab.agent import Agent

_RNG = ("--rng", "id=dice,max-bytes=65536,period=100")


def _read(agent: Agent, count: int = 64) -> bytes:
    """Random bytes, as the guest read them from the device."""
    text = agent.sh(f"dd if=/dev/hwrng bs={count} count=1 2>/dev/null | od -An -v -tx1", 60)
    return bytes.fromhex(text.replace("\n", " "))


@pytest.mark.parametrize("kernel", ["cloud-6.12", "cloud-6.1"])
def test_a_guest_reads_random_numbers_here_and_there(bench: Bench, kernel: str) -> None:
    target = bench.run(bench.net.b, "--incoming", "defer", *_RNG)
    guest = bench.boot(*_RNG, kernel=kernel, keep=[target])
    agent = guest.agent
    agent.sh("modprobe virtio_rng")
    assert agent.sh("cat /sys/class/misc/hw_random/rng_current").strip().startswith("virtio_rng")
    before = _read(agent)
    assert len(before) == 64
    assert len(set(before)) > 16
    target.qmp.execute("query-status")
    moved = bench.move(guest, target)
    after = _read(agent)
    assert len(after) == 64
    assert len(set(after)) > 16
    assert after != before
    assert moved.info["status"] == "completed"
    assert target.news("GUEST_ERROR") == []


def test_a_destination_without_it_refuses_by_name(bench: Bench) -> None:
    target = bench.run(bench.net.b, "--incoming", "defer")
    guest = bench.boot(*_RNG, keep=[target])
    guest.vm.start_migration(bench.listen(target))
    info = guest.vm.wait_migration()
    assert info["status"] == "failed"
    assert "device dice (virtio-rng): at the source, missing here" in info["error-desc"]
    guest.agent.ping(60)
