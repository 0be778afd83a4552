"""Classic socket filters: a small assembler, and the filter for address resolution.

Documentation/networking/filter.rst has the machine: an accumulator A, an index register X, and a
verdict, which is how many bytes of the frame to keep. A load past a frame's end drops the frame.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from typing import NamedTuple

from . import packet
from .ethernet import ETH_P_ARP, ETH_P_IPV6, ETH_P_RARP, TPID_8021AD, TPID_8021Q

# include/uapi/linux/bpf_common.h: classes, sizes, modes and sources, put together.
LD_W_ABS, LD_H_ABS = 0x20, 0x28  # A = frame[k]
LD_H_IND, LD_B_IND = 0x48, 0x50  # A = frame[X + k]
LDX_IMM = 0x01  # X = k
JA, JEQ = 0x05, 0x15
RET = 0x06

#: include/uapi/linux/filter.h: SKF_AD_OFF + SKF_AD_PKTTYPE, where a load gives sll_pkttype.
PKTTYPE = 0xFFFFF000 + 4

#: How much of a frame is kept, bytes. A signed advertisement (RFC 3971) is longer than most.
SNAP = 1024


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


def addresses_filter(answers: bool = False) -> list[Instruction]:
    """Return the filter that passes received ARP, RARP, neighbour solicitations and advertisements.

    With ``answers``, the filter passes outgoing ARP replies and advertisements instead. Besides the
    tag the kernel took off, a frame may have two more.
    """
    way: Sequence[Op | str] = (
        Op(LD_W_ABS, PKTTYPE),
        Op(JEQ, packet.PACKET_OUTGOING, None, "drop")
        if answers
        else Op(JEQ, packet.PACKET_OUTGOING, "drop"),
    )
    tags: Sequence[Op | str] = (
        # X is what the tags take: all offsets below are those of an untagged frame.
        Op(LDX_IMM, 0),
        Op(LD_H_ABS, 12),  # ethertype
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
        Op(JEQ, ETH_P_IPV6, "ipv6"),
        Op(JEQ, ETH_P_ARP, "arp"),
    )
    arp: Sequence[Op | str] = (
        ("arp", Op(LD_H_IND, 14 + 6), Op(JEQ, 2, "pass", "drop"))  # RFC 826: a reply
        if answers
        else (Op(JEQ, ETH_P_RARP, "arp", "drop"), "arp", Op(JA, yes="pass"))
    )
    ipv6: Sequence[Op | str] = (
        "ipv6",
        Op(LD_B_IND, 14 + 6),  # next header
        Op(JEQ, 58, None, "drop"),  # ICMPv6
        Op(LD_B_IND, 14 + 40),  # its type
        Op(JEQ, 136, "pass"),  # RFC 4861: advertisement
        *([] if answers else [Op(JEQ, 135, "pass")]),  # solicitation
        "drop",
        Op(RET, 0),
        "pass",
        Op(RET, SNAP),
    )
    unlike = [Op(JA, yes="drop")] if answers else []
    return assemble([*way, *tags, *unlike, *arp, *ipv6])


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
