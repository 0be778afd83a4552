"""The addresses of the lab's hosts, client and guest.

The guest's half stands in guest_files/net.c as well.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lan:
    """A layer-2 network of the lab, where ``vlan`` 0 means untagged."""

    name: str
    vlan: int
    ipv4: str
    """Prefix of a /24."""
    ipv6: str
    """Prefix of a /64."""

    @property
    def client(self) -> tuple[str, str]:
        return f"{self.ipv4}.1", f"{self.ipv6}::1"

    @property
    def guest(self) -> tuple[str, str]:
        return f"{self.ipv4}.2", f"{self.ipv6}::2"


LANS = (
    Lan("untagged", 0, "10.0.0", "fd00"),
    Lan("vlan100", 100, "10.0.100", "fd00:100"),
    Lan("vlan200", 200, "10.0.200", "fd00:200"),
)

#: The link between the two hosts that carries the migration stream (TEST-NET-1, RFC 5737).
MANAGEMENT = {"a": "192.0.2.1", "b": "192.0.2.2"}
