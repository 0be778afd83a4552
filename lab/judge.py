"""A scenario's announcements from its capture: the sender, the kind, the network and the time.

scapy takes the announcements apart, so that no code of Godwit's judges Godwit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LabError

_VLANS = (b"\x81\x00", b"\x88\xa8")
_ARP, _RARP, _IPV6 = b"\x08\x06", b"\x80\x35", b"\x86\xdd"


@dataclass(frozen=True)
class Announcement:
    """A frame from which the network learns where the guest is."""

    at: float  # realtime, seconds
    sender: str  # "guest" or "host"
    kind: str  # "GARP", "NA" or "RARP"
    vlan: int  # the outer one; 0: none
    address: str
    vlans: tuple[int, ...] = ()


#: Time in which the host's other announcements follow its RARP for a MAC and VLAN, seconds.
_BURST_S = 0.3
#: Time in which the host announces an address for which it has asked, seconds.
_ASKED_S = 120.0


def announcements(capture: Path, mac: str | None = None) -> list[Announcement]:
    """Return the announcements of ``mac`` (None: of anybody) in a capture, in order.

    A guest's Linux never sends RARP, and asks for none of its own addresses once it has them. The
    host never announces an address without a RARP in the same network, nor before it has asked
    whether another host has the address. So an announcement behind both is the host's, and any
    other is the guest's.

    Raises:
        LabError: the capture cannot be read.
    """
    try:
        from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
        from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
        from scapy.packet import bind_layers
        from scapy.utils import RawPcapReader
    except ImportError as error:
        raise LabError(f"scapy is missing ({error}); run scripts/setup") from error

    # RARP has ARP's format (RFC 903), and scapy binds nothing to its type.
    bind_layers(Ether, ARP, type=0x8035)
    for tag in (Dot1Q, Dot1AD):
        bind_layers(tag, ARP, type=0x8035)
    wanted = bytes.fromhex(mac.replace(":", "")) if mac else None
    found = []
    announced: dict[tuple[str, tuple[int, ...]], float] = {}  # when the host last sent a RARP
    asked: dict[tuple[str, tuple[int, ...], str], float] = {}  # when the host last asked for it
    for raw, meta in RawPcapReader(str(capture)):
        # Most frames are pings: only what may be an announcement is worth a dissection.
        if wanted not in (None, raw[6:12]) or not _worth(raw):
            continue
        at = meta.sec + meta.usec / 1e6
        frame = Ether(raw)
        tags = _tags(frame)
        vlan = tags[0] if tags else 0
        who = frame.src, tags

        def sender(address: str, at: float = at, who: tuple[str, tuple[int, ...]] = who) -> str:
            named = at - announced.get(who, 0.0) < _BURST_S
            return "host" if named and at - asked.get((*who, address), 0.0) < _ASKED_S else "guest"

        if ARP in frame and frame[ARP].op == 3:  # a RARP request
            announced[who] = at
            found.append(Announcement(at, "host", "RARP", vlan, frame[ARP].hwsrc, tags))
        elif ARP in frame and frame[ARP].op == 1 and frame[ARP].psrc == "0.0.0.0":
            asked[(*who, frame[ARP].pdst)] = at
        elif ICMPv6ND_NS in frame and frame[IPv6].src == "::":
            asked[(*who, frame[ICMPv6ND_NS].tgt)] = at
        elif ARP in frame and frame[ARP].psrc == frame[ARP].pdst:
            address = frame[ARP].psrc
            found.append(Announcement(at, sender(address), "GARP", vlan, address, tags))
        elif ICMPv6ND_NA in frame and frame[IPv6].dst == "ff02::1" and not frame[ICMPv6ND_NA].S:
            address = frame[ICMPv6ND_NA].tgt
            found.append(Announcement(at, sender(address), "NA", vlan, address, tags))
    return found


def _tags(frame: Any) -> tuple[int, ...]:
    """Return the VLAN ids from the outside in (scapy calls the service tag 802.1AD)."""
    from scapy.layers.l2 import Dot1AD, Dot1Q

    found = []
    layer = frame.payload
    while isinstance(layer, (Dot1AD, Dot1Q)):
        found.append(int(layer.vlan))
        layer = layer.payload
    return tuple(found)


def _worth(raw: bytes) -> bool:
    at = 12
    while raw[at : at + 2] in _VLANS:
        at += 4
    kind = raw[at : at + 2]
    if kind in (_ARP, _RARP):
        return True
    return kind == _IPV6 and raw[at + 8] == 58 and raw[at + 42 : at + 43] in (b"\x87", b"\x88")
