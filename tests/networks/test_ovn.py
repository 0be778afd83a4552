"""OVN: while a guest migrates, its port at the new host is shut until an untagged RARP comes out.

That is ``activation-strategy=rarp``: the port is bound to both chassis, and all other frames at the
new one are dropped. What the guest announces itself, gratuitous ARP and advertisements, opens
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from net_bench import DARK_S, GUEST, await_at, boot, dark, pings, qemu_pair
from vm_bench import Bench

from lab.agent import Agent
from lab.judge import announcements
from lab.networks.ovn import Ovn, ovn
from lab.scenario import MAC
from lab.traffic import ANNOUNCING, Capture


@pytest.fixture(scope="module")
def net(bench: Bench) -> Iterator[Ovn]:
    """The chassis, while no other guest needs the CPU."""
    bench.drop_guest()
    with ovn(MAC) as net:
        yield net
        bench.drop_guest()


def _both(net: Ovn) -> None:
    """Bind the guest's port as CMS does before a migration."""
    net.bind("a", "b", activation_strategy="rarp")
    assert not net.activated()


def test_the_port_at_the_new_host_opens_at_once(bench: Bench, net: Ovn) -> None:
    net.bind("a")
    target = await_at(bench, net.b)
    guest = boot(bench, net.a, Agent(GUEST[0], net.peer.netns), keep=[target])
    _both(net)
    with (
        pings(bench.folder, net.peer) as flows,
        Capture(net.b.netns, net.b.tap, bench.folder / "ovn.pcap", ANNOUNCING, "in") as capture,
    ):
        moved = bench.move(guest, target)
        seconds = dark(flows, moved.resumed)
        capture.stop()
        sent = announcements(capture.path, MAC)
        print(f"OVN, Godwit: after the resume dark for at most {seconds} s; sent:")
        for frame in sent[:8]:
            print(f"  {frame.at - moved.resumed:.3f} s: {frame.kind} {frame.address} {frame.vlans}")
        assert [frame for frame in sent if (frame.kind, frame.vlans) == ("RARP", ())]
        assert max(seconds.values()) < DARK_S
        assert net.activated() == "b"
        # CMS ends the migration, and the guest stays reachable.
        net.bind("b")
        for ping in flows:
            ping.wait_answer(time.time(), 30)


@pytest.mark.whole
def test_with_qemu_for_comparison(bench: Bench, net: Ovn) -> None:
    """The figures of QEMU, whatever they are."""
    net.bind("a")
    with qemu_pair(bench, net.a, net.b, Agent(GUEST[0], net.peer.netns)) as vms:
        _both(net)
        with pings(bench.folder, net.peer) as flows:
            seconds = dark(flows, vms.migrate())
    print(f"OVN, QEMU: after the resume dark for at most {seconds} s")
