"""A guest whose RAM is a memfd: it boots, and migrates to and from private RAM."""

from __future__ import annotations

import os

from vm_bench import Bench

_SHARED = "128M,shared=on"


def _memfd(pid: int) -> list[str]:
    """The process' descriptors that are guest RAM."""
    folder = f"/proc/{pid}/fd"
    links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    return [link for link in links if "godwit-guest-ram" in link]


def test_a_guest_goes_from_a_memfd_to_private_ram_and_back(bench: Bench) -> None:
    there = bench.run(bench.net.b, "--incoming", "defer")
    guest = bench.boot(keep=[there], memory=_SHARED)
    assert len(_memfd(guest.vm.pid)) == 1
    checksum = guest.agent.mem_start(32)
    there.qmp.execute("query-status")
    back = bench.run(bench.net.a, "--incoming", "defer", memory=_SHARED)
    back.qmp.execute("query-status")
    first = bench.move(guest, there)
    assert guest.agent.mem_check() == checksum
    assert _memfd(there.pid) == []
    bench.move(guest, back)
    assert guest.agent.mem_check() == checksum
    assert len(_memfd(back.pid)) == 1
    # Pages that nobody touched were not sent: a guest of 128 MB has some 80 MB of them.
    assert first.info["ram"]["transferred"] < 128 << 20
    bench.answers()
