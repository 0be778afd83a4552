"""Ethernet's numbers: ethertypes, VLAN tags, lengths, the broadcast address.

Ethertypes are IANA's (IEEE 802 Numbers), under the names of include/uapi/linux/if_ether.h.
"""

from __future__ import annotations

#: No ethertype, but what a packet socket is bound to for every protocol.
ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_RARP = 0x8035
ETH_P_IPV6 = 0x86DD

#: IEEE 802.1Q-2018 table 9-1: customer and service VLAN tag.
TPID_8021Q = 0x8100
TPID_8021AD = 0x88A8

#: Bytes of a MAC address, and of a header without tags (if_ether.h).
ETH_ALEN = 6
ETH_HLEN = 14
#: The least bytes an untagged frame has without its FCS (if_ether.h).
ETH_ZLEN = 60

#: IEEE 802.3-2018 section 3.2.3.1: the address of all stations, all bits set.
BROADCAST = b"\xff" * ETH_ALEN
