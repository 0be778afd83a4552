"""A VRRP pair, one of them the guest: the virtual addresses stay with whoever is the master."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from vm_bench import Bench, Guest, Watched, recovered

from lab import kernels
from lab.networks import keepalived, programs
from lab.networks.arpwatch import ArpWatch
from lab.networks.claims import CLAIMING, Claim, claims
from lab.networks.keepalived import ADDRESSES, Peer
from lab.networks.parts import wait
from lab.networks.peers import neighbour, reach
from lab.networks.station import INTERFACE, Station, station
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import Capture, Flow, Ping

_MEMORY = "192M"
_NICS = [
    pytest.param("", id="guest announces"),
    pytest.param("guest-announce=off", id="host announces"),
    pytest.param("model=e1000", id="e1000", marks=pytest.mark.whole),
]


@dataclass
class Pair:
    """The guest, and the host that shares the virtual addresses with the guest."""

    bench: Bench
    nic: str
    host: Station
    peer: Peer
    _guest: Guest | None = None

    @property
    def guest(self) -> Guest:
        """A guest with keepalived: the one that lives, or a new one."""
        if self._guest is None or self.bench.guest is not self._guest:
            kernel = kernels.cached("cloud-6.12")
            assert kernel is not None
            image = programs.build(kernel, "keepalived")
            self._guest = self.bench.boot(nic=self.nic, initrd=image, memory=_MEMORY)
            keepalived.start_in_guest(self._guest.agent)
        return self._guest

    def target(self, *more: str) -> Watched:
        """A process that waits for the guest on the other host."""
        host = self.bench.other(self.guest.vm)
        waiting = ("--incoming", "defer", *more)
        vm = self.bench.run(host, *waiting, nic=self.nic, memory=_MEMORY)
        # A slow CPU is no deaf guest.
        vm.qmp.execute("migrate-set-parameters", {"announce-deadline": 10_000})
        return vm

    def guest_leads(self) -> None:
        """Wait until the guest has the virtual addresses, as the client sees it, too."""
        agent = self.guest.agent
        self.peer.follow()
        wait("the guest is the master", lambda: _has(agent.sh("ip addr show eth0")))
        wait("its peer is not", lambda: not _any(self.host.ip("addr", "show", INTERFACE)))
        self._client_has(MAC)

    def peer_leads(self, guest_runs: bool = True) -> float:
        """Wait until the guest's peer has them; since when."""
        self.peer.lead()
        wait("the peer is the master", lambda: _has(self.host.ip("addr", "show", INTERFACE)))
        if guest_runs:
            agent = self.guest.agent
            wait("the guest is not", lambda: not _any(agent.sh("ip addr show eth0")))
        self._client_has(self.host.mac)
        return time.time()

    def _client_has(self, mac: str) -> None:
        netns = self.bench.net.client.netns
        for address in ADDRESSES:
            reach(netns, address)
            wait(f"{address} is at {mac}", lambda one=address: neighbour(netns, one) == mac)


def _has(addresses: str) -> bool:
    return all(f" {address}/" in addresses for address in ADDRESSES)


def _any(addresses: str) -> bool:
    return any(f" {address}/" in addresses for address in ADDRESSES)


@pytest.fixture(scope="module", params=_NICS)
def pair(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Pair]:
    """The pair, whose guest the tests of this module share."""
    with station(bench.net, "vrrp") as host:
        host.take("10.0.0.61")
        host.take("fd00::61")
        with Peer(host.netns, INTERFACE, bench.folder) as peer:
            yield Pair(bench, request.param, host, peer)


@pytest.fixture
def capture(bench: Bench) -> Iterator[Capture]:
    """What claims an address on the client's segment."""
    client = bench.net.client
    path = bench.folder / "vrrp.pcap"
    with Capture(client.netns, client.interface, path, CLAIMING) as running:
        yield running


def _stolen(capture: Capture, since: float) -> list[Claim]:
    """Claims of the virtual addresses with the guest's MAC."""
    capture.stop()
    mine = [claim for claim in claims(capture.path, mac=MAC) if claim.at > since]
    return [claim for claim in mine if claim.address in ADDRESSES]


def test_the_master_keeps_them(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, capture: Capture
) -> None:
    pair.guest_leads()
    changes = len(arpwatch.changes())
    target = pair.target()
    flows = [Flow(70 + n, "vrrp", 0, "", address, "") for n, address in enumerate(ADDRESSES)]
    pings = [Ping(bench.net.client.netns, flow, bench.folder, 0.05) for flow in flows]
    try:
        for ping in pings:
            ping.wait_answer(0.0)
        moved = bench.move(pair.guest, target)
        recovered(pings, moved)
        wait_for(lambda: rounds(target) >= 5, 60)
    finally:
        for ping in pings:
            ping.stop()
    pair.guest_leads()
    assert arpwatch.changes()[changes:] == []
    capture.stop()
    at_peer = claims(capture.path, mac=pair.host.mac)
    after = [claim for claim in at_peer if claim.at > moved.resumed]
    assert [claim for claim in after if claim.address in ADDRESSES] == []


def test_taken_after_the_migration(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, capture: Capture
) -> None:
    pair.guest_leads()
    target = pair.target()
    bench.move(pair.guest, target)
    taken = pair.peer_leads()
    changes = arpwatch.changes()
    wait_for(lambda: rounds(target) >= 5, 60)
    _stays(bench, pair, capture, taken)
    assert arpwatch.changes() == changes


def test_taken_before_the_migration(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, capture: Capture
) -> None:
    pair.guest_leads()
    target = pair.target()
    taken = pair.peer_leads()
    changes = arpwatch.changes()
    bench.move(pair.guest, target)
    wait_for(lambda: rounds(target) >= 5, 60)
    _stays(bench, pair, capture, taken)
    assert arpwatch.changes() == changes


def test_taken_between_its_stop_and_its_resume(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, capture: Capture
) -> None:
    """The guest itself believes that it is the master until its peer tells it otherwise."""
    pair.guest_leads()
    target = pair.target("--no-autostart")
    bench.move(pair.guest, target, runs=False)
    taken = pair.peer_leads(guest_runs=False)
    changes = arpwatch.changes()
    target.qmp.execute("cont")
    wait_for(lambda: rounds(target) >= 5, 60)
    pair.peer_leads()
    if pair.nic:
        _stays(bench, pair, capture, taken)
        assert arpwatch.changes() == changes
    else:
        # Asked to announce, the guest's kernel does so for all that it has, once and not later.
        stolen = _stolen(capture, taken)
        assert all(claim.at - stolen[0].at < 1 for claim in stolen), stolen


def _stays(bench: Bench, pair: Pair, capture: Capture, taken: float) -> None:
    """The client finds the addresses at the peer, and nobody ever said otherwise."""
    for address in ADDRESSES:
        reach(bench.net.client.netns, address)
        assert neighbour(bench.net.client.netns, address) == pair.host.mac
    pair.guest.agent.ping()
    assert _stolen(capture, taken) == []
