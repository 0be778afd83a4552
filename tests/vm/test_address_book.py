"""Addresses that a guest has beside its NIC's own: macvlan, bridge, bond, VLAN in VLAN, IPv6 only.

They all move with the guest, and each flow recovers, whoever announces it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from vm_bench import MORE_TAPS, Bench, Guest, announce, recovered

from lab.judge import announcements
from lab.scenario import wait_for
from lab.traffic import Flow, Ping

_MACS = [f"52:54:00:67:78:0{number}" for number in range(3)]
_NICS = [
    f"id=more{number},tap={tap},mac={mac}"
    for number, (tap, mac) in enumerate(zip(MORE_TAPS, _MACS, strict=True))
]
#: eth1: macvlan and VLAN in VLAN, eth2: below a bridge, eth3: in a bond.
_SET_UP = """
for module in macvlan bridge bonding dummy 8021q; do modprobe $module 2>/dev/null; done
set -e
ip link set eth1 up
ip link add link eth1 name mv0 type macvlan
ip link set mv0 address 02:00:00:00:50:02 up
ip addr add 10.50.0.2/24 dev mv0
ip link add link eth1 name s300 type vlan proto 802.1ad id 300
ip link set s300 up
ip link add link s300 name c7 type vlan id 7
ip link set c7 up
ip addr add 10.51.0.2/24 dev c7
ip link add br0 type bridge
ip link set br0 address 02:00:00:00:52:02
ip link set eth2 up
ip link set eth2 master br0
ip link set br0 up
ip addr add 10.52.0.2/24 dev br0
echo active-backup > /sys/class/net/bond0/bonding/mode
ip link set bond0 up
ip link set eth3 down
echo +eth3 > /sys/class/net/bond0/bonding/slaves
ip addr add fd53::2/64 dev bond0
for peer in 10.50.0.1 10.51.0.1 10.52.0.1 fd53::1; do until ping -c 1 -W 1 $peer; do :; done; done
"""


@dataclass(frozen=True)
class Way:
    """One of the guest's addresses."""

    name: str
    guest: str
    client: str
    vlans: tuple[int, ...]
    mac: str

    def flow(self, number: int) -> Flow:
        """For a ping."""
        family = "ipv6" if ":" in self.guest else "ipv4"
        return Flow(60 + number, self.name, 0, family, self.guest, self.client)


_WAYS = (
    Way("macvlan", "10.50.0.2", "10.50.0.1/24", (), "02:00:00:00:50:02"),
    Way("VLAN in VLAN", "10.51.0.2", "10.51.0.1/24", (300, 7), _MACS[0]),
    Way("bridge", "10.52.0.2", "10.52.0.1/24", (), "02:00:00:00:52:02"),
    Way("bond, IPv6 only", "fd53::2", "fd53::1/64", (), _MACS[2]),
)


def _client(bench: Bench) -> None:
    bench.client_ip(
        "link",
        "add",
        "link",
        "net0",
        "name",
        "s300",
        "type",
        "vlan",
        "proto",
        "802.1ad",
        "id",
        "300",
    )
    bench.client_ip("link", "add", "link", "s300", "name", "c7", "type", "vlan", "id", "7")
    for name in ("s300", "c7"):
        bench.client_ip("link", "set", name, "up")
    for way in _WAYS:
        nodad = ["nodad"] if ":" in way.client else []
        bench.client_ip("address", "add", way.client, "dev", "c7" if way.vlans else "net0", *nodad)


def test_what_is_behind_a_nic_moves_with_it(bench: Bench) -> None:
    _client(bench)
    target = bench.run(bench.net.b, "--incoming", "defer", more_nics=_NICS, memory="192M")
    guest: Guest = bench.boot(keep=[target], more_nics=_NICS, memory="192M")
    guest.agent.sh(_SET_UP.replace("\n", ";").replace(";;", ";").strip(";"), 120)
    with ExitStack() as stack:
        pings = [
            stack.enter_context(Ping(bench.net.client.netns, way.flow(number), bench.folder, 0.05))
            for number, way in enumerate(_WAYS)
        ]
        for ping in pings:
            ping.wait_answer(0.0, 60)
        capture = stack.enter_context(bench.capture("book"))
        moved = bench.move(guest, target)
        recovered(pings, moved)
        wait_for(lambda: all(announce(target, f"more{n}")["rounds"] >= 5 for n in range(3)), 60)
        wait_for(lambda: all(_told(target) >= {way.guest} for way in _WAYS), 30)
        capture.stop()
    frames = announcements(capture.path)
    for way in _WAYS:
        kind = "NA" if ":" in way.guest else "GARP"
        assert [f for f in frames if (f.kind, f.vlans, f.address) == (kind, way.vlans, way.guest)]
    # Linux does not pass the request on to a bridge above its NIC: the host spoke for it.
    assert {f.sender for f in frames if f.address == "10.52.0.2"} == {"host"}
    # All of it agrees with what query-announce says.
    said = {}
    for number in range(3):
        for one in announce(target, f"more{number}")["addresses"]:
            if one["ip"] is not None:
                vlans = tuple(tag["vid"] for tag in one["vlans"])
                said[one["ip"], vlans] = (one["seen-ms"] is not None, one["host-ms"] is not None)
    for way in _WAYS:
        seen, by_host = said[way.guest, way.vlans]
        senders = {f.sender for f in frames if (f.address, f.vlans) == (way.guest, way.vlans)}
        assert seen or by_host
        if senders == {"host"}:
            assert by_host
            assert not seen
        if senders == {"guest"}:
            assert seen


def _told(vm: object) -> set[str]:
    """Addresses that were announced, by anybody."""
    return {
        one["ip"]
        for number in range(3)
        for one in announce(vm, f"more{number}")["addresses"]  # type: ignore[arg-type]
        if one["ip"] and (one["seen-ms"] is not None or one["host-ms"] is not None)
    }
