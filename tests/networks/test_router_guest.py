"""A guest that is an IPv6 router stays one for its hosts, whoever announces it.

A neighbour advertisement without the router flag would take the default route from every host that
learned it from the guest (RFC 4861, 7.2.5).
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from vm_bench import Bench, recovered

from lab import kernels
from lab.networks import programs, router
from lab.networks.arpwatch import ArpWatch
from lab.networks.claims import CLAIMING, claims
from lab.networks.parts import wait
from lab.networks.segment_host import segment_host
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import Capture, Flow, Ping

_NICS = [
    pytest.param("", id="guest announces"),
    pytest.param("guest-announce=off", id="host announces"),
]


@pytest.mark.parametrize("nic", _NICS)
def test_hosts_keep_their_default_route(bench: Bench, arpwatch: ArpWatch, nic: str) -> None:
    kernel = kernels.cached("cloud-6.12")
    assert kernel is not None
    target = bench.run(bench.net.b, "--incoming", "defer", nic=nic)
    guest = bench.boot(nic=nic, initrd=programs.build(kernel, "radvd"), keep=[target])
    target.qmp.execute("migrate-set-parameters", {"announce-deadline": 10_000})
    client = bench.net.client.netns
    way_back = ("-6", "route", "add", f"{router.PREFIX}/64", "via", "fd00:100::2")
    with ExitStack() as stack:
        host = stack.enter_context(segment_host(bench.net, "ra", router_advertisements=True))
        bench.client_ip(*way_back)
        stack.callback(bench.client_ip, *[w if w != "add" else "del" for w in way_back])
        router.start_in_guest(guest.agent)
        wait("the host has an address", lambda: bool(router.address(host)))
        learned = router.default_routes(host)
        assert len(learned) == 1, learned
        flow = Flow(90, "through the guest", 100, "ipv6", router.BEHIND, "")
        ping = stack.enter_context(Ping(host.netns, flow, bench.folder, 0.05))
        ping.wait_answer(0.0, 60)
        watch = stack.enter_context(router.RouteWatch(host, bench.folder))
        path = bench.folder / "router.pcap"
        capture = stack.enter_context(Capture(client, "net0", path, CLAIMING))
        moved = bench.move(guest, target)
        wait_for(lambda: rounds(target) >= 5, 60)
        recovered([ping], moved)
        ping.wait_answer(moved.resumed + 2, 60)
        capture.stop()
        assert watch.deleted() == []
        now = router.default_routes(host)
        assert [line.split()[:5] for line in now] == [line.split()[:5] for line in learned]
    said = [claim for claim in claims(capture.path, mac=MAC) if claim.kind == "NA"]
    assert said
    assert [claim for claim in said if not claim.router] == []
    assert arpwatch.changes() == []
