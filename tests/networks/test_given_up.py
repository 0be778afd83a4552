"""An address that the guest gave up, and another host took, stays there when the guest migrates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from vm_bench import Bench, Guest

from lab.networks.arpwatch import ArpWatch
from lab.networks.claims import CLAIMING, claims
from lab.networks.peers import neighbour, port_of, reach
from lab.networks.segment_host import INTERFACE, SegmentHost, segment_host
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import Capture

#: Taken with a gratuitous ARP or an unsolicited advertisement, and without any frame.
_CLAIMED = ("10.0.0.50", "fd00::50")
_SILENT = ("10.0.0.51", "fd00::51")
_ADDRESSES = (*_CLAIMED, *_SILENT)
_NICS = [
    pytest.param("", id="guest announces"),
    pytest.param("guest-announce=off", id="host announces"),
]


@pytest.fixture(scope="module")
def other(bench: Bench) -> Iterator[SegmentHost]:
    """The host that takes the addresses."""
    with segment_host(bench.net, "other") as host:
        yield host


@pytest.mark.parametrize("nic", _NICS)
def test_nobody_takes_it_back(
    bench: Bench, arpwatch: ArpWatch, other: SegmentHost, nic: str
) -> None:
    guest = bench.traveller(nic)
    client = bench.net.client.netns
    _each(guest, "add")
    target = bench.target(guest)
    try:
        for address in _ADDRESSES:
            reach(client, address)
            assert neighbour(client, address) == MAC
        _each(guest, "del")
        for address in _ADDRESSES:
            other.take(address)
            if address in _CLAIMED:
                other.claim(address)
            else:
                # A client that heard nothing asks anew once its entry is too old.
                bench.client_ip("neigh", "flush", "to", address)
            reach(client, address)
            assert neighbour(client, address) == other.mac
        with Capture(client, "net0", bench.folder / "given-up.pcap", CLAIMING) as capture:
            bench.move(guest, target)
            wait_for(lambda: rounds(target) >= 5, 60)
            for address in _ADDRESSES:
                reach(client, address)
                assert neighbour(client, address) == other.mac
            guest.agent.ping()
            capture.stop()
    finally:
        for address in _ADDRESSES:
            other.give_up(address)
            bench.client_ip("neigh", "flush", "to", address)
    said = claims(capture.path, mac=MAC)
    assert said, "the capture has none of the guest's frames"
    assert [claim for claim in said if claim.address in _ADDRESSES] == []
    assert sorted(arpwatch.changes()) == [
        f"{address} changed ethernet address {other.mac}"
        for address in _ADDRESSES
        if ":" not in address
    ]


def _each(guest: Guest, how: str) -> None:
    """Add all addresses to the guest's eth0, or delete them."""
    commands = (
        f"ip addr {how} {address}/{64 if ':' in address else 24} dev eth0" for address in _ADDRESSES
    )
    guest.agent.sh(";".join(commands))


#: A virtual router's (RFC 5798, 7.3): whoever is the master uses it.
_SHARED_MAC = "00:00:5e:00:01:34"
_SHARED = "10.0.0.52"
_BRIDGE = ("type", "macvlan", "mode", "bridge")
_MACVLAN = f"""
modprobe macvlan
echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore
ip link add link eth0 name mv0 type macvlan
ip link set mv0 address {_SHARED_MAC} up
ip addr add {_SHARED}/24 dev mv0
"""
#: So long after the guest's own use Godwit takes a frame with its MAC for a reflection, seconds.
_REFLECTED_S = 2.0


@pytest.mark.parametrize("when", ["before", "between stop and resume"])
def test_a_mac_that_another_host_took_stays_there(
    bench: Bench, other: SegmentHost, when: str
) -> None:
    nic = "guest-announce=off"
    guest = bench.traveller(nic)
    client = bench.net.client.netns
    # It keeps its interface, as VRRP's backup does.
    guest.agent.sh(_MACVLAN)
    reach(client, _SHARED)
    used = time.monotonic()
    assert neighbour(client, _SHARED) == _SHARED_MAC
    resumes = when == "before"
    more = () if resumes else ("--no-autostart",)
    waiting = ("--incoming", "defer", *more)
    target = bench.run(bench.other(guest.vm), *waiting, nic=nic)
    target.qmp.execute("query-status")
    with ExitStack() as stack:
        stack.callback(bench.drop_guest)
        if resumes:
            guest.agent.sh(f"ip addr del {_SHARED}/24 dev mv0")
        else:
            bench.move(guest, target, runs=False)
        wait_for(lambda: time.monotonic() > used + _REFLECTED_S, 10)
        other.ip("link", "add", "link", INTERFACE, "name", "mv0", "address", _SHARED_MAC, *_BRIDGE)
        stack.callback(other.ip, "link", "delete", "mv0")
        other.ip("link", "set", "mv0", "up")
        other.ip("address", "add", f"{_SHARED}/24", "dev", "mv0")
        other.claim(_SHARED, "mv0")
        reach(client, _SHARED)
        assert port_of(bench.net, _SHARED_MAC) == other.port
        # Untagged frames: the network in which the other host has it.
        from_guest = f"ether src {_SHARED_MAC} and not vlan"
        path = bench.folder / "shared-mac.pcap"
        with Capture(target.host.netns, "up0", path, from_guest, "out") as capture:
            if resumes:
                bench.move(guest, target)
            else:
                target.qmp.execute("cont")
            wait_for(lambda: rounds(target) >= 5, 60)
            reach(client, _SHARED)
            capture.stop()
        assert claims(path) == []
        assert port_of(bench.net, _SHARED_MAC) == other.port
