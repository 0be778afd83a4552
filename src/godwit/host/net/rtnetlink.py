"""Links, bridge ports and forwarding entries, read by rtnetlink.

rtnetlink(7), linux/rtnetlink.h, linux/if_link.h, linux/neighbour.h. Nothing is changed.
A library would cover more, but takes longer to import than a guest takes to migrate: see
docs/decisions/0008-rtnetlink.md.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .ethernet import ETH_ALEN

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_IFINFO = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_NDMSG = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_ERROR, _DONE = 2, 3
_NEWLINK, _GETLINK = 16, 18
_NEWNEIGH, _GETNEIGH = 28, 30
_REQUEST, _DUMP = 1, 0x300
_GROUP_LINK = 1

_IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 3, 4, 10, 18
_INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 4, 5
_BRPORT_STATE = 1
_IFF_LOWER_UP = 1 << 16
_AF_BRIDGE = 7
_NDA_LLADDR, _NDA_VLAN = 2, 5
_NTF_SELF = 2

#: BR_STATE_FORWARDING (linux/if_bridge.h).
FORWARDING = 3
_MAX_ERRNO = 4095  # linux/err.h
_RECEIVE_BYTES = 1 << 17


class Link(NamedTuple):
    """An interface, as a message describes the interface.

    Attributes:
        number: the interface's index.
        name: the interface's name.
        carrier: the interface is up, and so is the layer below (IFF_LOWER_UP).
        master: index of the bridge (or other master) the interface is a port of; 0: of none.
        port_state: BR_STATE_* of a bridge's port; None for anything else.
        mtu: bytes of the longest packet, without Ethernet's header; 0: not known.
    """

    number: int
    name: str
    carrier: bool
    master: int
    port_state: int | None
    mtu: int = 0


class Forwarding(NamedTuple):
    """An entry of a bridge's forwarding database: ``mac`` in ``vlan`` (0: none) is at ``port``."""

    mac: bytes
    vlan: int
    port: int


class LinkEvents:
    """A socket that receives every change of a link in this network namespace."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self.sock.setblocking(False)
            self.sock.bind((0, _GROUP_LINK))
        except BaseException:
            self.sock.close()
            raise

    def changed(self) -> bool:
        """Return whether any link changed since the last call.

        Which link, and how, has to be asked: a bridge reports its ports in messages that lack the
        rest (net/bridge/br_netlink.c).

        Raises:
            OSError: the socket fails.
        """
        found = False
        while True:
            try:
                self.sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # ENOBUFS: too much changed at once
                    raise
            found = True

    def close(self) -> None:
        """Close the socket, and receive no more changes."""
        self.sock.close()


def link(name: str) -> Link | None:
    """Return the interface of that name, or None if there is none.

    Raises:
        OSError: the kernel does not answer, or refuses.
    """
    attribute = _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute
    try:
        for data in _ask(_GETLINK, 0, body):
            for found in _links(data):
                return found
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    return None


def forwarding(bridge: int) -> list[Forwarding]:
    """Return the forwarding database of the bridge with that index.

    Raises:
        OSError: the kernel does not answer, or refuses.
    """
    found = []
    for data in _ask(_GETNEIGH, _DUMP, _IFINFO.pack(_AF_BRIDGE, 0, 0, 0, 0) + _master(bridge)):
        for kind, body in _messages(data):
            if kind != _NEWNEIGH or len(body) < _NDMSG.size:
                continue
            family, port, _, flags, _ = _NDMSG.unpack_from(body)
            attributes = dict(_attributes(body[_NDMSG.size :]))
            mac = attributes.get(_NDA_LLADDR, b"")
            # NTF_SELF: the card's own list of addresses, not the bridge's database.
            if family == _AF_BRIDGE and len(mac) == ETH_ALEN and not flags & _NTF_SELF:
                vlan = int.from_bytes(attributes.get(_NDA_VLAN, b"")[:2], "little")
                found.append(Forwarding(mac, vlan, port))
    return found


def _master(index: int) -> bytes:
    return _attribute(_IFLA_MASTER, struct.pack("=I", index))


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def _ask(kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Send a request and yield the datagrams of the answer.

    Raises:
        OSError: the kernel does not answer, or refuses.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(5)
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, 1, 0)
        sock.sendto(header + body, (0, 0))
        while True:
            data = sock.recv(_RECEIVE_BYTES)
            yield data
            for got, payload in _messages(data):
                if got in (_DONE, _ERROR):
                    # A dump that failed has the error in its last message
                    # (net/netlink/af_netlink.c, netlink_dump_done); both begin with the error,
                    # negative.
                    code = min(-int.from_bytes(payload[:4], "little", signed=True), _MAX_ERRNO)
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                if got in (_DONE, _ERROR) or not flags & _DUMP:
                    return


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, data[at + _HEADER.size : at + length]
        at += length + -length % 4


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4


def _links(data: bytes) -> Iterator[Link]:
    for kind, body in _messages(data):
        if kind != _NEWLINK or len(body) < _IFINFO.size:
            continue
        _, _, index, flags, _ = _IFINFO.unpack_from(body)
        attributes = dict(_attributes(body[_IFINFO.size :]))
        yield Link(
            index,
            attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
            bool(flags & _IFF_LOWER_UP),
            int.from_bytes(attributes.get(_IFLA_MASTER, b""), "little"),
            _port_state(attributes.get(_IFLA_LINKINFO, b"")),
            int.from_bytes(attributes.get(_IFLA_MTU, b""), "little"),
        )


def _port_state(linkinfo: bytes) -> int | None:
    info = dict(_attributes(linkinfo))
    if info.get(_INFO_SLAVE_KIND, b"").rstrip(b"\0") != b"bridge":
        return None
    state = dict(_attributes(info.get(_INFO_SLAVE_DATA, b""))).get(_BRPORT_STATE)
    return state[0] if state else None
