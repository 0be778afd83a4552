"""A driver's requests to a disk, of any kind, place, length and form, beside a model of the disk.

Findings: an exception that is no guest error; an image that grows, shrinks, or has other bytes than
the model; bytes outside a request's memory changed; more bytes reported than there was memory for.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

from godwit.errors import GuestError
from godwit.host.image import SECTOR, Image
from godwit.hw.virtio.blk import request as blk
from godwit.hw.virtio.chain import Chain

from .target import Choices, Target, piece, require

_SECTORS = 128
_SIZE = _SECTORS * SECTOR
#: The first byte of an input: a disk that cannot be written, one that takes discards, and one whose
#: size is no multiple of 4096.
READONLY, DISCARDS, ODD = 1, 2, 4
KINDS = (blk.IN, blk.OUT, blk.FLUSH, blk.GET_ID, blk.DISCARD, blk.WRITE_ZEROES, 2, 0xFFFF_FFFF)
_IDENTITY = b"fuzzed"


@contextmanager
def _file(size: int) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(number * 7 & 0xFF for number in range(size)))
        file.flush()
        yield Path(file.name)


def run(data: bytes) -> None:
    """Do the requests of an input, and compare the image with the model after each."""
    choices = Choices(data)
    how = choices.number()
    size = _SIZE + (SECTOR if how & ODD else 0)
    with _file(size) as path:
        image = Image(str(path), readonly=bool(how & READONLY), direct=False)
        try:
            doer = blk.Doer(image, _IDENTITY, bool(how & DISCARDS))
            model = bytearray(path.read_bytes())
            while choices:
                _request(doer, choices, model, how)
                require(path.read_bytes() == model, "the image has other bytes than the model")
        finally:
            image.close()


def _request(doer: blk.Doer, choices: Choices, model: bytearray, how: int) -> None:
    form = choices.number()
    kind = KINDS[choices.number() % len(KINDS)]
    sector = choices.number(8) if form & 1 else choices.number() % (_SECTORS + 2)
    body = choices.piece(8192)
    if kind == blk.OUT and form & 2:
        body = body.ljust(-(-len(body) // SECTOR) * SECTOR, b"\x5a")
    outward = bytearray(struct.pack("<IIQ", kind, 0, sector) + body)
    if form & 4:
        outward = outward[: choices.number() % 20]
    space = choices.number(2) % 8192
    if kind == blk.IN and form & 2:
        space = space // SECTOR * SECTOR
    memory = bytearray(b"\xee" * (space + 1 + 16))
    inward = memoryview(memory)[: space + 1 if not form & 8 else 0]
    cut = choices.number()
    chain = Chain(0, _pieces(memoryview(outward), cut), _pieces(inward, cut >> 2), [])
    try:
        request = blk.parse(0, chain)
    except GuestError:
        return
    done = doer.quick(request) if form & 16 else None
    done = done or doer.do(request)
    require(isinstance(done, blk.Done), f"the host failed: {done}")
    assert isinstance(done, blk.Done)
    require(done.status in (blk.OK, blk.IOERR, blk.UNSUPPORTED), f"status {done.status}")
    require(done.written <= len(inward) - 1, f"{done.written} bytes written to {len(inward)}")
    require(memory[len(inward) :] == b"\xee" * (len(memory) - len(inward)), "memory beyond it")
    expected = _expected(model, kind, sector, bytes(outward[16:]), len(inward) - 1, how)
    if expected is None:
        require(done.status != blk.OK, f"kind {kind} at {sector} was done")
    else:
        require(done.status == blk.OK, f"kind {kind} at {sector} was refused: {done.status}")
        require(bytes(inward[: len(expected)]) == expected, "other bytes read than the model has")


def _pieces(view: memoryview, cut: int) -> list[memoryview]:
    """Return the view in up to four pieces, of which some are empty."""
    if not len(view):
        return []
    size = max(1, len(view) // (1 + (cut & 3)))
    found = [view[at : at + size] for at in range(0, len(view), size)]
    return [*found, view[:0]] if cut & 4 else found


def _expected(
    model: bytearray, kind: int, sector: int, body: bytes, space: int, how: int
) -> bytes | None:
    """Return what the guest reads, after a change of the model; None: nothing is done."""
    at, size = sector * SECTOR, len(model)
    if kind == blk.FLUSH:
        return b""
    if kind == blk.GET_ID:
        return _IDENTITY.ljust(20, b"\0")[:space]
    if kind == blk.IN:
        good = space and not space % SECTOR and at + space <= size
        return bytes(model[at : at + space]) if good else None
    if how & READONLY or kind not in (blk.OUT, blk.DISCARD, blk.WRITE_ZEROES):
        return None
    if kind == blk.OUT:
        if not body or len(body) % SECTOR or at + len(body) > size:
            return None
        model[at : at + len(body)] = body
        return b""
    return _cleared(model, kind, body, how)


def _cleared(model: bytearray, kind: int, body: bytes, how: int) -> bytes | None:
    discard = kind == blk.DISCARD
    if (discard and not how & DISCARDS) or not body or len(body) % 16 or len(body) > 16 * 16:
        return None
    segments = list(struct.iter_unpack("<QII", body))
    most = blk.MAX_DISCARD if discard else blk.MAX_ZEROES
    for first, count, flags in segments:
        if flags & ~(0 if discard else 1) or count > most:
            return None
        if (first + count) * SECTOR > len(model):
            return None
    for first, count, _ in segments:
        model[first * SECTOR : (first + count) * SECTOR] = bytes(count * SECTOR)
    return b""


def request(
    kind: int, sector: int = 0, body: bytes = b"", space: int = 0, form: int = 2, cut: int = 0
) -> bytes:
    """Return a request as the target reads it, by the kind's place among :data:`KINDS`."""
    place = sector.to_bytes(8 if form & 1 else 1, "little")
    return bytes((form & ~4, kind)) + place + piece(body) + struct.pack("<HB", space, cut)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """Return a segment of a discard, or of a write of zeroes."""
    return struct.pack("<QII", sector, sectors, flags)


_segments = st.lists(
    st.builds(
        segment,
        st.one_of(st.integers(0, _SECTORS + 1), st.integers(0, (1 << 64) - 1)),
        st.one_of(st.integers(0, 64), st.integers(0, (1 << 32) - 1)),
        st.one_of(st.integers(0, 2), st.integers(0, (1 << 32) - 1)),
    ),
    max_size=18,
).map(b"".join)
_requests = st.builds(
    request,
    st.integers(0, len(KINDS) - 1),
    st.integers(0, 0xFF),
    st.one_of(st.binary(max_size=64), st.binary(min_size=512, max_size=512), _segments),
    st.one_of(st.sampled_from((0, 511, 512, 4096)), st.integers(0, 8191)),
    st.integers(0, 31),
    st.integers(0, 255),
)
TARGET = Target(
    "blk",
    run,
    ("/godwit/hw/virtio/blk/", "/godwit/host/image"),
    st.builds(
        lambda how, requests: bytes((how,)) + b"".join(requests),
        st.integers(0, 7),
        st.lists(_requests, max_size=12),
    ),
    (request(0, 1, space=512), request(1, 1, bytes(512)), request(5, 0, segment(1, 2, 1))),
)
