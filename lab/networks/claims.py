"""Claims of addresses in a capture: frames from which a neighbour learns who has an address."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LabError

#: tcpdump's filter for untagged frames that may claim an address, or a MAC.
CLAIMING = "arp or rarp or (icmp6 and (ip6[40] == 135 or ip6[40] == 136))"
_RARP = 0x8035


@dataclass(frozen=True)
class Claim:
    """A frame that says where an address is."""

    at: float  # realtime, seconds
    mac: str
    """Who sent it."""
    kind: str  # "ARP", "NS", "NA" or "RARP"
    address: str
    """The MAC's own for RARP, and as scapy writes it for IPv6."""
    router: bool = False
    """The router flag of a neighbour advertisement."""


def claims(capture: Path, address: str = "", mac: str = "") -> list[Claim]:
    """Return the claims in a capture, in order, of one address or MAC if given.

    An ARP claims its sender's address whatever it asks (RFC 826); a neighbour solicitation its
    source (RFC 4861, 7.2.3); probes for duplicates (0.0.0.0, ::) claim nothing.

    Raises:
        LabError: the capture cannot be read.
    """
    try:
        from scapy.utils import RawPcapReader
    except ImportError as error:
        raise LabError(f"scapy is missing ({error}); run scripts/setup") from error
    found = []
    for raw, meta in RawPcapReader(str(capture)):
        claim = _claim(raw, meta.sec + meta.usec / 1e6)
        if claim is None or (address and claim.address != address) or mac not in ("", claim.mac):
            continue
        found.append(claim)
    return found


def _claim(raw: bytes, at: float) -> Claim | None:
    from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
    from scapy.layers.l2 import ARP, Ether

    frame: Any = Ether(raw)
    if getattr(frame, "type", 0) == _RARP:  # IEEE 802.3 frames have a length there
        return Claim(at, frame.src, "RARP", ARP(bytes(frame.payload)).hwsrc)
    if ARP in frame and frame[ARP].psrc != "0.0.0.0":
        return Claim(at, frame.src, "ARP", frame[ARP].psrc)
    if ICMPv6ND_NA in frame:
        advertised = frame[ICMPv6ND_NA]
        return Claim(at, frame.src, "NA", advertised.tgt, bool(advertised.R))
    if ICMPv6ND_NS in frame and frame[IPv6].src != "::":
        return Claim(at, frame.src, "NS", frame[IPv6].src)
    return None
