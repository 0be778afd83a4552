"""A further host on the lab's segment, on a port of its own at the switch."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..netns import inside
from ..network import Network, batch, sysctl
from .parts import ask, namespaces, wait

INTERFACE = "net0"


@dataclass(frozen=True)
class SegmentHost:
    """A host with one interface, untagged."""

    netns: str
    mac: str
    port: str
    """The switch's."""

    def ip(self, *words: str) -> str:
        """Run ``ip`` in the host's namespace, and return the output."""
        return ask(self.netns, ["ip", *words])

    def take(self, address: str) -> None:
        """Give the host an address without any frame."""
        length = "64" if ":" in address else "24"
        nodad = ["nodad"] if ":" in address else []
        self.ip("address", "add", f"{address}/{length}", "dev", INTERFACE, *nodad)

    def give_up(self, address: str) -> None:
        """Take an address from the host, if the host has it."""
        self.ip("address", "flush", "to", address, "dev", INTERFACE)

    def claim(self, address: str, interface: str = INTERFACE) -> None:
        """Send a gratuitous ARP or an unsolicited advertisement for an address of the host's."""
        if ":" in address:
            self._advertise(address)
        else:
            argv = ["busybox", "arping", "-U", "-c", "1", "-I", interface, "-s", address, address]
            ask(self.netns, argv)

    def _advertise(self, ipv6: str) -> None:
        from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
        from scapy.layers.l2 import Ether

        frame = Ether(src=self.mac, dst="33:33:00:00:00:01") / IPv6(src=ipv6, dst="ff02::1")
        frame /= ICMPv6ND_NA(tgt=ipv6, R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=self.mac)
        with inside(self.netns), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((INTERFACE, 0))
            sock.send(bytes(frame))


@contextmanager
def segment_host(
    net: Network, name: str, router_advertisements: bool = False
) -> Iterator[SegmentHost]:
    """Attach a host to the switch; it configures itself by router advertisements if asked to."""
    port = f"p-{name}"
    with namespaces(name) as (netns,):
        if router_advertisements:
            with inside(netns):
                for scope in ("default", "all"):
                    sysctl(f"net/ipv6/conf/{scope}/accept_ra", "1")
        batch(
            "ip",
            net.switch,
            [
                f"link add {port} type veth peer name {INTERFACE} netns {netns}",
                f"link set {port} master br0 up",
            ],
        )
        batch("ip", netns, [f"link set {INTERFACE} up"])

        show = ["bridge", "-n", net.switch, "-j", "link", "show", "dev", port]

        def forwards() -> bool:
            (link,) = json.loads(ask(None, show))
            return bool(link["state"] == "forwarding")

        wait(f"the switch's port {port} forwards", forwards)
        (link,) = json.loads(ask(netns, ["ip", "-j", "link", "show", "dev", INTERFACE]))
        yield SegmentHost(netns, link["address"], port)
