"""Numbers and structs of packet sockets (include/uapi/linux/if_packet.h) and socket filters.

Python's socket module has few of these.
"""

from __future__ import annotations

from struct import Struct

SOL_PACKET = 263  # include/linux/socket.h

PACKET_STATISTICS = 6
PACKET_AUXDATA = 8
PACKET_IGNORE_OUTGOING = 23  # Linux 4.20

#: sll_pkttype of a frame that the kernel sends; with all others the frame is received.
PACKET_OUTGOING = 4

#: struct tpacket_auxdata: status, length, captured length, offsets of MAC and network header,
#: VLAN TCI and TPID.
AUXDATA = Struct("=IIIHHHH")
STATUS_VLAN_VALID = 1 << 4
STATUS_VLAN_TPID_VALID = 1 << 6
#: struct tpacket_stats: packets, drops. Reading sets both to zero.
STATISTICS = Struct("=II")

SO_ATTACH_FILTER = 26  # include/uapi/asm-generic/socket.h
#: struct sock_filter and struct sock_fprog (include/uapi/linux/filter.h); the pointer is aligned.
SOCK_FILTER = Struct("=HBBI")
SOCK_FPROG = Struct("@HP")
