"""EVPN, by FRR: a router reaches the guest by the route that the guest's new host makes.

The host makes that route of its gateway's neighbour entry. The kernel makes no entry of a
gratuitous ARP or unsolicited advertisement (arp_accept, accept_untracked_na: off by default), but
of a question to the gateway.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from net_bench import DARK_S, GUEST, await_at, boot, dark, pings, qemu_pair
from vm_bench import Bench

from lab.agent import Agent
from lab.networks.evpn import GATEWAY, Evpn, evpn
from lab.networks.parts import wait


@pytest.fixture(scope="module")
def net(bench: Bench) -> Iterator[Evpn]:
    """The fabric, while no other guest needs the CPU."""
    bench.drop_guest()
    with evpn() as net:
        yield net
        bench.drop_guest()


def _agent(net: Evpn) -> Agent:
    return Agent(GUEST[0], net.a.netns, device=net.a.bridge)


def _known(net: Evpn, agent: Agent) -> None:
    """Have the guest use its gateways, and wait until the border knows where it is."""
    for gateway in GATEWAY:
        agent.sh(f"ip route add default via {gateway} && ping -c 1 {gateway}")
    for address in GUEST:
        wait(f"the route to {address} by A", lambda address=address: net.at(net.a, address))


def test_a_peer_behind_a_router_reaches_the_guest_again_at_once(bench: Bench, net: Evpn) -> None:
    target = await_at(bench, net.b)
    agent = _agent(net)
    guest = boot(bench, net.a, agent, keep=[target])
    _known(net, agent)
    with pings(bench.folder, net.peer) as flows:
        moved = bench.move(guest, target)
        seconds = dark(flows, moved.resumed)
    print(f"EVPN, Godwit: after the resume dark for at most {seconds} s")
    assert max(seconds.values()) < DARK_S
    assert all(net.at(net.b, address) for address in GUEST)


@pytest.mark.whole
def test_with_qemu_for_comparison(bench: Bench, net: Evpn) -> None:
    """The figures of QEMU, whatever they are."""
    agent = _agent(net)
    with qemu_pair(bench, net.a, net.b, agent) as vms:
        _known(net, agent)
        with pings(bench.folder, net.peer) as flows:
            seconds = dark(flows, vms.migrate())
    print(f"EVPN, QEMU: after the resume dark for at most {seconds} s")
