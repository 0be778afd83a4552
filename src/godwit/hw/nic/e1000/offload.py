"""Checksums, segmentation and VLAN tags of a frame to send (SDM 3.5, 9.2).

The controller adds up all from a start to an end, the checksum field's present content included,
and stores the complement: just what a virtio_net_hdr with NEEDS_CSUM asks of the kernel (virtio
1.2, 5.1.6.2). Where the controller can do what such a header cannot express, the work is done here.
"""

from __future__ import annotations

from struct import pack_into, unpack_from

_NEEDS_CSUM = 1
_GSO_TCPV4, _GSO_TCPV6 = 1, 4

_TUCMD_TCP, _TUCMD_IPV4 = 1 << 24, 1 << 25


class Context:
    """A context descriptor, with both halves (SDM 3.3.6, 3.5.8)."""

    def __init__(self, lower: int, upper: int) -> None:
        self.lower = lower
        self.upper = upper
        self.ipcss, self.ipcso, self.ipcse = lower & 0xFF, lower >> 8 & 0xFF, lower >> 16 & 0xFFFF
        self.tucss, self.tucso, self.tucse = lower >> 32 & 0xFF, lower >> 40 & 0xFF, lower >> 48
        self.tcp = bool(upper & _TUCMD_TCP)
        self.ipv4 = bool(upper & _TUCMD_IPV4)
        self.header_length, self.mss = upper >> 40 & 0xFF, upper >> 48


def fold(total: int) -> int:
    """Return a sum of 16-bit words in ones' complement (RFC 1071)."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ones_sum(data: bytes | bytearray) -> int:
    """Return the ones' complement sum of big-endian 16-bit words.

    An odd byte at the end counts as the high byte of a word.
    """
    if len(data) & 1:
        data = data + b"\0"
    # Modulo 65,535 the words of a large number add up.
    total = int.from_bytes(data, "big")
    return total % 0xFFFF or (0xFFFF if total else 0)


class Offload:
    """The work that is still to be done to ``frame``, as the fields of a virtio_net_hdr."""

    def __init__(self, frame: bytearray) -> None:
        self.frame = frame
        self.flags = self.gso_type = self.header_length = self.gso_size = 0
        self.start = self.offset = 0
        #: How many frames the wire sees.
        self.segments = 1

    def segment(self, context: Context) -> bool:
        """Have the frame cut into TCP segments, or return False if the context makes no sense.

        The driver leaves lengths out of the headers, as the controller fills them in (3.5.7). The
        kernel wants those of the whole frame.
        """
        frame = self.frame
        size, ip, tcp = len(frame), context.ipcss, context.tucss
        header_length, mss = context.header_length, context.mss
        fits = ip + 20 <= tcp <= context.tucso <= size - 2 and tcp + 20 <= header_length < size
        if not fits or not context.tcp or not mss or size - ip > 0xFFFF:
            return False
        if context.ipv4:
            pack_into(">H", frame, ip + 2, size - ip)
        else:
            pack_into(">H", frame, ip + 4, size - ip - 40)
        (pseudo,) = unpack_from(">H", frame, context.tucso)
        pack_into(">H", frame, context.tucso, fold(pseudo + size - tcp))
        self.segments = -(-(size - header_length) // mss)
        if self.segments > 1:  # the kernel takes no other for GSO
            self.gso_type = _GSO_TCPV4 if context.ipv4 else _GSO_TCPV6
            self.gso_size, self.header_length = mss, header_length
        return True

    def ip_checksum(self, context: Context) -> None:
        """Store the checksum of an IPv4 header, for which the kernel has no offload."""
        self._store(context.ipcss, context.ipcso, context.ipcse)

    def checksum(self, start: int, at: int, last: int) -> None:
        """Have the sum from ``start`` to ``last`` (0: to the end) stored at ``at``."""
        whole = last == 0 or last >= len(self.frame) - 1
        if whole and start <= at and at + 2 <= len(self.frame):
            self.flags |= _NEEDS_CSUM
            self.start, self.offset = start, at - start
        else:
            self._store(start, at, last)

    def insert_tag(self, kind: int, tag: int) -> None:
        """Put an 802.1Q tag behind the addresses."""
        self.frame[12:12] = kind.to_bytes(2, "big") + tag.to_bytes(2, "big")
        if self.flags:
            self.start += 4
        if self.gso_type:
            self.header_length += 4

    def _store(self, start: int, at: int, last: int) -> None:
        if at + 2 > len(self.frame):
            return
        covered = self.frame[start : last + 1] if last else self.frame[start:]
        pack_into(">H", self.frame, at, ~ones_sum(covered) & 0xFFFF)
