"""The gates of a copied guest's NICs: nothing leaves by the addresses of the guest it is a copy of.

The original runs on, with the same MAC and IP addresses. A frame that used one of them from another
port would take the original's traffic away. So the copy is silent until it uses a MAC address of
its own, and never uses an IP address of the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from godwit.host.net.ethernet import ETH_ALEN, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_RARP

from .dissect import Malformed, is_host_ip, is_host_mac, split

#: Addresses learned from frames that were held back, at most.
MAX_LEARNED = 1024
#: For how long a copy has to leave the original's addresses alone before it may leave, seconds.
QUIET_S = 60.0
_IPV4_HEADER, _IPV6_HEADER = 20, 40
_ICMPV6 = 58
#: Extension headers that a host may put before ICMPv6: hop-by-hop, routing, destination options.
_EXTENSIONS = (0, 43, 60)
#: RFC 4861 section 4: from router solicitation to redirect; an advertisement has its own target.
_NEIGHBOUR, _ADVERTISEMENT = range(133, 138), 136
#: Of an advertisement: the target (RFC 4861 section 4.4).
_TARGET = 8


class Original:
    """The addresses of a guest that goes on elsewhere, of all its NICs.

    Those that its copy uses by an old MAC address are learned.
    """

    def __init__(self, macs: Iterable[bytes], ips: Iterable[bytes]) -> None:
        self.macs = frozenset(macs)
        self.ips = set(ips)
        self._learned = 0

    def learn(self, ip: bytes) -> None:
        """Take note of one more IP address, up to a bound."""
        if is_host_ip(ip) and ip not in self.ips and self._learned < MAX_LEARNED:
            self._learned += 1
            self.ips.add(ip)


class Gate:
    """The gate of one NIC of a copy of ``original``.

    ``on_own(mac)`` is called once, by the thread that sends, for the first frame with a MAC and an
    IP address that the original had not. Not for several threads at once.
    """

    def __init__(
        self, original: Original, on_own: Callable[[bytes], None], now: Callable[[], float]
    ) -> None:
        self._original = original
        self._on_own = on_own
        self._now = now
        #: True once the guest has used an address of its own, and not one of the link alone.
        self.open = False
        #: Frames held back, and when the last of them was.
        self.held = 0
        self.held_at: float | None = None

    @property
    def settled(self) -> bool:
        """True for a guest that uses its own addresses, and left the original's alone of late."""
        quiet = self.held_at is None or self._now() - self.held_at >= QUIET_S
        return self.open and quiet

    def passes(self, frame: bytes, checksum_at: int | None = None) -> bool:
        """Return whether an Ethernet frame may leave.

        ``checksum_at`` is the offset of the checksum that the kernel will store into the frame.
        """
        own = self._own(frame, checksum_at)
        if own is None:
            self.held += 1
            self.held_at = self._now()
            return False
        if own and not self.open:
            self.open = True
            self._on_own(frame[ETH_ALEN : 2 * ETH_ALEN])
        return True

    def _own(self, data: bytes, checksum_at: int | None) -> bool | None:
        """Return None for a frame to be held back, or whether an IP address of its own is in it."""
        source = data[ETH_ALEN : 2 * ETH_ALEN]
        try:
            _, ethertype, at = split(data, None)
            ip, neighbour = _claimed(data, ethertype, at)
        except (Malformed, IndexError):
            return None
        if not is_host_mac(source):
            return None
        if source in self._original.macs:
            self._original.learn(ip)
            return None
        if checksum_at is not None and checksum_at < _fixed(ethertype, at, neighbour):
            return None
        if any(mac in self._original.macs for mac in _senders(data, ethertype, at)):
            return None
        if neighbour and any(mac in data[neighbour:] for mac in self._original.macs):
            return None
        if ip in self._original.ips:
            return None
        return is_host_ip(ip) and not _is_link_local(ip)


def _is_link_local(ip: bytes) -> bool:
    return ip[:2] == b"\xa9\xfe" if len(ip) == 4 else ip[0] == 0xFE and ip[1] & 0xC0 == 0x80


def _senders(data: bytes, ethertype: int, at: int) -> list[bytes]:
    """Return the MAC addresses that ARP or RARP say are the sender's."""
    if ethertype == ETH_P_ARP:
        return [data[at + 8 : at + 14]]
    return [data[at + 8 : at + 14], data[at + 18 : at + 24]] if ethertype == ETH_P_RARP else []


def _fixed(ethertype: int, at: int, neighbour: int) -> int:
    """Return the offset before which nothing may change after the look."""
    if neighbour:
        return neighbour + _TARGET + 16
    if ethertype == ETH_P_IP:
        return at + _IPV4_HEADER
    return at + _IPV6_HEADER if ethertype == ETH_P_IPV6 else 1 << 16


def _claimed(data: bytes, ethertype: int, at: int) -> tuple[bytes, int]:
    """Return the IP address that is the sender's by a frame, and the offset of neighbour discovery.

    Nothing and 0 if there is none.

    Raises:
        IndexError, Malformed: the frame is cut off, or hides what is in it.
    """
    if ethertype == ETH_P_ARP:
        return data[at + 14 : at + 18], 0
    if ethertype == ETH_P_IP:
        return data[at + 12 : at + 16], 0
    if ethertype != ETH_P_IPV6:
        return b"", 0
    ip = data[at + 8 : at + 24]
    if len(ip) < 16:
        raise Malformed("truncated IPv6 header")
    kind, message = data[at + 6], at + _IPV6_HEADER
    plain = kind == _ICMPV6
    while kind in _EXTENSIONS:
        kind, message = data[message], message + 8 * (data[message + 1] + 1)
    if kind != _ICMPV6 or data[message] not in _NEIGHBOUR:
        return ip, 0
    if not plain:
        raise Malformed("neighbour discovery behind an extension header")
    if data[message] == _ADVERTISEMENT:
        ip = data[message + _TARGET : message + _TARGET + 16]
        if len(ip) < 16:
            raise Malformed("truncated advertisement")
    return ip, message
