"""The dissection of one frame: bytes in, a sighting of the sender's addresses out.

Only the frames that bind an address to a place are read: RARP, ARP, ICMPv6 neighbour solicitations
and advertisements, and router advertisements. Guest and network can send anything: a frame no
honest host sends is :class:`Malformed`, and for a frame of another kind the sighting is None.

The ICMPv6 checksum is not verified: a guest may leave the checksum to its NIC.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from godwit.host.net.ethernet import (
    BROADCAST,
    ETH_ALEN,
    ETH_P_ARP,
    ETH_P_IP,
    ETH_P_IPV6,
    ETH_P_RARP,
    TPID_8021AD,
    TPID_8021Q,
)

from .frames import Tag

#: A frame with more tags is malformed.
MAX_TAGS = 2

# RFC 826 and RFC 903: operations; hardware type Ethernet.
_ARP_REQUEST, _ARP_REPLY, _RARP_REQUEST, _RARP_REPLY = 1, 2, 3, 4
_HW_ETHERNET = 1
_ARP_LENGTH = 28

_IPV6_HEADER = 40
_ICMPV6 = 58
_ROUTER_ADVERTISEMENT = 134  # RFC 4861 section 4.2
_RA_LENGTH = 16  # before the options
_SOLICITATION, _ADVERTISEMENT = 135, 136  # RFC 4861 sections 4.3 and 4.4
_ND_LENGTH = 24  # both, before the options
_NA_ROUTER, _NA_SOLICITED = 0x80, 0x40  # section 4.4, in the first byte of the flags
_SOURCE_ADDRESS, _TARGET_ADDRESS = 1, 2  # section 4.6.1, link-layer address options
#: RFC 4291 section 2.7.1: ff02::1:ff00:0/104.
_SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")


class Malformed(ValueError):
    """A frame no honest host sends, with a short reason."""


class Kind(enum.Enum):
    """The kind of a sighted frame."""

    RARP = "rarp"
    ARP = "arp"
    NS = "neighbour-solicitation"
    NA = "neighbour-advertisement"
    RA = "router-advertisement"


class Sighting(NamedTuple):
    """The addresses that one frame shows.

    Attributes:
        mac: the address of the sender within the frame; of a guest's frame, its Ethernet source
            too.
        tags: the VLAN tags from the outside in, priority tags left out.
        kind: the kind of the frame.
        ip: the sender's address, 4 or 16 bytes; None when the sender has none yet (RARP, ARP probe,
            duplicate address detection).
        announces: whether the frame announces ``mac`` and ``ip`` to the whole network: gratuitous
            ARP, unsolicited advertisement, RARP for itself; sent to all. To one peer is not enough.
        peer: the address the sender asks for or answers, of ``ip``'s family; None when that
            is nobody else.
        router: whether the sender says that it is a router; None when the frame has no such flag.
        answers: whether the frame answers one host's question: an ARP reply or a neighbour
            advertisement that is not sent to many.
    """

    mac: bytes
    tags: tuple[Tag, ...]
    kind: Kind
    ip: bytes | None
    announces: bool
    peer: bytes | None
    router: bool | None = None
    answers: bool = False


def dissect(
    frame: bytes | memoryview, outer: Tag | None = None, *, own: bool = True
) -> Sighting | None:
    """Return what an Ethernet frame (no FCS) shows, or None for a frame of another kind.

    ``outer`` is the tag the kernel took off the frame (packet(7), PACKET_AUXDATA). A frame that is
    not the guest's ``own`` may have been sent on another's behalf (a proxy, VRRP): then the sender
    within the frame counts, and not the Ethernet source.

    Raises:
        Malformed: the frame is cut off, has wrong lengths, two senders (if ``own``), more than two
            tags, or an address no host can have.
    """
    data = bytes(frame)
    tags, ethertype, at = split(data, outer)
    if ethertype not in (ETH_P_ARP, ETH_P_RARP, ETH_P_IPV6):
        return None
    if ethertype == ETH_P_IPV6:
        return _neighbour(data, tags, at, own)
    return _arp(data, tags, ethertype, at, own)


def tags_of(frame: bytes | memoryview, outer: Tag | None = None) -> tuple[Tag, ...]:
    """Return the VLAN tags of a frame, as :class:`Sighting` has them.

    Raises:
        Malformed: the frame is cut off, or has more than two tags.
    """
    return split(bytes(frame), outer)[0]


def is_host_ip(ip: bytes) -> bool:
    """Return whether a host on a network can have the IP address, 4 or 16 bytes.

    Not 0/8 and 127/8 (RFC 1122 section 3.2.1.3), multicast, broadcast; not ``::``, ``::1``,
    multicast, nor an IPv4 address embedded in an IPv6 address (RFC 4291 sections 2.5 and 2.7).
    240/4 may be: Linux lets hosts have such an address.
    """
    if len(ip) == 4:
        return ip[0] not in (0, 127) and not 224 <= ip[0] <= 239 and ip != b"\xff" * 4
    if len(ip) == 16:
        embedded = not any(ip[:10]) and ip[10:12] in (b"\0\0", b"\xff\xff")
        return ip[0] != 0xFF and not embedded
    return False


def is_group(ip: bytes) -> bool:
    """Return whether an IP address, 4 or 16 bytes, is a multicast group's."""
    return 224 <= ip[0] <= 239 if len(ip) == 4 else len(ip) == 16 and ip[0] == 0xFF


def is_sender(ip: bytes) -> bool:
    """Return whether a packet can have the source, 4 or 16 bytes, which may be unspecified."""
    return not is_group(ip) and ip != b"\xff" * 4


def is_host_mac(mac: bytes) -> bool:
    """Return whether one host can have the MAC address: six bytes, not multicast, not null."""
    return len(mac) == ETH_ALEN and not mac[0] & 1 and mac != bytes(6)


def split(data: bytes, outer: Tag | None) -> tuple[tuple[Tag, ...], int, int]:
    """Return the tags, the ethertype, and the payload's offset in the frame.

    Raises:
        Malformed: the frame is cut off, or has more than two tags.
    """
    found = [] if outer is None else [outer]
    at = 12
    while True:
        if len(data) < at + 2:
            raise Malformed("truncated Ethernet header")
        ethertype = int.from_bytes(data[at : at + 2], "big")
        if ethertype not in (TPID_8021Q, TPID_8021AD):
            break
        if len(found) == MAX_TAGS:
            raise Malformed(f"more than {MAX_TAGS} VLAN tags")
        if len(data) < at + 4:
            raise Malformed("truncated VLAN tag")
        found.append((ethertype, int.from_bytes(data[at + 2 : at + 4], "big") & 0xFFF))
        at += 4
    # 802.1Q-2018 table 9-2: 0 is a priority and no VLAN, 4095 is reserved.
    if any(vid == 0xFFF for _, vid in found):
        raise Malformed("reserved VLAN id 4095")
    return tuple((tpid, vid) for tpid, vid in found if vid), ethertype, at + 2


def _source(data: bytes) -> bytes:
    mac = data[6:12]
    if not is_host_mac(mac):
        raise Malformed("source is a multicast or null address")
    return mac


def _sender(mac: bytes) -> bytes:
    if not is_host_mac(mac):
        raise Malformed("sender is a multicast or null address")
    return mac


def _host(ip: bytes, what: str) -> bytes:
    if not is_host_ip(ip):
        raise Malformed(f"{what} is not a host's address")
    return ip


def _peer(ip: bytes, own: bytes | None) -> bytes | None:
    """Return the address of a peer, or None if the address is the sender's own or no host's.

    An answer to an ARP probe goes to 0.0.0.0, and is not malformed.
    """
    return ip if ip != own and is_host_ip(ip) else None


def _arp(data: bytes, tags: tuple[Tag, ...], ethertype: int, at: int, own: bool) -> Sighting | None:
    body = data[at : at + _ARP_LENGTH]
    if len(body) < 8:
        raise Malformed("truncated ARP")
    operation = int.from_bytes(body[6:8], "big")
    reverse = ethertype == ETH_P_RARP
    if operation not in ((_RARP_REQUEST, _RARP_REPLY) if reverse else (_ARP_REQUEST, _ARP_REPLY)):
        return None
    if int.from_bytes(body[:2], "big") != _HW_ETHERNET or body[4] != ETH_ALEN:
        raise Malformed("ARP: not Ethernet addresses")
    if int.from_bytes(body[2:4], "big") != ETH_P_IP or body[5] != 4:
        raise Malformed("ARP: not IPv4 addresses")
    if len(body) < _ARP_LENGTH:
        raise Malformed("truncated ARP")
    mac = _source(data)
    sender, sender_ip, target, target_ip = body[8:14], body[14:18], body[18:24], body[24:28]
    if sender != mac:
        if own:
            raise Malformed("ARP: the sender is not the frame's source")
        mac = _sender(sender)
    to_all = data[:6] == BROADCAST
    if reverse:
        # The sender's protocol address means nothing in a request (RFC 903).
        itself = operation == _RARP_REQUEST and target == mac
        return Sighting(mac, tags, Kind.RARP, None, itself and to_all, None)
    if not any(sender_ip):  # a probe: the address is not taken yet (RFC 5227 section 2.1.1)
        return Sighting(mac, tags, Kind.ARP, None, False, None)
    ip = _host(sender_ip, "ARP: the sender")
    gratuitous = to_all and target_ip == ip
    replies = operation == _ARP_REPLY and not data[0] & 1
    return Sighting(mac, tags, Kind.ARP, ip, gratuitous, _peer(target_ip, ip), None, replies)


def _neighbour(data: bytes, tags: tuple[Tag, ...], at: int, own: bool) -> Sighting | None:
    if len(data) < at + _IPV6_HEADER:
        raise Malformed("truncated IPv6 header")
    header = data[at : at + _IPV6_HEADER]
    if header[0] >> 4 != 6:
        raise Malformed("IPv6: another version")
    if header[6] != _ICMPV6:
        return None
    length = int.from_bytes(header[4:6], "big")
    message = data[at + _IPV6_HEADER : at + _IPV6_HEADER + length]
    if not message:
        raise Malformed("truncated ICMPv6")
    kind = message[0]
    if kind not in (_ROUTER_ADVERTISEMENT, _SOLICITATION, _ADVERTISEMENT):
        return None
    least = _RA_LENGTH if kind == _ROUTER_ADVERTISEMENT else _ND_LENGTH
    # RFC 4861 sections 7.1.1 and 7.1.2: what a receiver has to check.
    if header[7] != 255:
        raise Malformed("ICMPv6: hop limit is not 255")
    if length < least:
        raise Malformed("ICMPv6: bad length")
    if len(message) < length:
        raise Malformed("truncated ICMPv6")
    if message[1] != 0:
        raise Malformed("ICMPv6: code is not 0")
    mac = _source(data)
    source, destination = header[8:24], header[24:40]
    linked = _link_layer(
        message, least, _TARGET_ADDRESS if kind == _ADVERTISEMENT else _SOURCE_ADDRESS
    )
    if linked is not None and linked != mac:
        if own:
            raise Malformed("ICMPv6: the link-layer address is not the frame's source")
        mac = _sender(linked)
    if kind == _ROUTER_ADVERTISEMENT:
        lifetime = int.from_bytes(message[6:8], "big")
        ip = _host(source, "RA: the sender")
        return Sighting(mac, tags, Kind.RA, ip, False, None, True if lifetime else None)
    target = _host(message[8:24], "ND: the target")
    if kind == _SOLICITATION:
        if not any(source):  # duplicate address detection (RFC 4862 section 5.4.2)
            if linked is not None or not destination.startswith(_SOLICITED_NODE):
                raise Malformed("NS: wrong for duplicate address detection")
            return Sighting(mac, tags, Kind.NS, None, False, None)
        ip = _host(source, "NS: the sender")
        return Sighting(mac, tags, Kind.NS, ip, False, _peer(target, ip))
    _host(source, "NA: the sender")
    solicited = bool(message[4] & _NA_SOLICITED)
    to_many = destination[0] == 0xFF
    if solicited and to_many:
        raise Malformed("NA: solicited, and to many")
    # To all nodes (RFC 4861 section 7.2.6), or to all routers (RFC 9131): either way switches see
    # it everywhere.
    announces = to_many and linked is not None and bool(data[0] & 1)
    router = bool(message[4] & _NA_ROUTER)
    answers = not data[0] & 1
    return Sighting(
        mac, tags, Kind.NA, target, announces, _peer(destination, target), router, answers
    )


def _link_layer(message: bytes, at: int, wanted: int) -> bytes | None:
    """Return the address in the message's link-layer address options from ``at`` on, if any."""
    found = None
    while at < len(message):
        length = 8 * message[at + 1] if at + 1 < len(message) else 0
        if length == 0 or at + length > len(message):
            raise Malformed("ICMPv6: bad option length")
        if message[at] == wanted:
            if length != 8:
                raise Malformed("ICMPv6: the link-layer address is not Ethernet's")
            found = message[at + 2 : at + 8]
        at += length
    return found
