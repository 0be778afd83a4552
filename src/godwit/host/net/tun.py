"""ioctl numbers and flags of tun/tap devices (include/uapi/linux/if_tun.h)."""

from __future__ import annotations

from struct import Struct

from godwit.host.ioctl import iow

_TUN = 0x54  # 'T'
IFREQ = Struct("=16sH22x")

TUNSETIFF = iow(_TUN, 202, 4)
TUNSETOFFLOAD = iow(_TUN, 208, 4)
TUNSETVNETHDRSZ = iow(_TUN, 216, 4)

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, F_UFO = 1, 2, 4, 8, 16
