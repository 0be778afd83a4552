"""The frames by which a network learns where a guest is now: bytes in, bytes out.

All are complete Ethernet frames without the FCS. ``tags`` is the stack of VLAN tags from the
outside in, each ``(tpid, vid)``: ``((0x88a8, 10), (0x8100, 200))`` is VLAN 200 inside service
VLAN 10.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from godwit.host.net.ethernet import (
    BROADCAST,
    ETH_ALEN,
    ETH_HLEN,
    ETH_P_ARP,
    ETH_P_IP,
    ETH_P_IPV6,
    ETH_P_RARP,
    ETH_ZLEN,
    TPID_8021AD,
    TPID_8021Q,
)

#: (tpid, vid), IEEE 802.1Q-2018 section 9.6.
Tag = tuple[int, int]
Tags = Sequence[Tag]

#: RFC 2464 section 7: 33:33 and the low 32 bits of ff02::1.
ALL_NODES_MAC = bytes.fromhex("333300000001")
#: RFC 4291 section 2.7.1.
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")

# RFC 826 and RFC 903: hardware type Ethernet, operations.
_HW_ETHERNET = 1
_ARP_REQUEST = 1
_RARP_REQUEST = 3

_ICMPV6 = 58
_NEIGHBOR_SOLICITATION = 135  # RFC 4861 section 4.3
_NEIGHBOR_ADVERTISEMENT = 136  # RFC 4861 section 4.4
_NA_ROUTER, _NA_OVERRIDE = 0x8000_0000, 0x2000_0000
_SOURCE_LINK_LAYER_ADDRESS, _TARGET_LINK_LAYER_ADDRESS = 1, 2  # RFC 4861 section 4.6.1
_UNSPECIFIED = bytes(16)
#: RFC 4291 section 2.7.1: ff02::1:ff00:0/104.
_SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")

#: IEEE 802.2: null DSAP, null SSAP with the response bit (so nobody answers), XID, its information.
_XID = bytes.fromhex("0001af810100")
#: The longest cookie: the bytes of a layer 2 update's padding.
MAX_COOKIE = ETH_ZLEN - ETH_HLEN - len(_XID)
_TPIDS = (TPID_8021Q.to_bytes(2, "big"), TPID_8021AD.to_bytes(2, "big"))


def rarp(mac: bytes, tags: Tags = ()) -> bytes:
    """Return a broadcast RARP request 'who am I': bridges learn the port, and no host answers.

    Field by field what QEMU (net/announce.c, announce_self_create) and, after QEMU, Cloud
    Hypervisor send: both hardware addresses ``mac``, both protocol addresses zero, 60 bytes
    untagged.

    Raises:
        ValueError: ``mac`` or a tag is not valid.
    """
    payload = _arp(_RARP_REQUEST, mac, b"\0" * 4, mac, b"\0" * 4)
    return ethernet(BROADCAST, mac, tags, ETH_P_RARP, payload)


def gratuitous_arp(mac: bytes, ip4: bytes, tags: Tags = ()) -> bytes:
    """Return an ARP request for one's own address, as Linux sends on NETDEV_NOTIFY_PEERS.

    Broadcast, target hardware address zero (net/ipv4/devinet.c, inetdev_send_gratuitous_arp;
    net/ipv4/arp.c, arp_create).

    Raises:
        ValueError: ``mac``, ``ip4`` (four bytes) or a tag is not valid.
    """
    _check(ip4, 4, "IPv4 address")
    return ethernet(BROADCAST, mac, tags, ETH_P_ARP, _arp(_ARP_REQUEST, mac, ip4, b"\0" * 6, ip4))


def unsolicited_na(mac: bytes, ip6: bytes, tags: Tags = (), *, router: bool = False) -> bytes:
    """Return an unsolicited neighbour advertisement to all nodes, with the override flag.

    RFC 4861 section 7.2.6, with the fields Linux uses (net/ipv6/ndisc.c,
    ndisc_send_unsol_na): source and target ``ip6``, target link-layer address. Hosts that have
    ``ip6`` as their default router forget the router if ``router`` is False (section 7.2.5).

    Raises:
        ValueError: ``mac``, ``ip6`` (sixteen bytes) or a tag is not valid.
    """
    _check(mac, ETH_ALEN, "MAC address")
    _check(ip6, 16, "IPv6 address")
    flags = _NA_OVERRIDE | (_NA_ROUTER if router else 0)
    body = struct.pack("!I16sBB6s", flags, ip6, _TARGET_LINK_LAYER_ADDRESS, 1, mac)
    ip = _icmpv6(ip6, ALL_NODES, _NEIGHBOR_ADVERTISEMENT, body)
    return ethernet(ALL_NODES_MAC, mac, tags, ETH_P_IPV6, ip)


def arp_request(mac: bytes, ip4: bytes, target: bytes, tags: Tags = ()) -> bytes:
    """Return a broadcast ARP request for ``target`` from ``mac`` with ``ip4`` (RFC 826).

    Raises:
        ValueError: an address or a tag is not valid.
    """
    _check(ip4, 4, "IPv4 address")
    _check(target, 4, "IPv4 address")
    return ethernet(
        BROADCAST, mac, tags, ETH_P_ARP, _arp(_ARP_REQUEST, mac, ip4, b"\0" * 6, target)
    )


def arp_probe(mac: bytes, target: bytes, tags: Tags = ()) -> bytes:
    """Return a broadcast ARP probe of ``mac``: who has ``target`` answers, and nobody learns.

    The sender's protocol address is zero (RFC 5227 section 1.1).

    Raises:
        ValueError: an address or a tag is not valid.
    """
    return arp_request(mac, bytes(4), target, tags)


def link_local(mac: bytes) -> bytes:
    """Return the IPv6 link-local address made of a MAC address (RFC 4291 appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


def solicitation(mac: bytes, ip6: bytes | None, target: bytes, tags: Tags = ()) -> bytes:
    """Return a neighbour solicitation for ``target`` from ``mac`` with ``ip6``.

    RFC 4861 section 4.3; to the solicited-node address (RFC 4291 section 2.7.1). Without ``ip6``
    the solicitation is that of duplicate address detection: who has ``target`` answers all nodes
    (section 7.2.4), and nobody learns.

    Raises:
        ValueError: an address or a tag is not valid.
    """
    _check(mac, ETH_ALEN, "MAC address")
    _check(target, 16, "IPv6 address")
    body = struct.pack("!I16s", 0, target)
    if ip6 is not None:
        _check(ip6, 16, "IPv6 address")
        body += struct.pack("!BB6s", _SOURCE_LINK_LAYER_ADDRESS, 1, mac)
    to = _SOLICITED_NODE + target[13:]
    ip = _icmpv6(ip6 or _UNSPECIFIED, to, _NEIGHBOR_SOLICITATION, body)
    return ethernet(b"\x33\x33" + to[12:], mac, tags, ETH_P_IPV6, ip)


def layer2_update(mac: bytes, tags: Tags = (), cookie: bytes = b"") -> bytes:
    """Return a broadcast from which bridges learn the port of ``mac``, and hosts nothing.

    An access point sends the same for a station that has roamed to it (IEEE 802.11F, 'Layer 2
    Update frame'; net/wireless/util.c, cfg80211_send_layer2_update). With a ``cookie`` in place of
    the padding the frame is a marker frame: :func:`read_cookie` finds the cookie.

    Raises:
        ValueError: ``mac`` or a tag is not valid, or the cookie is longer than :data:`MAX_COOKIE`.
    """
    _check(mac, ETH_ALEN, "MAC address")
    if len(cookie) > MAX_COOKIE:
        raise ValueError(f"the cookie has {len(cookie)} bytes: use at most {MAX_COOKIE}")
    return ethernet(BROADCAST, mac, tags, len(_XID), _XID + cookie)


def stack_of(frame: bytes | memoryview) -> bytes:
    """Return the VLAN tags of a frame as bytes, as in the frame."""
    at = 12
    while bytes(frame[at : at + 2]) in _TPIDS:
        at += 4
    return bytes(frame[12:at])


def read_cookie(frame: bytes | memoryview) -> bytes | None:
    """Return the cookie of a marker frame and the padding after, or None for other frames."""
    if bytes(frame[:6]) != BROADCAST:
        return None
    at = 12 + len(stack_of(frame))
    head = len(_XID).to_bytes(2, "big") + _XID
    return bytes(frame[at + len(head) :]) if bytes(frame[at : at + len(head)]) == head else None


def _icmpv6(source: bytes, destination: bytes, kind: int, body: bytes) -> bytes:
    """Return an IPv6 packet with an ICMPv6 message of code 0."""
    head = struct.pack("!BB", kind, 0)
    length = len(head) + 2 + len(body)
    # RFC 8200 section 8.1: the pseudo-header.
    pseudo = source + destination + struct.pack("!II", length, _ICMPV6)
    message = head + struct.pack("!H", checksum(pseudo + head + b"\0\0" + body)) + body
    # Hop limit 255 proves to the receiver that no router passed it on (RFC 4861 section 7.1.2).
    return struct.pack("!IHBB16s16s", 6 << 28, length, _ICMPV6, 255, source, destination) + message


def _arp(operation: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    _check(sha, ETH_ALEN, "MAC address")
    return struct.pack(
        "!HHBBH6s4s6s4s", _HW_ETHERNET, ETH_P_IP, ETH_ALEN, 4, operation, sha, spa, tha, tpa
    )


def ethernet(dst: bytes, src: bytes, tags: Tags, ethertype: int, payload: bytes) -> bytes:
    """Return an Ethernet frame with its VLAN tags, padded to the least length.

    Raises:
        ValueError: a tag is not valid.
    """
    stack = b""
    for tpid, vid in tags:
        # 802.1Q-2018 section 9.6: 0 is 'priority only', 4095 is reserved.
        if not 1 <= vid <= 4094:
            raise ValueError(f"VLAN id {vid} is not between 1 and 4094")
        if not 0x0600 <= tpid <= 0xFFFF:
            raise ValueError(f"0x{tpid:x} is not an ethertype")
        stack += struct.pack("!HH", tpid, vid)
    frame = dst + src + stack + struct.pack("!H", ethertype) + payload
    # Padded as if untagged, so that a switch that takes tags off leaves no short frame.
    return frame.ljust(ETH_ZLEN + len(stack), b"\0")


def checksum(data: bytes) -> int:
    """Return the checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _check(value: bytes, length: int, what: str) -> None:
    if len(value) != length:
        raise ValueError(f"{value!r} is not a valid {what}: it has {len(value)} bytes")
