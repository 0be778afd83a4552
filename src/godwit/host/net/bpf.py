"""Classic socket filters for where addresses are.

The verdict of such a filter is how many bytes of the frame to keep, and a load past a frame's end
drops the frame (Documentation/networking/filter.rst).
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from godwit.host.bpf import (
    AND,
    JA,
    JEQ,
    JSET,
    LD_B_ABS,
    LD_B_IND,
    LD_H_ABS,
    LD_H_IND,
    LD_IMM,
    LD_MEM,
    LD_W_ABS,
    LDX_IMM,
    RET,
    RSH,
    RSH_X,
    ST,
    TAX,
    Instruction,
    Op,
    assemble,
)

from . import packet
from .ethernet import ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_RARP, TPID_8021AD, TPID_8021Q

#: include/uapi/linux/filter.h: SKF_AD_OFF + SKF_AD_PKTTYPE, where a load gives sll_pkttype.
PKTTYPE = 0xFFFFF000 + 4

#: How much of a frame is kept, bytes. Reports of many memberships are the longest.
SNAP = 2048


def guest_filter() -> list[Instruction]:
    """Return the filter of received frames from which a guest's addresses are learned.

    The filter passes ARP and RARP, neighbour solicitations and advertisements, router
    advertisements, and reports of multicast memberships (IGMP, MLD). Besides the tag the kernel
    took off, a frame may have two more.
    """
    return assemble(
        [
            *(Op(LD_W_ABS, PKTTYPE), Op(JEQ, packet.PACKET_OUTGOING, "drop")),
            *_TAGS,
            *(Op(JEQ, ETH_P_ARP, "pass"), Op(JEQ, ETH_P_RARP, "pass")),
            Op(JEQ, ETH_P_IPV6, "ipv6"),
            Op(JEQ, ETH_P_IP, None, "drop"),
            *(Op(LD_B_IND, 14 + 9), Op(JEQ, 2, "pass", "drop")),  # protocol: IGMP
            "ipv6",
            Op(LD_B_IND, 14 + 6),  # next header
            *(Op(JEQ, 58, "icmpv6"), Op(JEQ, 0, None, "drop")),  # hop-by-hop options
            *(Op(LD_B_IND, 14 + 40), Op(JEQ, 58, None, "drop")),  # with ICMPv6 behind
            Op(LD_B_IND, 14 + 48),  # its type: RFC 2710, RFC 3810
            *(Op(JEQ, one, "pass") for one in (131, 132, 143)),
            Op(JA, yes="drop"),
            "icmpv6",
            Op(LD_B_IND, 14 + 40),  # its type: RFC 4861
            *(Op(JEQ, one, "pass") for one in (134, 135, 136)),
            *_VERDICTS,
        ]
    )


class Bits(NamedTuple):
    """The last bytes of addresses, a bit each: few others have one of them.

    Attributes:
        ipv4, ipv6: of IP addresses whose use by others matters.
        peers: of IPv6 addresses that may advertise themselves to many, as an answer to nobody.
        macs: of MAC addresses.
    """

    ipv4: int = 0
    ipv6: int = 0
    peers: int = 0
    macs: int = 0


def bits(addresses: Iterable[bytes]) -> int:
    """Return a number of 256 bits, with the bit of each address's last byte set."""
    found = 0
    for address in addresses:
        found |= 1 << address[-1]
    return found


def network_filter(known: Bits | None = None) -> list[Instruction]:
    """Return the filter of frames to a guest from which others' addresses are learned.

    The filter passes ARP, neighbour solicitations and advertisements that are answers to one host,
    or whose sender has one of the ``known`` IP addresses (None: any); router advertisements; and
    frames to many hosts from one of the ``known`` MAC addresses. Addresses are known by their last
    bytes: a network's other broadcasts stay in the kernel, most of them.
    """
    everything: Sequence[Op | str] = [Op(JA, yes="pass")]

    def test(name: str, set_bits: int) -> Sequence[Op | str]:
        return bits_test(name, set_bits, "drop") if known else everything

    some = known or Bits()
    own = bits_test("mac", some.macs, "tags") if known else []
    return assemble(
        [
            *(Op(LD_W_ABS, PKTTYPE), Op(JEQ, packet.PACKET_OUTGOING, None, "drop")),
            # To many: from one of the guest's MAC addresses?
            *(Op(LD_B_ABS, 0), Op(JSET, 1, None, "tags")),
            *([Op(LD_B_ABS, 11), *own] if known else []),
            "tags",
            *_TAGS,
            *(Op(JEQ, ETH_P_ARP, "arp"), Op(JEQ, ETH_P_IPV6, None, "drop")),
            Op(LD_B_IND, 14 + 6),  # next header
            Op(JEQ, 58, None, "drop"),  # ICMPv6
            Op(LD_B_IND, 14 + 40),  # its type: RFC 4861
            *(Op(JEQ, 134, "pass"), Op(JEQ, 135, "solicitation"), Op(JEQ, 136, None, "drop")),
            *(Op(LD_B_ABS, 0), Op(JSET, 1, None, "pass")),  # an advertisement to one
            *(Op(LD_B_IND, 14 + 40 + 23), *test("target", some.ipv6 | some.peers)),
            "solicitation",
            *(Op(LD_B_IND, 14 + 23), *test("source", some.ipv6)),
            "arp",
            *(Op(LD_H_IND, 14 + 6), Op(JEQ, 2, None, "request")),  # RFC 826: a reply
            *(Op(LD_B_ABS, 0), Op(JSET, 1, None, "pass")),  # to one
            "request",
            *(Op(LD_B_IND, 14 + 17), *test("sender", some.ipv4)),  # protocol address
            *_VERDICTS,
        ]
    )


def bits_test(name: str, set_bits: int, otherwise: str) -> list[Op | str]:
    """Return instructions that pass a frame if the bit with the number in A is set.

    ``otherwise`` is where to go if not; ``name`` makes the labels unique. X is lost.
    """
    words = [set_bits >> 32 * word & 0xFFFFFFFF for word in range(8)]
    ops: list[Op | str] = [Op(ST, 0), Op(RSH, 5)]
    ops += [Op(JEQ, word, f"{name} {word}") for word in range(7)]
    for word in reversed(range(8)):
        ops += [f"{name} {word}", Op(LD_IMM, words[word]), Op(JA, yes=f"{name} shift")]
    return [
        *ops,
        f"{name} shift",
        *(Op(ST, 1), Op(LD_MEM, 0), Op(AND, 31), Op(TAX), Op(LD_MEM, 1), Op(RSH_X)),
        Op(JSET, 1, "pass", otherwise),
    ]


#: Tags: X is what they take, so that all offsets behind are those of an untagged frame. A is the
#: ethertype.
_TAGS: Sequence[Op | str] = (
    Op(LDX_IMM, 0),
    Op(LD_H_ABS, 12),
    Op(JEQ, TPID_8021Q, "one tag"),
    Op(JEQ, TPID_8021AD, "one tag", "ethertype"),
    "one tag",
    Op(LDX_IMM, 4),
    Op(LD_H_IND, 12),
    Op(JEQ, TPID_8021Q, "two tags"),
    Op(JEQ, TPID_8021AD, "two tags", "ethertype"),
    "two tags",
    Op(LDX_IMM, 8),
    Op(LD_H_IND, 12),
    "ethertype",
)
_VERDICTS: Sequence[Op | str] = ("drop", Op(RET, 0), "pass", Op(RET, SNAP))


def attach(sock: socket.socket, program: Sequence[Instruction]) -> None:
    """Put a filter before a socket's queue.

    Raises:
        OSError: the kernel refuses.
    """
    code = b"".join(packet.SOCK_FILTER.pack(*instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = packet.SOCK_FPROG.pack(len(program), ctypes.addressof(buffer))
    # The kernel copies the program within the call.
    sock.setsockopt(socket.SOL_SOCKET, packet.SO_ATTACH_FILTER, header)
