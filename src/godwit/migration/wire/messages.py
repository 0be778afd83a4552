"""The migration stream's bytes: no sockets, no meaning.

A message is a header (kind, protocol, a zero u16, length of the payload as u32, little endian) and
a payload. Payloads are msgpack of the structs below, except RAM's: a count of runs (u32), the runs
(guest address u64, pages u32), and for :attr:`Kind.RAM` the pages themselves.

The first message of a connection names its role: HELLO begins a migration, QUERY asks what became
of one. The conversation is a table in docs/design.md, 'A migration'.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Annotated

import msgspec

from godwit.errors import StreamError
from godwit.hw.capabilities import SetupHints
from godwit.hw.cpu.description import Cpu
from godwit.hw.devices import Name
from godwit.hw.memory import PAGE
from godwit.spec.saved import U64

#: Changes when an older peer could misread the stream; both must have the same.
PROTOCOL = 2

HEADER = Struct("<BBHI")
_COUNT = Struct("<I")
_RUN = Struct("<QI")

#: A RAM message: at most this many runs (IOV_MAX is 1,024) and pages.
MAX_RUNS = 512
MAX_PAGES = 2048
_MAX_RAM = _COUNT.size + MAX_RUNS * _RUN.size + MAX_PAGES * PAGE
_MAX_STATE = 4 << 20
_MAX_SMALL = 64 << 10
_MAX_TABLE = 1 << 20

Run = tuple[int, int]  # guest address, pages
_Index = Annotated[int, msgspec.Meta(ge=0, lt=64)]
_Word = Annotated[str, msgspec.Meta(max_length=64)]
#: Neither NaN nor infinity, which JSON does not have: a year at the most.
_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=3.2e10)]
_Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Kind(IntEnum):
    """The kinds of messages, sent by the source (s) or by the destination (d)."""

    HELLO = 1  # s, first: what will come
    WELCOME = 2  # d: the migration can go on
    REFUSED = 3  # d: the migration cannot go on, and why
    PREFAULT = 4  # s: runs that RAM will come for
    RAM = 5  # s: runs and their pages
    ZERO = 6  # s: runs that are all zeros
    ROUND = 7  # s: a round over RAM ends; after STATE: all is sent
    STATE = 8  # s: everything but RAM; the guest is stopped
    READY = 9  # d: all is loaded and would run
    COMMIT = 10  # s: the guest is the destination's
    STARTED = 11  # d: the guest is here
    FAILED = 12  # s, d: given up, and why
    QUERY = 13  # s, first on a new connection: COMMIT again; what became of the guest?
    ACK = 14  # s: STARTED was received; nobody will query again
    SWITCHED = 15  # d, after COMMIT: the traffic was switched over
    PACKETS = 16  # s: packets that still came for the guest
    PATH_DRAINED = 17  # s: no more packets will come for this NIC, but stragglers
    CHALLENGE = 18  # d, before all else, if a secret is shared: a nonce
    AUTH = 19  # s, d: the proof that the secret is known


_LIMITS = {
    Kind.PREFAULT: _MAX_TABLE,
    Kind.RAM: _MAX_RAM,
    Kind.ZERO: _MAX_TABLE,
    Kind.STATE: _MAX_STATE,
    Kind.PACKETS: _MAX_STATE,
}

_Property = Annotated[str, msgspec.Meta(max_length=256)] | int | None


class HelloDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A device as the destination must have it."""

    id: Name
    kind: Name
    #: Version of the saved state.
    version: int
    #: The part of the configuration that the guest sees.
    properties: Annotated[dict[Name, _Property], msgspec.Meta(max_length=32)]
    #: Feature bits that the guest uses now.
    negotiated: U64 = 0
    #: The setup hints, if there are some.
    hints: SetupHints | None = None


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The machine and the migration the source is about to send: HELLO."""

    machine: Annotated[str, msgspec.Meta(max_length=64)]
    token: _Token
    cpus: int
    #: (guest address, bytes)
    ram: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=8)]
    devices: Annotated[list[HelloDevice], msgspec.Meta(max_length=64)]
    #: Version of the machine's own saved state.
    version: int
    #: The secret in the migration's marker frames; empty: no packet handover is wanted.
    cookie: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    #: The guest's CPU, unless the machine type is of a time when HELLO did not describe it.
    cpu: Cpu | None = None
    #: The boot of the source's kernel, if a device has what one VM of a kernel alone may have.
    boot: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The connection as the destination sees it: WELCOME.

    A connection that both ends see alike is a direct one.
    """

    pid: int
    #: The two ends of a TCP connection, ``HOST PORT``; empty for a Unix socket.
    near: str
    far: str
    #: True if packets are handed over.
    packets: bool = False


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The destination's nonce, with which every proof differs: CHALLENGE."""

    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Auth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A proof of knowing the shared secret, and the source's nonce: AUTH."""

    proof: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    nonce: Annotated[bytes, msgspec.Meta(max_length=32)]


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reason of a REFUSED or FAILED."""

    reason: Annotated[str, msgspec.Meta(max_length=4096)]


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The commit that makes the guest the destination's: COMMIT, or QUERY on a new connection."""

    token: _Token
    #: True if the guest ran when it was stopped: one that was paused stays so.
    running: bool


class Started(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The destination's share of the report: STARTED. Times in ms."""

    phases: Annotated[dict[_Word, _Milliseconds], msgspec.Meta(max_length=64)]
    runstates: Annotated[list[_Word], msgspec.Meta(max_length=256)]


class Switched(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The number of markers that left for each NIC when the traffic was switched over: SWITCHED."""

    markers: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]], msgspec.Meta(max_length=64)
    ]


class Packets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Packets of one NIC, in order, each with the tap's header (virtio 1.2, 5.1.6): PACKETS."""

    nic: _Index
    frames: Annotated[list[bytes], msgspec.Meta(max_length=1024)]


class PathDrained(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The NIC whose old path has no more packets: PATH_DRAINED."""

    nic: _Index


def message(kind: Kind, payload: bytes = b"") -> bytes:
    """Return a message with header and payload."""
    return header(kind, len(payload)) + payload


def header(kind: Kind, length: int) -> bytes:
    """Return the header of a message whose payload of ``length`` bytes follows."""
    return HEADER.pack(kind, PROTOCOL, 0, length)


def parse_header(raw: bytes | bytearray) -> tuple[Kind, int]:
    """Return a message's kind and the length of its payload.

    Raises:
        StreamError: another protocol, an unknown kind, or a length beyond the kind's limit.
    """
    if len(raw) != HEADER.size:
        raise StreamError(f"a message's header of {len(raw)} bytes; {HEADER.size} are due")
    number, protocol, zero, length = HEADER.unpack(raw)
    if protocol != PROTOCOL:
        raise StreamError(
            f"stream protocol {protocol}; this Godwit has {PROTOCOL} (or it is no Godwit stream)"
        )
    try:
        kind = Kind(number)
    except ValueError:
        raise StreamError(f"message kind {number} is unknown: not a Godwit stream?") from None
    if zero:
        raise StreamError(f"message {kind.name}: reserved bits are set")
    if length > _LIMITS.get(kind, _MAX_SMALL):
        raise StreamError(f"message {kind.name}: a payload of {length} bytes is too long")
    return kind, length


def encode_runs(runs: Sequence[Run]) -> bytes:
    """Return the table of runs, with its count."""
    return _COUNT.pack(len(runs)) + b"".join(_RUN.pack(*run) for run in runs)


def table_size(count: int) -> int:
    """Return the bytes a table of ``count`` runs has."""
    return _COUNT.size + count * _RUN.size


def decode_count(payload: bytes | bytearray | memoryview, length: int) -> int:
    """Return how many runs a payload of ``length`` bytes has, by its first four.

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
    """Return the runs that follow the count.

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
