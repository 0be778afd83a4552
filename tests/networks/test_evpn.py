"""EVPN, by FRR: a router reaches the guest by the route that the guest's new host makes.

The host makes that route of its gateway's neighbour entry. The kernel makes no entry of a
gratuitous ARP or unsolicited advertisement (arp_accept, accept_untracked_na: off by default), but
of a question to the gateway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from net_bench import DARK_S, await_at, boot, dark_s, ping
from vm_bench import Bench

from lab.agent import Agent
from lab.networks.evpn import GATEWAY, Evpn, evpn
from lab.networks.parts import wait

_GUEST = ("10.0.0.2", "fd00::2")


@pytest.fixture(scope="module")
def net(bench: Bench) -> Iterator[Evpn]:
    """The fabric, while no other guest needs the CPU."""
    bench.drop_guest()
    with evpn() as net:
        yield net
        bench.drop_guest()


def test_a_peer_behind_a_router_reaches_the_guest_again_at_once(bench: Bench, net: Evpn) -> None:
    target = await_at(bench, net.b)
    agent = Agent(_GUEST[0], net.a.netns, device=net.a.bridge)
    guest = boot(bench, net.a, agent, keep=[target])
    for gateway in GATEWAY:
        agent.sh(f"ip route add default via {gateway} && ping -c 1 {gateway}")
    for address in _GUEST:
        wait(f"the route to {address} by A", lambda a=address: net.at(net.a, a))
    with ExitStack() as stack:
        pings = [
            stack.enter_context(ping(bench, net.peer, address, number))
            for number, address in enumerate(_GUEST)
        ]
        for one in pings:
            one.wait_answer(0.0, 60)
        moved = bench.move(guest, target)
        dark = {one.flow.family: dark_s(one, moved.resumed) for one in pings}
    print(f"EVPN, Godwit: dark for {dark} s after the resume")
    assert all(seconds < DARK_S for seconds in dark.values()), dark
    assert all(net.at(net.b, address) for address in _GUEST)
