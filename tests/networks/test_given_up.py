"""An address that the guest gave up, and another host took, stays there when the guest migrates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vm_bench import Bench, Guest

from lab.networks.arpwatch import ArpWatch
from lab.networks.claims import CLAIMING, claims
from lab.networks.peers import neighbour, reach
from lab.networks.station import Station, station
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
def other(bench: Bench) -> Iterator[Station]:
    """The host that takes the addresses."""
    with station(bench.net, "other") as host:
        yield host


@pytest.mark.parametrize("nic", _NICS)
def test_nobody_takes_it_back(bench: Bench, arpwatch: ArpWatch, other: Station, nic: str) -> None:
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
