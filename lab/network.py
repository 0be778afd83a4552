"""The network of two hosts, a switch and a client, made of network namespaces::

    guest --tap0-- [br0 on A] --up0--pa-- [br0, the switch] --pc--net0-- client
    guest --tap0-- [br0 on B] --up0--pb--/      net0: untagged, net0.100, net0.200
                   A --mgmt-- B  (192.0.2.1, .2: the migration stream)

All three bridges filter VLANs, and every port carries VLAN 1 untagged, 100 and 200 tagged. Hosts
and switch have IPv6 off, so that a frame with the guest's address came from the guest or was sent
in the guest's name.

The network is built with ``ip -batch`` in half a second on the lab's emulated CPU, where importing
pyroute2 alone took nine.
"""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .addresses import LANS, MANAGEMENT, Lan
from .errors import LabError
from .netns import exec_argv, inside

PREFIX = "godwit-"
#: Frames for a guest in migration wait in its tap's queue: peak packets a second times 0.5 s.
TAP_QUEUE = 5000
_FORWARDING_S = 10.0


@dataclass(frozen=True)
class Host:
    """One of the hosts that can run the guest."""

    netns: str
    management: str
    """Its IPv4 address on the link to the other host."""
    tap: str = "tap0"
    other_tap: str = "tap1"
    """The tap of a guest that comes back while its old process still holds the first."""
    bridge: str = "br0"


@dataclass(frozen=True)
class Client:
    """The host that talks to the guest."""

    netns: str
    interface: str = "net0"

    def interface_of(self, lan: Lan) -> str:
        """Return the client's interface in the given network."""
        return f"{self.interface}.{lan.vlan}" if lan.vlan else self.interface


class Network:
    """A context manager whose namespaces exist inside its block.

    Raises:
        LabError: a tool or a kernel module is missing, or this process is not root.
    """

    def __init__(self) -> None:
        own = f"{PREFIX}{os.getpid()}-"
        self.a = Host(f"{own}a", MANAGEMENT["a"])
        self.b = Host(f"{own}b", MANAGEMENT["b"])
        self.switch = f"{own}switch"
        self.client = Client(f"{own}client")
        self._all = (self.a.netns, self.b.netns, self.switch, self.client.netns)

    def __enter__(self) -> Self:
        _remove_stale()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _build(self) -> None:
        batch("ip", None, [f"netns add {name}" for name in self._all])
        for name in self._all:
            quiet = {"accept_dad": "0", "accept_ra": "0", "router_solicitations": "0"}
            if name != self.client.netns:
                quiet = {"disable_ipv6": "1"}
            with inside(name):
                for key, value in quiet.items():
                    for scope in ("default", "all"):
                        sysctl(f"net/ipv6/conf/{scope}/{key}", value)
        bridge = (
            "link add br0 type bridge vlan_filtering 1 stp_state 0 forward_delay 0 mcast_snooping 0"
        )
        batch(
            "ip",
            self.switch,
            [
                bridge,
                f"link add pa type veth peer name up0 netns {self.a.netns}",
                f"link add pb type veth peer name up0 netns {self.b.netns}",
                f"link add pc type veth peer name net0 netns {self.client.netns}",
                *(f"link set {port} master br0 up" for port in ("pa", "pb", "pc")),
                "link set br0 up",
            ],
        )
        tagged = [lan.vlan for lan in LANS if lan.vlan]
        self._allow(self.switch, ("pa", "pb", "pc"), tagged)
        mgmt = f"link add mgmt type veth peer name mgmt netns {self.b.netns}"
        for host, first in ((self.a, [mgmt]), (self.b, [])):
            batch(
                "ip",
                host.netns,
                [
                    *first,
                    bridge,
                    "link set up0 master br0 up",
                    "link set br0 up",
                    "link set lo up",
                    f"address add {host.management}/24 dev mgmt",
                    "link set mgmt up",
                ],
            )
            self._allow(host.netns, ("up0",), tagged)
            self.add_taps(host, (host.tap, host.other_tap))
        commands = ["link set lo up"]
        for lan in LANS:
            name = self.client.interface_of(lan)
            ipv4, ipv6 = lan.client
            if lan.vlan:
                commands.append(f"link add link net0 name {name} type vlan id {lan.vlan}")
            commands.append(f"link set {name} up")
            commands.append(f"address add {ipv4}/24 dev {name}")
            commands.append(f"address add {ipv6}/64 dev {name} nodad")
        batch("ip", self.client.netns, commands)
        self._await_forwarding()

    def add_taps(self, host: Host, taps: Sequence[str]) -> None:
        """Add taps to a host's bridge, in all networks."""
        commands = []
        for tap in taps:
            commands.append(f"tuntap add {tap} mode tap vnet_hdr")
            commands.append(f"link set {tap} txqueuelen {TAP_QUEUE} master {host.bridge} up")
        batch("ip", host.netns, commands)
        self._allow(host.netns, taps, [lan.vlan for lan in LANS if lan.vlan])

    def dropped(self) -> dict[str, int]:
        """Return the number of packets that the kernel dropped since its start, by place.

        The places are each tap's queue, and the CPUs' queues as ``softnet``
        (Documentation/networking/scaling.rst, softnet_stat).
        """
        found: dict[str, int] = {}
        for host in (self.a, self.b):
            with inside(host.netns):
                lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
            for line in lines:
                name, _, counts = line.partition(":")
                if name.strip() in (host.tap, host.other_tap):
                    found[f"{host.netns} {name.strip()}"] = int(counts.split()[11])
        softnet = Path("/proc/net/softnet_stat").read_text().splitlines()
        found["softnet"] = sum(int(line.split()[1], 16) for line in softnet)
        return found

    def _allow(self, netns: str, ports: Sequence[str], tagged: Sequence[int]) -> None:
        batch("bridge", netns, [f"vlan add dev {p} vid {vid}" for p in ports for vid in tagged])

    def _await_forwarding(self) -> None:
        """Wait until all ports forward, which a port does once the kernel has noticed its carrier.

        Raises:
            LabError: a port does not forward in time.
        """
        deadline = time.monotonic() + _FORWARDING_S
        waiting = {(self.switch, p) for p in ("pa", "pb", "pc")}
        waiting |= {(host.netns, "up0") for host in (self.a, self.b)}
        while waiting:
            for netns in {netns for netns, _ in waiting}:
                for port in json.loads(_output(["bridge", "-n", netns, "-j", "link"])):
                    if port.get("state") == "forwarding":
                        waiting.discard((netns, port["ifname"]))
            if waiting and time.monotonic() > deadline:
                raise LabError(
                    f"bridge ports do not forward after {_FORWARDING_S:g} s: {sorted(waiting)}"
                )

    def _remove(self) -> None:
        for name in self._all:
            if Path(f"/run/netns/{name}").exists():
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _remove_stale() -> None:
    """Remove the namespaces of processes that were killed before their own removal."""
    for path in Path("/run/netns").glob(f"{PREFIX}*-*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            subprocess.run(["ip", "netns", "delete", path.name], check=False, capture_output=True)


def sysctl(name: str, value: str) -> None:
    """Set a variable below /proc/sys of this thread's namespace, where the kernel has one.

    ``name`` has slashes.
    """
    path = Path("/proc/sys") / name
    if path.exists():  # a kernel without IPv6 has nothing to quieten
        path.write_text(value)


def batch(program: str, netns: str | None, commands: Sequence[str]) -> None:
    """Have ``ip`` or ``bridge`` run commands in a namespace (None: this process's).

    Raises:
        LabError: the program is missing, or a command failed.
    """
    argv = [program, *(["-n", netns] if netns else []), "-batch", "-"]
    _output(argv, "\n".join(commands) + "\n")


def _output(argv: Sequence[str], text: str = "") -> str:
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is missing: apt-get install iproute2") from error
    if done.returncode != 0:
        raise LabError(
            f"{' '.join(argv)}: {done.stderr.strip()} (needs root and bridge, tun, 8021q)"
        )
    return done.stdout


__all__ = ["PREFIX", "TAP_QUEUE", "Client", "Host", "Network", "batch", "exec_argv", "sysctl"]
