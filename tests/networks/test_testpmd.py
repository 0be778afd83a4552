"""A NIC that DPDK drives: it knows GUEST_ANNOUNCE, has no interrupt that could ask it, and moves.

Without an IOMMU in the guest, a stock Debian kernel gives DPDK the device by uio_pci_generic, which
has no MSI-X: testpmd negotiates the feature and never acknowledges, so the host speaks after its
two attempts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vm_bench import MORE_TAPS, Bench, announce, recovered

from lab import kernels
from lab.errors import LabError
from lab.network import batch
from lab.networks import testpmd
from lab.networks.claims import claims
from lab.traffic import Capture, Flow, Ping

_MAC = "52:54:00:67:78:00"
_NIC = f"id=more0,tap={MORE_TAPS[0]},mac={_MAC}"
_VLAN = 300
_CLIENT, _GUEST = "10.0.30.1", "10.0.30.77"


@contextmanager
def _network_of_its_own(bench: Bench) -> Iterator[str]:
    """The tap's network is a VLAN that only the client is in; the client's interface."""
    net = bench.net
    name = f"net0.{_VLAN}"
    tap = MORE_TAPS[0]
    ports = ("pa", "pb", "pc")
    for host in (net.a, net.b):
        batch(
            "bridge",
            host.netns,
            [
                f"vlan del dev {tap} vid 1",
                f"vlan add dev {tap} vid {_VLAN} pvid untagged",
                f"vlan add dev up0 vid {_VLAN}",
            ],
        )
    batch("bridge", net.switch, [f"vlan add dev {port} vid {_VLAN}" for port in ports])
    bench.client_ip("link", "add", "link", "net0", "name", name, "type", "vlan", "id", f"{_VLAN}")
    bench.client_ip("link", "set", name, "up")
    bench.client_ip("address", "add", f"{_CLIENT}/24", "dev", name)
    try:
        yield name
    finally:
        bench.client_ip("link", "delete", name)
        for host in (net.a, net.b):
            batch(
                "bridge",
                host.netns,
                [
                    f"vlan del dev {tap} vid {_VLAN}",
                    f"vlan add dev {tap} vid 1 pvid untagged",
                    f"vlan del dev up0 vid {_VLAN}",
                ],
            )
        batch("bridge", net.switch, [f"vlan del dev {port} vid {_VLAN}" for port in ports])


@pytest.mark.whole
def test_a_nic_that_dpdk_drives(bench: Bench) -> None:
    kernel = kernels.cached(testpmd.KERNEL)
    assert kernel is not None
    more: dict[str, Any] = {"more_nics": [_NIC], "memory": testpmd.MEMORY}
    target = bench.run(bench.net.b, "--incoming", "defer", **more)
    guest = bench.boot(initrd=testpmd.build(kernel), keep=[target], **more)
    client = bench.net.client.netns
    flow = Flow(91, "testpmd", _VLAN, "ipv4", _GUEST, _CLIENT)
    with _network_of_its_own(bench) as interface:
        testpmd.start_in_guest(guest.agent)
        path = bench.folder / "testpmd.pcap"
        with (
            Ping(client, flow, bench.folder, 0.05) as ping,
            Capture(client, interface, path, "rarp or arp") as capture,
        ):
            try:
                ping.wait_answer(0.0, 60)
            except LabError as error:
                error.add_note(testpmd.log(guest.agent))
                raise
            moved = bench.move(guest, target)
            recovered([ping], moved)
            target.event("ANNOUNCE_HOST", lambda data: data["nic"] == "more0")
            ping.wait_answer(moved.resumed + 2, 60)
            capture.stop()
    record = announce(target, "more0")
    assert record["asked"] >= 2
    assert record["acks"] == 0
    after = [claim for claim in claims(capture.path, mac=_MAC) if claim.at > moved.resumed]
    assert "RARP" in {claim.kind for claim in after}
