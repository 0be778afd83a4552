"""EVPN, by FRR: a router reaches the guest by the route that the guest's new host makes.

The host makes that route of its gateway's neighbour entry. The kernel makes no entry of a
gratuitous ARP or unsolicited advertisement (arp_accept, accept_untracked_na: off by default), but
of a question to the gateway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
from net_bench import DARK_S, GUEST, await_at, boot, dark, pings, qemu_pair
from vm_bench import RECOVERS_S, Bench

from lab.agent import Agent
from lab.networks.evpn import GATEWAY, Evpn, evpn
from lab.networks.parts import wait

#: Four such ways lie between the guest's first frame and the new host's next chance, milliseconds.
_DELAY_MS = 80


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
        wait(f"the route to {address} by A", partial(net.at, net.a, address))


def _migrate(bench: Bench, net: Evpn) -> dict[str, float]:
    """Migrate the guest to the other host, and return each family's dark time, in seconds."""
    guest = bench.guest
    if guest is None:
        target = await_at(bench, net.b)
        guest = boot(bench, net.a, _agent(net), keep=[target])
        _known(net, guest.agent)
    else:
        target = await_at(bench, net.a if guest.vm.host is net.b else net.b)
        target.qmp.execute("query-status")
    with pings(bench.folder, net.peer) as flows:
        moved = bench.move(guest, target)
        seconds = dark(flows, moved.resumed)
    print(f"EVPN, Godwit: after the resume dark for at most {seconds} s")
    if max(seconds.values()) < math.inf:
        assert all(net.at(target.host, address) for address in GUEST)
    return seconds


def test_a_peer_behind_a_router_reaches_the_guest_again_at_once(bench: Bench, net: Evpn) -> None:
    assert max(_migrate(bench, net).values()) < DARK_S


def test_a_fabric_that_is_slow_to_forget_where_the_guest_was(bench: Bench, net: Evpn) -> None:
    """Until the new host has heard that the guest left the old one, each question is in vain.

    Its kernel does not touch a neighbour entry that zebra made for a guest elsewhere.
    """
    with net.slow(_DELAY_MS):
        assert max(_migrate(bench, net).values()) < RECOVERS_S


@pytest.mark.whole
def test_with_qemu_for_comparison(bench: Bench, net: Evpn) -> None:
    """The figures of QEMU, whatever they are."""
    agent = _agent(net)
    with qemu_pair(bench, net.a, net.b, agent) as vms:
        _known(net, agent)
        with pings(bench.folder, net.peer) as flows:
            seconds = dark(flows, vms.migrate())
    print(f"EVPN, QEMU: after the resume dark for at most {seconds} s")
