"""A snapshot's bytes: no files, no meaning of RAM or state.

A file has a header of one page, RAM, and an index, in this order, and nothing else. RAM is cut into
chunks. Uncompressed, a chunk has its place, at :data:`RAM_AT` and the chunk's number times
:data:`CHUNK`, for the file to be mapped; chunks never written are holes. Compressed, all chunks but
zeros follow each other from :data:`PAGE` on. The index has everything but RAM, and each chunk's
length and checksum; the header has the index's checksum and the header's. Numbers are little
endian, checksums CRC-32 (zlib's).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import Annotated, NamedTuple

import msgspec

from godwit.errors import StreamError
from godwit.spec import saved

PAGE = 4096
#: Bytes of RAM that have one checksum. RAM is a multiple of it.
CHUNK = 256 << 10
#: Where RAM begins in an uncompressed file: file, guest and host agree modulo a huge page.
RAM_AT = 2 << 20
#: No text and no number of a message in the stream, as which earlier snapshots began.
MAGIC = b"\x89GODWIT\n"
#: The version of all this.
FORMAT = 1

#: The kinds of compression, by their number in the header.
COMPRESSIONS = ("", "zstd")
#: The longest a compressed chunk may be, bytes: zstd's bound for one is a little less.
_MOST_STORED = CHUNK + 4096
_MAX_HELLO, _MAX_STATE = 64 << 10, 4 << 20

_START = Struct("<8sI")  # magic, format: the same in all formats
_HEADER = Struct("<8sII64sQQII")
_CRC = Struct("<I")
_CHUNK = Struct("<II")
#: How a stream's HELLO begins: kind, protocol.
_EARLIER = b"\x01\x02\0\0"


class Header(NamedTuple):
    """The first page: the kind of file, and the place of the index."""

    compression: str
    machine: str
    """The name of the machine type."""
    memory: int
    """The guest's RAM, bytes."""
    index_at: int
    index_length: int
    index_crc: int

    @property
    def end(self) -> int:
        """The size of the whole file."""
        return self.index_at + self.index_length


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything but RAM: the messages HELLO and STATE of a migration, and the chunks."""

    hello: Annotated[bytes, msgspec.Meta(max_length=_MAX_HELLO)]
    state: Annotated[bytes, msgspec.Meta(max_length=_MAX_STATE)]
    #: True if the guest ran when it was stopped: one that was paused stays so.
    running: bool
    #: For each chunk length and checksum of what is stored: see :class:`Chunk`.
    chunks: bytes


class Chunk(NamedTuple):
    """A chunk's bytes in the file, of which a chunk of zeros has none."""

    number: int
    offset: int
    length: int
    crc: int


def most_index(memory: int) -> int:
    """Return the bytes an index has at the most, for so many bytes of RAM."""
    return _MAX_HELLO + _MAX_STATE + memory // CHUNK * _CHUNK.size + 1024


def encode_header(header: Header) -> bytes:
    """Return a header as the first page."""
    packed = _HEADER.pack(
        MAGIC,
        FORMAT,
        COMPRESSIONS.index(header.compression),
        header.machine.encode(),
        *header[2:],
    )
    packed = packed.ljust(PAGE - _CRC.size, b"\0")
    return packed + _CRC.pack(zlib.crc32(packed))


def decode_header(page: bytes | bytearray) -> Header:
    """Return what the first page of a file says.

    Raises:
        StreamError: no snapshot, one of another format, or an altered one.
    """
    if len(page) >= len(_EARLIER) and page.startswith(_EARLIER):
        raise StreamError(
            "it is of an earlier format, without checksums, which this Godwit does not read; "
            "restore it with the Godwit that saved it"
        )
    if not page.startswith(MAGIC):
        raise StreamError("it is no snapshot of Godwit's (offset 0)")
    if len(page) < PAGE:
        raise StreamError(f"it ends at offset {len(page)}, in its header: it is not whole")
    number = _START.unpack_from(page)[1]
    if number > FORMAT:
        raise StreamError(
            f"it has format {number}, and this Godwit knows formats up to {FORMAT}: "
            "it is a newer one's; restore it with that"
        )
    if _CRC.unpack_from(page, PAGE - _CRC.size)[0] != zlib.crc32(page[: -_CRC.size]):
        raise StreamError("its header (offset 0) was altered: the checksum differs")
    return _header(page)


def _header(page: bytes | bytearray) -> Header:
    _, number, compression, machine, *rest = _HEADER.unpack_from(page)
    if not number or compression >= len(COMPRESSIONS):
        raise StreamError(f"its header (offset 0) has format {number}, compression {compression}")
    if page[_HEADER.size : PAGE - _CRC.size].strip(b"\0"):
        raise StreamError("its header (offset 0): reserved bytes are set")
    name = machine.rstrip(b"\0").decode("ascii", "replace")
    return Header(COMPRESSIONS[compression], name, *rest)


def encode_chunks(chunks: Iterator[tuple[int, int]]) -> bytes:
    """Return the table of (length, checksum) of all chunks."""
    return b"".join(_CHUNK.pack(*chunk) for chunk in chunks)


def encode_index(index: Index) -> bytes:
    """Return an index as bytes."""
    return saved.encode(index)


def decode_index(payload: bytes | bytearray, header: Header) -> tuple[Index, list[Chunk]]:
    """Return the index, and the place of each chunk, of a file with this header.

    Raises:
        StreamError: the index was altered, or does not agree with the header.
    """
    if zlib.crc32(payload) != header.index_crc:
        raise StreamError(f"its index (offset {header.index_at}) was altered: the checksum differs")
    index = saved.decode(payload, Index)
    if len(index.chunks) != header.memory // CHUNK * _CHUNK.size:
        raise StreamError("its index: a table of chunks for RAM of another size")
    compressed = bool(header.compression)
    most = _MOST_STORED if compressed else CHUNK
    offset = PAGE if compressed else RAM_AT
    chunks: list[Chunk] = []
    for number, (length, crc) in enumerate(_CHUNK.iter_unpack(index.chunks)):
        if length > most or (not compressed and length not in (0, CHUNK)):
            raise StreamError(f"its index: chunk {number} has {length} bytes")
        chunks.append(Chunk(number, offset, length, crc))
        offset += length if compressed else CHUNK
    if offset != header.index_at:
        raise StreamError(f"its index: RAM ends at {offset}, the index begins elsewhere")
    return index, chunks
