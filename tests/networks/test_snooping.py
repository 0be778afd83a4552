"""A switch that snoops learns at once where a group's member has gone, before its next query."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from vm_bench import RECOVERS_S, Bench

from lab.addresses import LANS
from lab.networks.arpwatch import ArpWatch
from lab.networks.peers import reach
from lab.networks.snooping import GROUPS, forget, members, snooping
from lab.scenario import wait_for
from lab.traffic import Flow, Sender

_NICS = [
    pytest.param("", id="guest announces"),
    pytest.param("guest-announce=off", id="host announces"),
]
_RATE = 50
_IPV6 = LANS[0].guest[1]
_FLOWS = [Flow(80 + n, "group", 0, "", group, "") for n, group in enumerate(GROUPS)]


@pytest.fixture(autouse=True)
def _switch(bench: Bench) -> Iterator[None]:
    """A switch that snoops, and a client that sends to the groups on its untagged network."""
    routes = [
        ("-4", "route", "add", f"{GROUPS[0]}/32", "dev", "net0"),
        ("-6", "route", "add", "multicast", f"{GROUPS[1]}/128", "dev", "net0", "table", "local"),
    ]
    for words in routes:
        bench.client_ip(*words)
    try:
        with snooping(bench.net):
            yield
    finally:
        for words in routes:
            bench.client_ip(*[word if word != "add" else "del" for word in words])


@pytest.mark.parametrize("nic", _NICS)
def test_a_group_follows_its_member(bench: Bench, arpwatch: ArpWatch, nic: str) -> None:
    guest = bench.traveller(nic)
    ports = {bench.net.a.netns: "pa", bench.net.b.netns: "pb"}
    target = bench.target(guest)
    for group in GROUPS:
        guest.agent.join(group)
    old, new = ports[guest.vm.host.netns], ports[target.host.netns]
    wait_for(lambda: all(old in members(bench.net, group) for group in GROUPS), 30)
    for group in GROUPS:  # the last test's guest may have answered the first query before its end
        if new in members(bench.net, group):
            forget(bench.net, group, new)
    assert not any(new in members(bench.net, group) for group in GROUPS)
    guest.agent.reset_flows()
    with Sender(bench.net.client.netns, bench.folder, _RATE, _FLOWS) as sender:
        wait_for(lambda: set(guest.agent.flows()) >= {flow.id for flow in _FLOWS}, 30)
        moved = bench.move(guest, target)
        joined: dict[str, float] = {}

        def all_joined() -> bool:
            for group in set(GROUPS) - set(joined):
                if new in members(bench.net, group):
                    joined[group] = time.time() - moved.resumed
            return len(joined) == len(GROUPS)

        # The stream is at the guest again, too: by its own clock, the longest silence.
        wait_for(all_joined, 30)
        seen = {flow: counted.max_seq for flow, counted in guest.agent.flows().items()}
        wait_for(
            lambda: all(f.max_seq > seen[f.id] + _RATE for f in guest.agent.flows().values()), 30
        )
        counted = guest.agent.flows()
        sender.stop()
    # Whoever asks for the guest's IPv6 address asks a group of the guest's (RFC 4861, 7.2.2).
    bench.client_ip("neigh", "flush", "to", _IPV6)
    reach(bench.net.client.netns, _IPV6, int(RECOVERS_S))
    assert max(joined.values()) < RECOVERS_S, joined
    for flow in _FLOWS:
        assert counted[flow.id].longest_gap_us < RECOVERS_S * 1e6, (flow, joined)
    assert arpwatch.changes() == []
