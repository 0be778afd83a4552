"""The views of others: a host's ping and neighbour table, the switch's forwarding table."""

from __future__ import annotations

import json

from ..network import Network
from .parts import ask


def reach(netns: str, address: str, deadline: int = 30) -> None:
    """Ping an address until there is an answer.

    Raises:
        LabError: there is no answer within ``deadline`` seconds.
    """
    ask(netns, ["ping", "-n", "-i", "0.2", "-c", "1", "-w", str(deadline), address])


def neighbour(netns: str, address: str) -> str:
    """Return the MAC that a host has for an address (empty: none)."""
    found = json.loads(ask(netns, ["ip", "-j", "neigh", "show", "to", address]))
    return next((str(one["lladdr"]) for one in found if "lladdr" in one), "")


def port_of(net: Network, mac: str) -> str:
    """Return the switch's port at which it has seen a MAC untagged (empty: at none)."""
    found = json.loads(ask(None, ["bridge", "-n", net.switch, "-j", "fdb", "show", "br", "br0"]))
    own = (one for one in found if one["mac"] == mac and one.get("vlan") == 1)
    return next((str(one["ifname"]) for one in own), "")
