"""Classic socket filters: a small assembler, and the filters for where addresses are.

Documentation/networking/filter.rst has the machine: an accumulator A, an index register X, and a
verdict, which is how many bytes of the frame to keep. A load past a frame's end drops the frame.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import packet
from .ethernet import ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_RARP, TPID_8021AD, TPID_8021Q

# include/uapi/linux/bpf_common.h: classes, sizes, modes and sources, put together.
LD_W_ABS, LD_H_ABS, LD_B_ABS = 0x20, 0x28, 0x30  # A = frame[k]
LD_H_IND, LD_B_IND = 0x48, 0x50  # A = frame[X + k]
LD_IMM, LDX_IMM, LD_MEM = 0x00, 0x01, 0x60  # A = k, X = k, A = M[k]
ST, TAX = 0x02, 0x07  # M[k] = A, X = A
AND, RSH, RSH_X = 0x54, 0x74, 0x7C  # A &= k, A >>= k, A >>= X
JA, JEQ, JSET = 0x05, 0x15, 0x45  # JSET: A & k
RET = 0x06

#: include/uapi/linux/filter.h: SKF_AD_OFF + SKF_AD_PKTTYPE, where a load gives sll_pkttype.
PKTTYPE = 0xFFFFF000 + 4

#: How much of a frame is kept, bytes. Reports of many memberships are the longest.
SNAP = 2048


class Op(NamedTuple):
    """An instruction, of which a jump names two labels (None: the next instruction)."""

    code: int
    k: int = 0
    yes: str | None = None
    no: str | None = None


class Instruction(NamedTuple):
    """An instruction of the machine, of which a jump counts the instructions to skip."""

    code: int
    yes: int
    no: int
    k: int


def assemble(lines: Sequence[Op | str]) -> list[Instruction]:
    """Assemble instructions from operations and the labels before operations.

    Raises:
        ValueError: a jump goes backwards, to no label, or too far.
    """
    labels: dict[str, int] = {}
    ops: list[Op] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(ops)
        else:
            ops.append(line)

    def distance(at: int, label: str | None) -> int:
        if label is None:
            return 0
        found = labels.get(label, -1) - at - 1
        if not 0 <= found <= 255:
            raise ValueError(f"instruction {at} cannot jump to '{label}'")
        return found

    program = []
    for at, op in enumerate(ops):
        if op.code == JA:
            program.append(Instruction(JA, 0, 0, distance(at, op.yes)))
        else:
            program.append(Instruction(op.code, distance(at, op.yes), distance(at, op.no), op.k))
    return program


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
