"""A snooping switch: groups only where somebody has asked for them, and a querier that asks rarely.

It is the lab's own switch, the kernel's bridge, with its settings changed for a while
(ip-link(8), "bridge type support").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from ..netns import inside
from ..network import Network, batch, sysctl
from .parts import ask, wait

GROUPS = ("239.1.2.3", "ff05::1:2:3")
#: RFC 3376, 8.2: the default, and as long as a lost port may stay lost.
QUERY_INTERVAL_S = 125
#: A new querier is believed only once answers to its first query could have come.
_RESPONSE_S = 1


@contextmanager
def snooping(net: Network) -> Iterator[None]:
    """Have the switch snoop and query, until the block's end."""
    with inside(net.switch):
        # Without an address, a bridge sends no MLD query (net/bridge/br_multicast.c).
        sysctl("net/ipv6/conf/br0/disable_ipv6", "0")
    times = (
        f"mcast_query_interval {QUERY_INTERVAL_S}00 mcast_query_response_interval {_RESPONSE_S}00 "
        f"mcast_startup_query_interval {QUERY_INTERVAL_S}00"
    )
    # Version 3 and MLD 2, as a switch that is bought today.
    versions = "mcast_igmp_version 3 mcast_mld_version 2"
    try:
        batch(
            "ip",
            net.switch,
            [f"link set br0 type bridge {times} {versions} mcast_snooping 1 mcast_querier 1"],
        )
        # An entry lives for two queries, and may be of a guest that is no more.
        for group in GROUPS:
            for port in members(net, group):
                forget(net, group, port)
        yield
    finally:
        batch("ip", net.switch, ["link set br0 type bridge mcast_querier 0 mcast_snooping 0"])
        with inside(net.switch):
            sysctl("net/ipv6/conf/br0/disable_ipv6", "1")


def members(net: Network, group: str) -> set[str]:
    """Return the switch's ports behind which it knows members of a group."""
    (shown,) = json.loads(
        ask(None, ["bridge", "-n", net.switch, "-j", "mdb", "show", "dev", "br0"])
    )
    return {entry["port"] for entry in shown["mdb"] if entry["grp"] == group}


def forget(net: Network, group: str, port: str) -> None:
    """Have the switch forget the members of a group behind a port."""
    batch("bridge", net.switch, [f"mdb del dev br0 port {port} grp {group} vid 1"])


def await_member(net: Network, group: str, port: str, deadline: float = 30.0) -> None:
    """Wait until the switch knows a member of a group behind a port.

    Raises:
        LabError: it knows of none within ``deadline`` seconds.
    """
    wait(f"{group} at {port}", lambda: port in members(net, group), deadline)
