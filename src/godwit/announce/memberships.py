"""The multicast memberships of one NIC's guest: the guest's reports, and the host's.

A snooping switch forwards a group to the ports from which reports came. After a migration the new
port is none of them until the next query, up to 125 s later (RFC 3376 section 8.2): unless the
guest reports again, as Linux does with the announcement, or the host does in the guest's name.
IGMP: RFC 1112, 2236 and 3376. MLD: RFC 2710 and 3810.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from godwit.host.net.ethernet import ETH_P_IP, ETH_P_IPV6

from . import saved
from .dissect import Malformed, is_group, is_host_mac, is_sender, split
from .frames import Tag, checksum, ethernet
from .saved import MAX_MEMBERSHIPS, MAX_SOURCES, SavedMembership

_IGMP, _ICMPV6, _HOP_BY_HOP = 2, 58, 0
_V1_REPORT, _V2_REPORT, _LEAVE, _V3_REPORT = 0x12, 0x16, 0x17, 0x22
_MLD_REPORT, _MLD_DONE, _MLD2_REPORT = 131, 132, 143
#: RFC 3376 section 4.2.12 and RFC 3810 section 5.2.12: types of a group record.
_IS_IN, _IS_EX, _TO_IN, _TO_EX, _ALLOW, _BLOCK = range(1, 7)
#: Router alert (RFC 2113, RFC 2711), which a report has to have.
_ALERT4, _ALERT6 = bytes.fromhex("94040000"), bytes.fromhex("0502000001 00")
_ALL_IGMPV3 = bytes([224, 0, 0, 22])
_ALL_MLDV2 = bytes.fromhex("ff020000000000000000000000000016")

_Tags = tuple[Tag, ...]
#: VLAN tags, group, MAC address: several behind one NIC may have joined.
_Key = tuple[_Tags, bytes, bytes]


class Membership(NamedTuple):
    """A group the guest receives in one network.

    Attributes:
        mac: the sender of the report.
        tags: VLAN tags from the outside in.
        ip: the report's source, of the group's family; perhaps unspecified.
        group: 4 or 16 bytes.
        version: of the report: IGMP 1 to 3, MLD 1 or 2.
        sources: the only senders wanted; none: any sender.
        last_seen: when the guest last reported, seconds.
    """

    mac: bytes
    tags: _Tags
    ip: bytes
    group: bytes
    version: int
    sources: tuple[bytes, ...]
    last_seen: float


class _Change(NamedTuple):
    """A record of a report: what becomes of the membership in a group."""

    group: bytes
    kind: int
    sources: tuple[bytes, ...]


class Memberships:
    """The memberships of one NIC's guest, at most 128, without a lock."""

    def __init__(self) -> None:
        self._loaded: dict[_Key, Membership] = {}  # the one reported last at the end
        self._state: tuple[list[SavedMembership], float] | None = None  # not looked at yet
        self._oldest = float("-inf")  # of which nothing older counts

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Membership]:
        return iter(tuple(self._known.values()))

    @property
    def _known(self) -> dict[_Key, Membership]:
        if self._state is not None:
            (state, now), self._state = self._state, None
            self._loaded = {}
            for one in sorted(state, key=lambda one: -one.age):
                tags, sources = saved.to_tags(one.tags), tuple(one.sources)
                if now - one.age < self._oldest:
                    continue
                self._loaded[tags, one.group, one.mac] = Membership(
                    one.mac, tags, one.ip, one.group, one.version, sources, now - one.age
                )
        return self._loaded

    def learn(self, frame: bytes, outer: Tag | None, now: float) -> bool:
        """Learn from a frame of the guest's, and return whether the frame was a report.

        Raises:
            Malformed: no honest host sends such a report.
        """
        report = _dissect(frame, outer)
        if report is None:
            return False
        mac, tags, ip, version, changes = report
        for group, kind, sources in changes:
            key = tags, group, mac
            known = self._known.pop(key, None)
            wanted = _after(known.sources if known else None, kind, sources)
            if wanted is not None:
                self._known[key] = Membership(mac, tags, ip, group, version, wanted, now)
            if len(self._known) > MAX_MEMBERSHIPS:
                del self._known[next(iter(self._known))]
        return True

    def forget_old(self, oldest: float) -> None:
        """Forget what was last reported before ``oldest``."""
        if self._state is not None:
            self._oldest = oldest
            return
        for key in [key for key, one in self._known.items() if one.last_seen < oldest]:
            del self._known[key]

    def save(self, now: float) -> list[SavedMembership]:
        """Return the memberships with their ages."""
        return [
            SavedMembership(
                one.mac,
                saved.from_tags(one.tags),
                one.ip,
                one.group,
                one.version,
                max(0.0, now - one.last_seen),
                list(one.sources),
            )
            for one in self
        ]

    def load(self, state: list[SavedMembership], now: float) -> None:
        """Replace the memberships by a checked state's, which is looked at later.

        A guest that stands still waits for nobody's groups.
        """
        self._state = state, now


def report(one: Membership) -> bytes:
    """Return the frame of a membership's report, in the version the guest uses."""
    if len(one.group) == 4:
        payload, to = _igmp(one)
        kind, mac = ETH_P_IP, b"\x01\x00\x5e" + bytes([to[1] & 0x7F]) + to[2:]
    else:
        payload, to = _mld(one)
        kind, mac = ETH_P_IPV6, b"\x33\x33" + to[12:]
    return ethernet(mac, one.mac, one.tags, kind, payload)


def _igmp(one: Membership) -> tuple[bytes, bytes]:
    if one.version < 3:
        to = one.group
        kind = _V1_REPORT if one.version == 1 else _V2_REPORT
        body = struct.pack("!BBH4s", kind, 0, 0, one.group)
    else:
        to = _ALL_IGMPV3
        body = struct.pack("!BxHxxH", _V3_REPORT, 0, 1) + _record(one)
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    # RFC 2236 section 2: TTL 1; precedence as Linux sets it (net/ipv4/igmp.c, igmpv3_newpack).
    head = struct.pack(
        "!BBHHHBBH4s4s4s", 0x46, 0xC0, 24 + len(body), 0, 0x4000, 1, _IGMP, 0, one.ip, to, _ALERT4
    )
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body, to


def _mld(one: Membership) -> tuple[bytes, bytes]:
    if one.version < 2:
        to = one.group
        body = struct.pack("!BxHxxxx16s", _MLD_REPORT, 0, one.group)
    else:
        to = _ALL_MLDV2
        body = struct.pack("!BxHxxH", _MLD2_REPORT, 0, 1) + _record(one)
    pseudo = one.ip + to + struct.pack("!II", len(body), _ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    hop_by_hop = bytes([_ICMPV6, 0]) + _ALERT6
    length = len(hop_by_hop) + len(body)
    head = struct.pack("!IHBB16s16s", 6 << 28, length, _HOP_BY_HOP, 1, one.ip, to)
    return head + hop_by_hop + body, to


def _record(one: Membership) -> bytes:
    kind = _IS_IN if one.sources else _IS_EX
    return struct.pack("!BBH", kind, 0, len(one.sources)) + one.group + b"".join(one.sources)


def _after(
    before: tuple[bytes, ...] | None, kind: int, sources: tuple[bytes, ...]
) -> tuple[bytes, ...] | None:
    """Return the sources wanted after a change: none for any, None for no membership.

    More sources than are remembered count as any: the guest then gets more than is wanted.
    """
    if kind in (_IS_EX, _TO_EX):
        return ()
    if kind in (_IS_IN, _TO_IN):
        wanted = sources
    elif before == ():
        return ()  # any sender but some, or any sender again
    elif kind == _ALLOW:
        wanted = tuple(dict.fromkeys((*(before or ()), *sources)))
    else:
        wanted = tuple(one for one in before or () if one not in sources)
    if not wanted:
        return None
    return wanted if len(wanted) <= MAX_SOURCES else ()


def _dissect(
    frame: bytes, outer: Tag | None
) -> tuple[bytes, _Tags, bytes, int, list[_Change]] | None:
    tags, kind, at = split(frame, outer)
    if kind == ETH_P_IP:
        found = _of_ipv4(frame, at)
    elif kind == ETH_P_IPV6:
        found = _of_ipv6(frame, at)
    else:
        return None
    if found is None:
        return None
    ip, version, changes = found
    mac = frame[6:12]
    if not is_host_mac(mac):
        raise Malformed("source is a multicast or null address")
    sources = (one for change in changes for one in change.sources)
    if not all(map(is_sender, (ip, *sources))) or not all(is_group(one.group) for one in changes):
        raise Malformed("report: not a sender's or a group's address")
    return mac, tags, ip, version, changes


def _of_ipv4(frame: bytes, at: int) -> tuple[bytes, int, list[_Change]] | None:
    header = frame[at : at + 20]
    if len(header) < 20 or header[0] >> 4 != 4 or header[9] != _IGMP:
        return None
    body = frame[at + 4 * (header[0] & 15) : at + int.from_bytes(header[2:4], "big")]
    if len(body) < 8:
        raise Malformed("truncated IGMP")
    ip, kind = header[12:16], body[0]
    if kind in (_V1_REPORT, _V2_REPORT, _LEAVE):
        what = _TO_IN if kind == _LEAVE else _IS_EX
        return ip, 1 if kind == _V1_REPORT else 2, [_Change(body[4:8], what, ())]
    return (ip, 3, _records(body, 4)) if kind == _V3_REPORT else None


def _of_ipv6(frame: bytes, at: int) -> tuple[bytes, int, list[_Change]] | None:
    header = frame[at : at + 40]
    options = frame[at + 40 : at + 48]
    if len(options) < 8 or header[0] >> 4 != 6 or header[6] != _HOP_BY_HOP:
        return None
    # RFC 3810 section 5: with a router alert, and nothing else.
    if options[0] != _ICMPV6 or options[1] != 0:
        return None
    body = frame[at + 48 : at + 40 + int.from_bytes(header[4:6], "big")]
    if len(body) < 8:
        raise Malformed("truncated MLD")
    ip, kind = header[8:24], body[0]
    if kind in (_MLD_REPORT, _MLD_DONE):
        if len(body) < 24:
            raise Malformed("truncated MLD")
        what = _TO_IN if kind == _MLD_DONE else _IS_EX
        return ip, 1, [_Change(body[8:24], what, ())]
    return (ip, 2, _records(body, 16)) if kind == _MLD2_REPORT else None


def _records(body: bytes, size: int) -> list[_Change]:
    """Return the group records of a report whose addresses have ``size`` bytes."""
    found = []
    at = 8
    for _ in range(min(int.from_bytes(body[6:8], "big"), MAX_MEMBERSHIPS)):
        if len(body) < at + 4 + size:
            raise Malformed("report: truncated record")
        kind, auxiliary, count = (
            body[at],
            body[at + 1],
            int.from_bytes(body[at + 2 : at + 4], "big"),
        )
        first = at + 4 + size
        end = first + count * size
        if len(body) < end or not _IS_IN <= kind <= _BLOCK:
            raise Malformed("report: bad record")
        sources = tuple(body[one : one + size] for one in range(first, end, size))
        found.append(_Change(body[at + 4 : first], kind, sources))
        at = end + 4 * auxiliary
    return found
