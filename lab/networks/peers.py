"""A host's own view of its neighbours: a ping, and the neighbour table."""

from __future__ import annotations

import json

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
