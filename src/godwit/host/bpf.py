"""An assembler for classic BPF: socket filters, and filters of system calls.

Documentation/networking/filter.rst has the machine: an accumulator A, an index register X, sixteen
words of memory M, and a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# include/uapi/linux/bpf_common.h: classes, sizes, modes and sources, put together.
LD_W_ABS, LD_H_ABS, LD_B_ABS = 0x20, 0x28, 0x30  # A = frame[k]
LD_H_IND, LD_B_IND = 0x48, 0x50  # A = frame[X + k]
LD_IMM, LDX_IMM, LD_MEM = 0x00, 0x01, 0x60  # A = k, X = k, A = M[k]
ST, TAX = 0x02, 0x07  # M[k] = A, X = A
AND, RSH, RSH_X = 0x54, 0x74, 0x7C  # A &= k, A >>= k, A >>= X
JA, JEQ, JGE, JSET = 0x05, 0x15, 0x35, 0x45  # JSET: A & k
RET = 0x06


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
