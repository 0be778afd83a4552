"""A source's messages, whole or changed in bytes or in their msgpack's values, from few bytes."""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from godwit.errors import LinkLost
from godwit.hw.memory import PAGE
from godwit.migration.guest import Guest
from godwit.migration.wire import messages
from godwit.migration.wire.compatibility import describe
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.stream import Connection
from godwit.spec import saved

from .target import Choices, piece

Message = tuple[Kind, bytes]
TOKEN = bytes(range(16))
#: What an item of a conversation is.
WHOLE, BYTES, VALUES, OTHER, RAW = 0, 1, 2, 3, 4

_PATCH = struct.Struct("<HBQ")
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e308, 5e-324)


def of(guest: Guest) -> list[Message]:
    """Return the messages by which a guest comes, the commit included, with three pages of RAM."""
    runs = [(0, 1), (5 * PAGE, 2)]
    hello = describe(guest.machine, TOKEN)
    pages = b"".join(bytes([number]) * PAGE for number in (1, 2, 3))
    return [
        (Kind.HELLO, saved.encode(hello)),
        (Kind.PREFAULT, messages.encode_runs([(0, 8)])),
        (Kind.RAM, messages.encode_runs(runs) + pages),
        (Kind.ZERO, messages.encode_runs([(9 * PAGE, 3)])),
        (Kind.ROUND, b""),
        (Kind.STATE, saved.encode(guest.save())),
        (Kind.RAM, messages.encode_runs([(PAGE, 1)]) + bytes(PAGE)),
        (Kind.ROUND, b""),
        (Kind.COMMIT, saved.encode(messages.Commit(TOKEN, True))),
    ]


def compose(choices: Choices, base: Sequence[Message]) -> bytes:
    """Return the bytes of the messages that an input names, at most 32 of them."""
    parts: list[bytes] = []
    while choices and len(parts) < 32:
        what, number = choices.number() % 5, choices.number()
        kind, payload = base[number % len(base)]
        if what == BYTES:
            payload = _bytes_changed(choices, payload)
        elif what == VALUES:
            payload = changed(choices, payload)
        elif what == OTHER:
            kind, payload = Kind(1 + number % len(Kind)), choices.piece()
        elif what == RAW:
            parts.append(choices.piece())
            continue
        parts.append(messages.message(kind, payload))
    return b"".join(parts)


def whole(count: int) -> bytes:
    """Return the input that names the first messages as they are."""
    return b"".join(bytes([WHOLE, number]) for number in range(count))


def other(kind: Kind, payload: bytes) -> bytes:
    """Return the input of one message of any kind."""
    return bytes([OTHER, kind - 1]) + piece(payload)


def patch(where: int, how: int, value: int) -> bytes:
    """Return a change of one value as :func:`changed` reads it, after the count of changes."""
    return _PATCH.pack(where, how, value)


def _bytes_changed(choices: Choices, payload: bytes) -> bytes:
    data = bytearray(payload)
    for _ in range(choices.number() % 8):
        at, value = choices.number(2), choices.number()
        if data:
            data[at % len(data)] = value
    cut = choices.number(2)
    return bytes(data[: len(data) - cut]) if cut & 1 else bytes(data)


# --- values ---------------------------------------------------------------------------------------
def changed(choices: Choices, payload: bytes) -> bytes:
    """Return msgpack with some of its values changed."""
    try:
        plain = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, ValueError):
        return payload
    for _ in range(choices.number() % 6):
        where, how, value = _PATCH.unpack(choices.take(_PATCH.size).ljust(_PATCH.size, b"\0"))
        plain = _change(plain, where, how, value)
    return msgspec.msgpack.encode(plain)


def _change(plain: Any, where: int, how: int, value: int) -> Any:
    places: list[tuple[Any, Any]] = []
    _walk(plain, places)
    if not places:
        return plain
    holder, key = places[where % len(places)]
    if how % 8 == 0 and isinstance(holder, dict):
        del holder[key]
    elif how % 8 == 1 and isinstance(holder, list) and len(holder) < 5000:
        holder[key:key] = [copy.deepcopy(holder[key]) for _ in range(1 + value % 100)]
    else:
        holder[key] = _other_value(holder[key], how >> 3, value)
    return plain


def _walk(value: Any, places: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, part in items:
            places.append((value, key))
            _walk(part, places)


def _other_value(old: Any, how: int, value: int) -> Any:
    """Return a value instead of another one, mostly of the same type."""
    if how % 8 == 7:
        nested = msgspec.Raw(b"\x91" * (value >> 8 & 0x3FFF) + b"\xc0")
        others = (None, value, "x" * (value % 5000), b"x" * (value % 5000), [], {}, True, nested)
        return others[value % len(others)]
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return (value, old ^ 1 << value % 64, (old + 1) % (1 << 64), value & 0xFF)[how % 4]
    if isinstance(old, float):
        return _FLOATS[value % len(_FLOATS)]
    if isinstance(old, bytes):
        return _other_bytes(old, how, value)
    if isinstance(old, str):
        return (old + "x", old[1:], chr(value % 0xD800), "")[how % 4]
    return old


def _other_bytes(old: bytes, how: int, value: int) -> bytes:
    data = bytearray(old)
    if how % 4 == 0 and data:
        data[(value >> 8) % len(data)] = value & 0xFF
    elif how % 4 == 1 and data:
        at = (value >> 40) % len(data)
        data[at : at + 4] = (value & 0xFFFF_FFFF).to_bytes(4, "little")[: len(data) - at]
    elif how % 4 == 2:
        data += bytes(value % 4096)
    else:
        del data[value % (len(data) + 1) :]
    return bytes(data)


class Received(Connection):
    """A connection that has received all that it ever will, and sends to nobody."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = memoryview(data)

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send nothing."""

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views with the next bytes, or raise LinkLost."""
        for view in views:
            if len(view) > len(self._data):
                raise LinkLost("the end")
            view[:], self._data = self._data[: len(view)], self._data[len(view) :]

    def begin(self, length: int | None = None) -> None:
        """Do nothing, as nothing is waited for."""

    def give_up(self) -> None:
        """Do nothing, as nothing is waited for."""

    def close(self) -> None:
        """Do nothing, as there is no carrier."""
