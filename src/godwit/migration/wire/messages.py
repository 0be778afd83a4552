"""The migration stream's bytes: no sockets, no meaning.

A frame is a header (kind, protocol, a zero u16, length of the payload as u32, little endian) and a
payload. Payloads are msgpack of the structs below, except RAM's: a count of runs (u32), the runs
(guest address u64, pages u32), and for :attr:`Kind.RAM` the pages themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Annotated, Any, TypeVar

import msgspec

from godwit.errors import StreamError
from godwit.hw.memory import PAGE
from godwit.hw.setup_hints import Foresight

#: Changes when an older peer could misread the stream; both must have the same.
PROTOCOL = 1

HEADER = Struct("<BBHI")
_COUNT = Struct("<I")
_RUN = Struct("<QI")

#: A frame of RAM: at most this many runs (IOV_MAX is 1,024) and bytes of pages.
MAX_RUNS = 512
MAX_PAGES = 2048
_MAX_RAM = _COUNT.size + MAX_RUNS * _RUN.size + MAX_PAGES * PAGE
_MAX_STATE = 4 << 20
_MAX_SMALL = 64 << 10
_MAX_TABLE = 1 << 20

Run = tuple[int, int]  # guest address, pages
_Index = Annotated[int, msgspec.Meta(ge=0, lt=64)]


class Kind(IntEnum):
    """What a frame is. s: sent by the source, d: by the destination."""

    HELLO = 1  # s
    WELCOME = 2  # d: the move can go on
    REFUSED = 3  # d: it cannot, and why
    TOUCH = 4  # s: runs that RAM will come for
    RAM = 5  # s: runs and their pages
    ZERO = 6  # s: runs that are all zeros
    ROUND = 7  # s: a pass over RAM ends; after STATE: all is sent
    STATE = 8  # s: everything but RAM; the guest is stopped
    READY = 9  # d: all is loaded and would run
    COMMIT = 10  # s: the guest is yours
    STARTED = 11  # d: it is mine
    FAILED = 12  # s, d: given up, and why
    ASK = 13  # s, on a new line: COMMIT again; what became of the guest?
    HEARD = 14  # s: I know that it is yours; nobody will ask again
    DRAWN = 15  # d, after COMMIT: the network was told that the guest is here
    FRAMES = 16  # s, after COMMIT: what still came for the guest
    ROAD_ENDS = 17  # s: no more will come for this NIC, but stragglers


_LIMITS = {
    Kind.TOUCH: _MAX_TABLE,
    Kind.RAM: _MAX_RAM,
    Kind.ZERO: _MAX_TABLE,
    Kind.STATE: _MAX_STATE,
    Kind.FRAMES: _MAX_STATE,
}


class NicHello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A NIC as the destination must have it."""

    id: str
    model: str
    version: int
    mac: bytes
    mtu: int | None
    queue_size: int
    #: Feature bits that the guest uses now.
    negotiated: Annotated[int, msgspec.Meta(ge=0)]
    #: What may be set up before the stop.
    foresight: Foresight | None = None


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the source is about to send."""

    machine: str
    token: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    cpus: int
    #: (guest address, bytes)
    ram: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=8)]
    nics: Annotated[list[NicHello], msgspec.Meta(max_length=64)]
    #: Saved-state types and their versions.
    versions: dict[str, int]
    #: By what the move's marks are known; empty: no handover of frames is wanted.
    mark: Annotated[bytes, msgspec.Meta(max_length=16)] = b""


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the destination sees the line: WELCOME. A line that both see alike is a direct one."""

    pid: int
    #: The two ends of a TCP connection, ``HOST PORT``; empty for a Unix socket.
    near: str
    far: str
    #: Whether frames are handed over.
    handover: bool = False


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why: REFUSED and FAILED."""

    reason: Annotated[str, msgspec.Meta(max_length=4096)]


class Handover(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The guest is yours: COMMIT, and ASK, which says it again on a new line."""

    token: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    #: Whether the guest ran when it was stopped: one that was paused stays so.
    running: bool


class Started(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The destination's share of the report: STARTED. Times in ms."""

    phases: dict[str, float]
    runstates: list[str]


class Drawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """DRAWN: how many marks left, for each NIC."""

    marks: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]], msgspec.Meta(max_length=64)
    ]


class Frames(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FRAMES: of one NIC, in order, each with the tap's header (virtio 1.2, 5.1.6)."""

    nic: _Index
    frames: Annotated[list[bytes], msgspec.Meta(max_length=1024)]


class RoadEnds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ROAD_ENDS: of which NIC."""

    nic: _Index


_T = TypeVar("_T")


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return header(kind, len(payload)) + payload


def header(kind: Kind, length: int) -> bytes:
    """The header of a frame whose payload follows."""
    return HEADER.pack(kind, PROTOCOL, 0, length)


def parse_header(raw: bytes | bytearray) -> tuple[Kind, int]:
    """Kind and payload length.

    Raises:
        StreamError: another protocol, an unknown kind, or a length beyond the kind's limit.
    """
    if len(raw) != HEADER.size:
        raise StreamError(f"a frame's header of {len(raw)} bytes; {HEADER.size} are due")
    number, protocol, zero, length = HEADER.unpack(raw)
    if protocol != PROTOCOL:
        raise StreamError(
            f"stream protocol {protocol}; this Godwit has {PROTOCOL} (or it is no Godwit stream)"
        )
    try:
        kind = Kind(number)
    except ValueError:
        raise StreamError(f"frame kind {number} is unknown: not a Godwit stream?") from None
    if zero:
        raise StreamError(f"frame {kind.name}: reserved bits are set")
    if length > _LIMITS.get(kind, _MAX_SMALL):
        raise StreamError(f"frame {kind.name}: a payload of {length} bytes is too long")
    return kind, length


def encode(value: msgspec.Struct) -> bytes:
    """A struct as a payload."""
    return msgspec.msgpack.encode(value)


_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    # Kept: making one reads the type's whole tree, milliseconds for a machine's state.
    if kind not in _decoders:
        _decoders[kind] = msgspec.msgpack.Decoder(kind)
    return _decoders[kind]


def prepare(kind: Any) -> None:
    """Get ready to decode a ``kind``, before it matters how long that takes."""
    _decoder(kind)


def decode(payload: bytes | bytearray, kind: type[_T]) -> _T:
    """A payload as a struct.

    Raises:
        StreamError: names the field that is wrong.
    """
    try:
        value: _T = _decoder(kind).decode(payload)
        return value
    except (
        ValueError,
        RecursionError,
    ) as error:  # DecodeError and UnicodeDecodeError are the first
        raise StreamError(f"{kind.__name__}: {error}") from error


def encode_runs(runs: Sequence[Run]) -> bytes:
    """The table of runs."""
    return _COUNT.pack(len(runs)) + b"".join(_RUN.pack(*run) for run in runs)


def table_size(count: int) -> int:
    """Bytes of a table of ``count`` runs."""
    return _COUNT.size + count * _RUN.size


def decode_count(payload: bytes | bytearray | memoryview, length: int) -> int:
    """How many runs a payload of ``length`` bytes, of which the first four are given, has.

    Raises:
        StreamError: the table would not fit.
    """
    if min(length, len(payload)) < _COUNT.size:
        raise StreamError(f"a table of runs in {length} bytes")
    count: int = _COUNT.unpack_from(payload)[0]
    if table_size(count) > length:
        raise StreamError(f"{count} runs do not fit in {length} bytes")
    return count


def decode_runs(table: bytes | bytearray | memoryview, count: int) -> list[Run]:
    """The runs that follow the count.

    Raises:
        StreamError: an address that is no page's, an empty run, or a table that ends too early.
    """
    if len(table) < count * _RUN.size:
        raise StreamError(f"{count} runs in {len(table)} bytes")
    runs = list(_RUN.iter_unpack(memoryview(table)[: count * _RUN.size]))
    for address, pages in runs:
        if address % PAGE or not pages:
            raise StreamError(f"run of {pages} pages at {address:#x}")
    return runs


def batches(runs: Sequence[Run], most: int = MAX_PAGES) -> list[list[Run]]:
    """Runs cut and grouped so that each group fits a RAM frame of at most ``most`` pages."""
    groups: list[list[Run]] = []
    group: list[Run] = []
    room = most
    for address, pages in runs:
        while pages:
            if not room or len(group) == MAX_RUNS:
                groups.append(group)
                group, room = [], most
            taken = min(pages, room)
            group.append((address, taken))
            address += taken * PAGE
            pages -= taken
            room -= taken
    if group:
        groups.append(group)
    return groups
