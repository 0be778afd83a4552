"""Saved states as bytes: the integer types of their fields, and strict msgpack.

A saved state is a frozen :class:`msgspec.Struct` that refuses unknown fields, each field with its
range (docs/decisions/0004-msgspec.md).
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from godwit.errors import StreamError

U8 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 8)]
U16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack has no integer beyond 64 bits
Mac = Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]

_T = TypeVar("_T")
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: msgspec.Struct) -> bytes:
    """Return a struct as msgpack."""
    return msgspec.msgpack.encode(value)


def prepare(kind: Any) -> None:
    """Build the decoder of a type before time matters.

    Building a decoder reads the type's whole tree: milliseconds for a machine's state.
    """
    if kind not in _decoders:
        _decoders[kind] = msgspec.msgpack.Decoder(kind)


def decode(payload: bytes | bytearray | memoryview | msgspec.Raw, kind: type[_T]) -> _T:
    """Return the struct that msgpack bytes hold.

    Raises:
        StreamError: the bytes are no ``kind``; the message names the field.
    """
    prepare(kind)
    try:
        value: _T = _decoders[kind].decode(payload)
        return value
    except (
        ValueError,
        RecursionError,
    ) as error:  # DecodeError and UnicodeDecodeError are the first
        raise StreamError(f"{_name(kind)}: {error}") from error


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)
