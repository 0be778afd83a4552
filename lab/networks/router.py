"""A guest that is an IPv6 router by radvd, and a host that learns its default route from it."""

from __future__ import annotations

import re
from pathlib import Path

from ..addresses import LANS
from ..agent import Agent
from ..traffic import Program
from .programs import prepare
from .segment_host import INTERFACE, SegmentHost

#: What the router advertises on the untagged network. Behind the guest is VLAN 100.
PREFIX = "fd00:77::"
BEHIND = LANS[1].client[1]
#: Advertised once and then for a long time not again: what was lost stays lost.
_RADVD = f"""
interface eth0 {{
  AdvSendAdvert on;
  MaxRtrAdvInterval 1800;
  AdvDefaultLifetime 9000;
  prefix {PREFIX}/64 {{ }};
}};
"""


def start_in_guest(agent: Agent) -> None:
    """Make the guest a router between its untagged network and VLAN 100."""
    prepare(agent)
    agent.sh("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
    agent.sh(f"ip addr add {PREFIX}1/64 dev eth0")
    # radvd takes no configuration that others may write (the agent's umask is 0).
    agent.sh(f"umask 077; cat > /etc/radvd.conf <<END\n{_RADVD}END\n")
    agent.sh(
        "/usr/sbin/radvd -C /etc/radvd.conf -p /run/radvd.pid -m stderr "
        "</dev/null >/dev/console 2>&1"
    )


def default_routes(host: SegmentHost) -> list[str]:
    """Return the default routes that a host learned from router advertisements."""
    return host.ip("-6", "route", "show", "default", "proto", "ra").splitlines()


def address(host: SegmentHost) -> str:
    """Return the address that a host made of the advertised prefix (empty: none yet)."""
    shown = host.ip("-6", "addr", "show", "dev", INTERFACE, "scope", "global")
    found = re.search(rf"inet6 ({PREFIX[:-1]}[0-9a-f:]+)/64", shown)
    return found[1] if found else ""


class RouteWatch(Program):
    """A watch of a host's routes: a default route that comes back was still away."""

    def __init__(self, host: SegmentHost, folder: Path) -> None:
        super().__init__(host.netns, ["ip", "-6", "monitor", "route"], folder / "routes.txt")

    def deleted(self) -> list[str]:
        """Return the default routes that were deleted."""
        lines = self._output.read_text().splitlines()
        return [line for line in lines if line.startswith("Deleted default")]
