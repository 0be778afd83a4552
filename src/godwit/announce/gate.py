"""The gate of a cloned guest's NIC: nothing leaves by the addresses of the guest it is a copy of.

The original runs on, with the same MAC and IP addresses. A frame that used one of them from another
port would take the original's traffic away. So the copy is silent until it uses a MAC address of
its own, and never uses an IP address of the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from godwit.host.net.ethernet import ETH_ALEN, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_RARP
from godwit.hw.nic.nic import GATE_LOOK

from .dissect import Malformed, is_host_ip, is_host_mac, split

#: Addresses learned from frames that were held back, at most.
MAX_LEARNED = 1024
_ICMPV6, _ADVERTISEMENT = 58, 136


class Gate:
    """The gate of one NIC, whose guest was copied with the addresses ``macs`` and ``ips``.

    ``on_own(mac)`` is called once, by the thread that sends, for the first frame with a MAC and an
    IP address that the original had not. Not for several threads at once.
    """

    def __init__(
        self, macs: Iterable[bytes], ips: Iterable[bytes], on_own: Callable[[bytes], None]
    ) -> None:
        self._macs = frozenset(macs)
        self._ips = set(ips)
        self._learned = 0
        self._on_own = on_own
        #: Whether the guest has used an address of its own.
        self.open = False
        #: Frames held back.
        self.held = 0

    def passes(self, frame: bytes) -> bool:
        """Return whether an Ethernet frame may leave, by its first :data:`.GATE_LOOK` bytes."""
        own = self._own(frame[:GATE_LOOK])
        if own is None:
            self.held += 1
            return False
        if own and not self.open:
            self.open = True
            self._on_own(frame[ETH_ALEN : 2 * ETH_ALEN])
        return True

    def _own(self, data: bytes) -> bool | None:
        """Return None for a frame to be held back, or whether an IP address of its own is in it."""
        source = data[ETH_ALEN : 2 * ETH_ALEN]
        try:
            _, ethertype, at = split(data, None)
        except Malformed:
            return None
        if not is_host_mac(source):
            return None
        ip = _claimed(data, ethertype, at)
        if source in self._macs:
            self._learn(ip)
            return None
        resolves = ethertype in (ETH_P_ARP, ETH_P_RARP) or _is_icmpv6(data, ethertype, at)
        if resolves and any(mac in data[at:] for mac in self._macs):
            return None
        if ip in self._ips:
            return None
        return is_host_ip(ip)

    def _learn(self, ip: bytes) -> None:
        if is_host_ip(ip) and ip not in self._ips and self._learned < MAX_LEARNED:
            self._learned += 1
            self._ips.add(ip)


def _is_icmpv6(data: bytes, ethertype: int, at: int) -> bool:
    return ethertype == ETH_P_IPV6 and data[at + 6 : at + 7] == bytes((_ICMPV6,))


def _claimed(data: bytes, ethertype: int, at: int) -> bytes:
    """Return the IP address that a frame says is the sender's, or nothing."""
    if ethertype == ETH_P_ARP:
        return data[at + 14 : at + 18]
    if ethertype == ETH_P_IP:
        return data[at + 12 : at + 16]
    if ethertype != ETH_P_IPV6:
        return b""
    if _is_icmpv6(data, ethertype, at) and data[at + 40 : at + 41] == bytes((_ADVERTISEMENT,)):
        ip = data[at + 48 : at + 64]
    else:
        ip = data[at + 8 : at + 24]
    return ip if len(ip) == 16 else b""
