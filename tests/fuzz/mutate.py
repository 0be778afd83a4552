"""Mutations of inputs: of bytes, of numbers, of words, of whole records."""

from __future__ import annotations

import random

from .target import LONGEST, Target

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF)
_NUMBERS += (0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutate(rnd: random.Random, target: Target, data: bytes, other: bytes) -> bytes:
    """Return an input like ``data``, with perhaps something of ``other``."""
    for _ in range(rnd.choice((1, 1, 2, 3, 6, 12))):
        if target.mutators and rnd.random() < 0.5:
            data = rnd.choice(target.mutators)(rnd, data)
        elif target.record and rnd.random() < 0.4:
            data = _records(rnd, target, data, other)
        else:
            data = _bytes(rnd, target, data, other)
    return data[:LONGEST]


def _bytes(rnd: random.Random, target: Target, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    at = rnd.randrange(len(data) + 1)
    kind = rnd.randrange(9)
    if kind == 0 and at < len(data):
        changed[at] ^= 1 << rnd.randrange(8)
    elif kind == 1 and at < len(data):
        changed[at] = rnd.getrandbits(8)
    elif kind == 2:
        width = rnd.choice((1, 2, 4, 8))
        number = rnd.choice(_NUMBERS) & ((1 << 8 * width) - 1)
        changed[at : at + width] = number.to_bytes(width, rnd.choice(("little", "big")))
    elif kind == 3:
        changed[at:at] = rnd.randbytes(rnd.randrange(1, 17))
    elif kind == 4:
        del changed[at : at + rnd.choice((1, 2, 4, 16, 64))]
    elif kind == 5:
        length = rnd.choice((1, 4, 16, 64))
        changed[at:at] = data[at : at + length] * rnd.choice((1, 1, 2, 8))
    elif kind == 6 and target.tokens:
        token = rnd.choice(target.tokens)
        changed[at : at + rnd.choice((0, len(token)))] = token
    elif kind == 7:
        start = rnd.randrange(len(other) + 1)
        changed[at:] = other[start:]
    elif kind == 8:
        del changed[at:]
    return bytes(changed)


def _records(rnd: random.Random, target: Target, data: bytes, other: bytes) -> bytes:
    """Move, repeat, drop or take over whole records, and leave the head."""
    size, head = target.record, data[: target.head]
    records, others = (_split(one[target.head :], size) for one in (data, other))
    at = rnd.randrange(len(records) + 1)
    kind = rnd.randrange(5)
    if kind == 0 and others:
        start = rnd.randrange(len(others))
        records[at:at] = others[start : start + rnd.choice((1, 2, 4, 16))]
    elif kind == 1 and records:
        records[at:at] = [records[rnd.randrange(len(records))]] * rnd.choice((1, 1, 2, 32))
    elif kind == 2:
        del records[at : at + rnd.choice((1, 2, 8))]
    elif kind == 3:
        records.insert(at, rnd.randbytes(size))
    elif len(records) > 1:
        one, two = rnd.randrange(len(records)), rnd.randrange(len(records))
        records[one], records[two] = records[two], records[one]
    return head + b"".join(records)


def _split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
