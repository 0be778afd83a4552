"""An EVPN fabric of FRR and Linux: two hosts, a border router, and a peer behind the border::

    guest --tap0-- [br10: 10.0.0.1] A --up0--\\
                                             [fabric] --up0-- border (10.9.0.1) --peer0-- peer
    guest --tap0-- [br10: 10.0.0.1] B --up0--/

Hosts and border are VTEPs (zebra and bgpd) that route between subnets in VRF ``tenant``
(RFC 9135, symmetric IRB). Both hosts have the guest's subnet, VNI 10, and one gateway address with
one MAC. The border has the VRF's VNI alone, and reaches a guest by the route to the guest's own
address. zebra makes that route of the kernel's neighbour entry at the host where the guest is. The
border reflects the routes of one host to the other.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import chown
from tempfile import TemporaryDirectory

from ..network import Client, Host, batch
from .parts import Daemon, ask, forward, namespaces, tap, wait

GATEWAY = ("10.0.0.1", "fd00::1")
PEER = ("10.9.0.2", "fd09::2")
_GATEWAY_MAC = "02:00:5e:00:01:0a"
_BORDER = ("10.9.0.1", "fd09::1")
_L2, _L3 = 10, 99
_LIBEXEC = "/usr/lib/frr"
#: Addresses in the fabric (TEST-NET-2, RFC 5737).
_A, _B, _C = "198.51.100.1", "198.51.100.2", "198.51.100.3"


@dataclass(frozen=True)
class Vtep:
    """A VTEP: a namespace with its zebra and bgpd."""

    netns: str
    address: str
    """Its address in the fabric."""
    folder: Path

    def vtysh(self, command: str) -> str:
        """Return what the daemons print for a command."""
        return ask(self.netns, ["vtysh", "--vty_socket", str(self.folder), "-c", command])


@dataclass(frozen=True)
class Evpn:
    """The fabric while it is there."""

    a: Host
    b: Host
    peer: Client
    border: Vtep
    fabric: str
    """The namespace of the bridge between the VTEPs."""
    vteps: dict[str, Vtep]
    """The hosts' VTEPs by their namespaces."""

    def route(self, address: str) -> str:
        """Return the border's route to an address of a guest, or nothing."""
        family = "-6" if ":" in address else "-4"
        argv = ["ip", family, "route", "show", "vrf", "tenant", address]
        return ask(self.border.netns, argv).strip()

    def at(self, host: Host, address: str) -> bool:
        """Return whether the border's route to an address of a guest leads to a host."""
        return self.vteps[host.netns].address in self.route(address)

    @contextmanager
    def slow(self, delay_ms: int) -> Iterator[None]:
        """Have all that goes to the border or comes from there take longer, each way."""
        ends = ((self.fabric, "pborder"), (self.border.netns, "up0"))
        try:
            for netns, device in ends:
                add = ["tc", "qdisc", "add", "dev", device, "root", "netem"]
                ask(netns, [*add, "delay", f"{delay_ms}ms"])
            yield
        finally:
            for netns, device in ends:
                subprocess.run(
                    ["tc", "-n", netns, "qdisc", "del", "dev", device, "root"],
                    check=False,
                    capture_output=True,
                )


@contextmanager
def evpn() -> Iterator[Evpn]:
    """Make the fabric for the block.

    Raises:
        LabError: a program or a kernel module is missing, or the fabric does not come up.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="godwit-evpn-", dir="/run")))
        folder.chmod(0o755)  # the daemons are not root's
        made = namespaces("evpn-a", "evpn-b", "evpn-border", "evpn-fabric", "evpn-peer")
        a, b, border, fabric, peer = stack.enter_context(made)
        vteps = [
            Vtep(netns, address, folder / name)
            for netns, address, name in ((a, _A, "a"), (b, _B, "b"), (border, _C, "border"))
        ]
        batch("ip", fabric, ["link add br0 mtu 1600 type bridge mcast_snooping 0 forward_delay 0"])
        for vtep in vteps:
            forward(vtep.netns)
            port = f"p{vtep.folder.name}"
            link = f"link add {port} mtu 1600 type veth peer name up0 mtu 1600 netns {vtep.netns}"
            batch("ip", fabric, [link, f"link set {port} master br0 up"])
            batch("ip", vtep.netns, _vtep(vtep))
        batch("ip", fabric, ["link set br0 up"])
        for vtep in vteps[:2]:
            batch("ip", vtep.netns, _host(vtep))
        batch("ip", border, _border(peer))
        batch("ip", peer, _peer())
        daemons = [daemon for vtep in vteps for daemon in _start(stack, vtep)]
        found = Evpn(
            Host(a, _A, bridge="br10"),
            Host(b, _B, bridge="br10"),
            Client(peer),
            vteps[2],
            fabric,
            {vtep.netns: vtep for vtep in vteps[:2]},
        )

        def routed() -> bool:
            for daemon in daemons:
                daemon.check()
            route = ["ip", "route", "show", "vrf", "tenant", f"{PEER[0]}/24"]
            return all(ask(netns, route) for netns in found.vteps)

        wait("both hosts have a route to the peer", routed)
        yield found


def _vxlan(vni: int, local: str, bridge: str) -> list[str]:
    return [
        f"link add vx{vni} type vxlan id {vni} local {local} dstport 4789 nolearning",
        f"link set vx{vni} master {bridge} up",
        f"link set vx{vni} type bridge_slave neigh_suppress on learning off",
    ]


def _vtep(vtep: Vtep) -> list[str]:
    mac = f"02:00:5e:00:02:{vtep.address.rpartition('.')[2]:0>2}"
    return [
        f"address add {vtep.address}/24 dev up0",
        "link set up0 up",
        "link add tenant type vrf table 100",
        "link set tenant up",
        f"link add br{_L3} address {mac} type bridge mcast_snooping 0 forward_delay 0",
        f"link set br{_L3} master tenant up",
        *_vxlan(_L3, vtep.address, f"br{_L3}"),
    ]


def _host(vtep: Vtep) -> list[str]:
    bridge = f"br{_L2}"
    return [
        f"link add {bridge} address {_GATEWAY_MAC} type bridge mcast_snooping 0 forward_delay 0",
        f"link set {bridge} master tenant up",
        f"address add {GATEWAY[0]}/24 dev {bridge}",
        f"address add {GATEWAY[1]}/64 dev {bridge} nodad",
        *_vxlan(_L2, vtep.address, bridge),
        *tap("tap0"),
        f"link set tap0 master {bridge}",
    ]


def _border(peer: str) -> list[str]:
    return [
        f"link add peer0 type veth peer name net0 netns {peer}",
        "link set peer0 master tenant up",
        f"address add {_BORDER[0]}/24 dev peer0",
        f"address add {_BORDER[1]}/64 dev peer0 nodad",
    ]


def _peer() -> list[str]:
    return [
        "link set net0 up",
        f"address add {PEER[0]}/24 dev net0",
        f"address add {PEER[1]}/64 dev net0 nodad",
        f"route add default via {_BORDER[0]}",
        f"route add default via {_BORDER[1]}",
    ]


def _start(stack: ExitStack, vtep: Vtep) -> list[Daemon]:
    """Start a VTEP's zebra and bgpd, until the stack's end."""
    folder = vtep.folder
    folder.mkdir()
    chown(folder, "frr", "frr")
    (folder / "zebra.conf").write_text(f"vrf tenant\n vni {_L3}\nexit-vrf\n")
    (folder / "bgpd.conf").write_text(_bgp(vtep))
    found = []
    for name, more in (("zebra", ["-s", "4194304"]), ("bgpd", ["-p", "179"])):
        argv = [f"{_LIBEXEC}/{name}", "-f", str(folder / f"{name}.conf"), "-P", "0", *more]
        argv += ["-i", str(folder / f"{name}.pid"), "--vty_socket", str(folder)]
        argv += ["-z", str(folder / "zserv.api")]
        argv += ["--log", "stdout", "--log-level", "warnings"]
        daemon = stack.enter_context(Daemon(vtep.netns, argv, folder / f"{name}.log"))
        found.append(daemon)

        def there(daemon: Daemon = daemon, name: str = name) -> bool:
            daemon.check()
            return (folder / f"{name}.vty").exists()

        wait(f"{name} of {vtep.netns}", there)
    return found


def _bgp(vtep: Vtep) -> str:
    border = vtep.address == _C
    neighbours = (_A, _B) if border else (_C,)
    lines = ["router bgp 65000", f" bgp router-id {vtep.address}", " no bgp default ipv4-unicast"]
    for neighbour in neighbours:
        lines += [
            f" neighbor {neighbour} remote-as 65000",
            f" neighbor {neighbour} timers connect 1",
        ]
    lines += [" address-family l2vpn evpn"]
    for neighbour in neighbours:
        lines += [f"  neighbor {neighbour} activate"]
        lines += [f"  neighbor {neighbour} route-reflector-client"] * border
    lines += ["  advertise-all-vni", " exit-address-family", "exit"]
    lines += ["router bgp 65000 vrf tenant", f" bgp router-id {vtep.address}"]
    if border:
        for family in ("ipv4", "ipv6"):
            lines += [f" address-family {family} unicast", "  redistribute connected"]
            lines += [" exit-address-family"]
        lines += [" address-family l2vpn evpn", "  advertise ipv4 unicast"]
        lines += ["  advertise ipv6 unicast", " exit-address-family"]
    lines += ["exit", ""]
    return "\n".join(lines)
