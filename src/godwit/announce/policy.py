"""The policy for what the host may announce in a guest's name."""

from __future__ import annotations

import re

import msgspec

from godwit.errors import ConfigError
from godwit.spec.values import parse_mac

_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")
#: A list is typed by a person.
MAX_ITEMS = 64


class Network(msgspec.Struct, frozen=True):
    """A range of IP addresses of ``length`` bytes: those with ``address`` under ``mask``."""

    length: int
    address: int
    mask: int


class Policy(msgspec.Struct, frozen=True):
    """A restriction of the address book's entries to those the host may announce.

    The default restricts nothing. A list restricts each kind the list names: with networks, an
    IP address has to be in one of the networks; with MAC addresses, the MAC address has to be among
    the list's (the NIC's own too, if that is to be announced).

    Attributes:
        networks: None for any IP address.
        macs: None for any MAC address.
    """

    networks: tuple[Network, ...] | None = None
    macs: frozenset[bytes] | None = None

    def permits(self, mac: bytes, ip: bytes | None = None) -> bool:
        """Return whether ``mac`` may be announced, alone or as the owner of ``ip``."""
        if self.macs is not None and mac not in self.macs:
            return False
        if ip is None or self.networks is None:
            return True
        value = int.from_bytes(ip, "big")
        return any(
            network.length == len(ip) and value & network.mask == network.address
            for network in self.networks
        )


def parse_policy(text: str) -> Policy:
    """Return the policy of a list such as ``192.0.2.0/24;2001:db8::/64;52:54:00:12:34:56``.

    Raises:
        ConfigError: an item is neither network nor MAC address; names the item.
    """
    # Costs as much as all of the announcement; only those who give a list pay.
    import ipaddress

    items = [item.strip() for item in text.split(";")]
    if len(items) > MAX_ITEMS:
        raise ConfigError(f"allow: {len(items)} items: name at most {MAX_ITEMS}")
    networks: list[Network] = []
    macs: set[bytes] = set()
    for item in items:
        if _MAC.fullmatch(item):
            macs.add(parse_mac(item))
            continue
        try:
            if "%" in item:  # ipaddress would drop the scope silently
                raise ValueError("a scope has no place here")
            network = ipaddress.ip_network(item)
        except ValueError as error:
            raise ConfigError(
                f"allow: '{item}' in '{text}': {error}; write networks and MAC addresses "
                "with ';' between them: 192.0.2.0/24;2001:db8::/64;52:54:00:12:34:56"
            ) from error
        length = network.max_prefixlen // 8
        address, mask = int(network.network_address), int(network.netmask)
        networks.append(Network(length, address, mask))
    return Policy(tuple(networks) or None, frozenset(macs) or None)
