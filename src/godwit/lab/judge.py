"""Judging a scenario from its capture: who announced what, in which network, and when.

scapy takes the announcements apart, so that no code of Godwit's judges Godwit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import HostError

_VLAN = b"\x81\x00"
_ARP, _RARP, _IPV6 = b"\x08\x06", b"\x80\x35", b"\x86\xdd"


@dataclass(frozen=True)
class Announcement:
    """One frame that tells the network where the guest is."""

    at: float  # realtime, seconds
    sender: str  # "guest" or "host"
    kind: str  # "GARP", "NA" or "RARP"
    vlan: int
    address: str


def announcements(capture: Path, mac: str) -> list[Announcement]:
    """The announcements of ``mac`` in a capture, in order.

    A guest's Linux never sends RARP, and the host knows nothing that it could put into ARP or a
    neighbour advertisement: so a frame's kind tells its sender.

    Raises:
        HostError: the capture cannot be read.
    """
    try:
        from scapy.layers.inet6 import ICMPv6ND_NA, IPv6
        from scapy.layers.l2 import ARP, Dot1Q, Ether
        from scapy.packet import bind_layers
        from scapy.utils import RawPcapReader
    except ImportError as error:
        raise HostError(f"scapy is missing ({error}); run scripts/setup") from error

    # RARP has ARP's format (RFC 903), and scapy binds nothing to its type.
    bind_layers(Ether, ARP, type=0x8035)
    bind_layers(Dot1Q, ARP, type=0x8035)
    wanted = bytes.fromhex(mac.replace(":", ""))
    found = []
    for raw, meta in RawPcapReader(str(capture)):
        # Most frames are pings: only what may be an announcement is worth a dissection.
        if raw[6:12] != wanted or not _worth(raw):
            continue
        at = meta.sec + meta.usec / 1e6
        frame = Ether(raw)
        vlan = frame[Dot1Q].vlan if Dot1Q in frame else 0
        if ARP in frame and frame[ARP].op == 3:  # a RARP request
            found.append(Announcement(at, "host", "RARP", vlan, frame[ARP].hwsrc))
        elif ARP in frame and frame[ARP].psrc == frame[ARP].pdst:
            found.append(Announcement(at, "guest", "GARP", vlan, frame[ARP].psrc))
        elif ICMPv6ND_NA in frame and frame[IPv6].dst == "ff02::1" and not frame[ICMPv6ND_NA].S:
            found.append(Announcement(at, "guest", "NA", vlan, frame[ICMPv6ND_NA].tgt))
    return found


def _worth(raw: bytes) -> bool:
    at = 16 if raw[12:14] == _VLAN else 12
    kind = raw[at : at + 2]
    if kind in (_ARP, _RARP):
        return True
    return kind == _IPV6 and raw[at + 8] == 58 and raw[at + 42 : at + 43] == b"\x88"
