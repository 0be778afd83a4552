"""A VRRP pair, one of them the guest: the virtual addresses stay with whoever is the master."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest
from vm_bench import Bench, Guest, Watched, recovered

from lab import kernels
from lab.errors import LabError
from lab.judge import Announcement, announcements
from lab.networks import keepalived, programs
from lab.networks.arpwatch import ArpWatch
from lab.networks.claims import CLAIMING, Claim, claims
from lab.networks.keepalived import ADDRESSES, Peer
from lab.networks.parts import wait
from lab.networks.peers import neighbour, port_of, reach
from lab.networks.segment_host import INTERFACE, SegmentHost, segment_host
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import Capture, Flow, Ping

_MEMORY = "192M"
_NICS = [
    pytest.param("", id="guest announces"),
    pytest.param("guest-announce=off", id="host announces"),
]


def _is_at(netns: str, address: str, mac: str) -> bool:
    return neighbour(netns, address) == mac


@dataclass
class Pair:
    """The guest, and the host that shares the virtual addresses with the guest."""

    bench: Bench
    nic: str
    host: SegmentHost
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
        try:
            wait("the guest is the master", lambda: _all(agent.sh("ip addr")))
        except LabError as error:
            error.add_note(keepalived.guest_log(agent) + agent.sh("ip addr"))
            raise
        wait("its peer is not", lambda: not _any(self.host.ip("addr")))
        self._client_reaches(MAC, "pa" if self.guest.vm.host is self.bench.net.a else "pb")

    def peer_leads(self, guest_runs: bool = True) -> float:
        """Wait until the guest's peer has them; since when."""
        self.peer.lead()
        wait("the peer is the master", lambda: _all(self.host.ip("addr")))
        if guest_runs:
            agent = self.guest.agent
            wait("the guest is not", lambda: not _any(agent.sh("ip addr")))
        self.client_reaches_peer()
        return time.time()

    def client_reaches_peer(self) -> None:
        """Wait until the client and the switch find the virtual addresses at the peer."""
        self._client_reaches(self.host.mac, self.host.port)

    def _client_reaches(self, mac: str, port: str) -> None:
        netns = self.bench.net.client.netns
        for address in ADDRESSES:
            reach(netns, address)
            wait(f"{address} is {mac}", partial(_is_at, netns, address, mac))
        wait(f"{mac} is at {port}", lambda: port_of(self.bench.net, mac) == port)


def _all(shown: str) -> bool:
    return all(f" {address}/" in shown for address in ADDRESSES)


def _any(shown: str) -> bool:
    return any(f" {address}/" in shown for address in ADDRESSES)


@pytest.fixture(scope="module", params=_NICS)
def pair(request: pytest.FixtureRequest, bench: Bench) -> Iterator[Pair]:
    """The pair, whose guest the tests of this module share."""
    with segment_host(bench.net, "vrrp") as host:
        host.take("10.0.0.61")
        host.take("fd00::61")
        with Peer(host.netns, INTERFACE, bench.folder) as peer:
            yield Pair(bench, request.param, host, peer)


@dataclass
class Sent:
    """What the guest's hosts, and the peer, send that claims an address."""

    from_hosts: Sequence[Capture]
    from_peer: Capture

    def stop(self) -> None:
        """End the captures."""
        for capture in (*self.from_hosts, self.from_peer):
            capture.stop()

    def by_hosts(self, since: float) -> list[Claim]:
        """Claims of the virtual addresses by the guest or its hosts."""
        return [one for capture in self.from_hosts for one in _virtual(capture, since)]

    def by_peer(self, since: float) -> list[Claim]:
        """Claims of the virtual addresses by the peer."""
        return _virtual(self.from_peer, since)

    def in_guests_name(self, since: float) -> list[Announcement]:
        """Announcements of the virtual addresses by a host."""
        found = [one for capture in self.from_hosts for one in announcements(capture.path)]
        found = [one for one in found if one.at > since and one.sender == "host"]
        return [one for one in found if one.address in ADDRESSES]


def _virtual(capture: Capture, since: float) -> list[Claim]:
    found = [claim for claim in claims(capture.path) if claim.at > since]
    return [one for one in found if one.address in ADDRESSES]


def _seen_at(arpwatch: ArpWatch) -> list[str]:
    """The MACs to which arpwatch saw the IPv4 address change."""
    words = [change.split() for change in arpwatch.changes()]
    return [last for first, *_, last in words if first == ADDRESSES[0]]


@pytest.fixture
def sent(bench: Bench, pair: Pair) -> Iterator[Sent]:
    """Captures at the hosts' uplinks and at the peer."""
    with ExitStack() as stack:

        def capture(netns: str, interface: str) -> Capture:
            path = bench.folder / f"{netns}-vrrp.pcap"
            return stack.enter_context(Capture(netns, interface, path, CLAIMING, "out"))

        hosts = (bench.net.a, bench.net.b)
        yield Sent(
            [capture(host.netns, "up0") for host in hosts], capture(pair.host.netns, INTERFACE)
        )


def test_the_master_keeps_them(bench: Bench, arpwatch: ArpWatch, pair: Pair, sent: Sent) -> None:
    pair.guest_leads()
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
    assert set(_seen_at(arpwatch)) <= {MAC}
    sent.stop()
    assert sent.by_peer(moved.resumed) == []
    assert sent.by_hosts(moved.resumed)


def test_taken_after_the_migration(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, sent: Sent
) -> None:
    pair.guest_leads()
    target = pair.target()
    bench.move(pair.guest, target)
    taken = pair.peer_leads()
    wait_for(lambda: rounds(target) >= 5, 60)
    _stays(arpwatch, pair, sent, taken)


def test_taken_before_the_migration(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, sent: Sent
) -> None:
    pair.guest_leads()
    target = pair.target()
    taken = pair.peer_leads()
    bench.move(pair.guest, target)
    wait_for(lambda: rounds(target) >= 5, 60)
    _stays(arpwatch, pair, sent, taken)


def test_taken_between_its_stop_and_its_resume(
    bench: Bench, arpwatch: ArpWatch, pair: Pair, sent: Sent
) -> None:
    """The guest believes that it is the master until it gets its peer's next advertisement.

    Until then it answers for the addresses, and its kernel announces them if asked to announce.
    The host, which saw the peer take them, does not.
    """
    pair.guest_leads()
    target = pair.target("--no-autostart")
    bench.move(pair.guest, target, runs=False)
    taken = pair.peer_leads(guest_runs=False)
    target.qmp.execute("cont")
    wait_for(lambda: rounds(target) >= 5, 60)
    settled = pair.peer_leads()
    _stays(arpwatch, pair, sent, settled, its_own=True)
    assert sent.in_guests_name(taken) == []


def _stays(arpwatch: ArpWatch, pair: Pair, sent: Sent, since: float, its_own: bool = False) -> None:
    """The client finds the addresses at the peer, and nobody has said otherwise since.

    With ``its_own``, the guest itself may have said so before.
    """
    pair.client_reaches_peer()
    pair.guest.agent.ping()
    sent.stop()
    assert sent.by_hosts(since) == []
    wait("arpwatch knows", lambda: _seen_at(arpwatch)[-1:] == [pair.host.mac])
    # Once to the guest, where the peer had them when arpwatch began; and to the peer.
    assert its_own or len(_seen_at(arpwatch)) <= 2
