"""A stream of bytes cut into JSON values, however they were split or joined on the way.

QMP is a stream of JSON values, not of lines (QEMU's docs/interop/qmp-spec, 'General definitions').
Each byte is looked at once, so that a peer who sends one byte at a time costs no more than one who
does not; what is kept is bounded in length and in nesting. Nothing behind malformed JSON is
understood: see docs/decisions/0018-qmp-lists.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NoReturn

import msgspec

#: The longest value, bytes. QEMU allows 64 MiB; no command here needs a thousandth of that.
MAX_VALUE = 1 << 20
#: The deepest nesting. QEMU allows 1,024 (qobject/json-streamer.c); no command needs more than 3.
MAX_NESTING = 100

# Control characters and 0xff, which is not UTF-8, are in no JSON text, outside or inside of a
# string: found here, a forgotten quote is an error at the line's end, not a wait without one.
_OUTSIDE = re.compile(rb'[{}\[\]"\x00-\x08\x0b\x0c\x0e-\x1f\xff]')
_INSIDE = re.compile(rb'["\\\x00-\x1f\xff]')
_BLANK = b" \t\r\n"
_OPEN_TO_CLOSE = {ord("{"): ord("}"), ord("["): ord("]")}
_QUOTE = ord('"')
_ESCAPE = ord("\\")


class MalformedJson(Exception):
    """The peer sent what is no JSON, or too much of it."""


class JsonStream:
    """The values in one peer's bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._closers = bytearray()
        self._in_string = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes, and yield each text that is complete by now, in order.

        Raises:
            MalformedJson: what follows is no JSON; the stream is of no use any more.
        """
        self._buffer += data
        while self._begin():
            end = self._end()
            if (end or len(self._buffer)) > MAX_VALUE:
                _refuse(f"a value is longer than {MAX_VALUE} bytes")
            if end is None:
                return
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._scanned = 0
            yield text

    def _begin(self) -> bool:
        """Drop the blanks before a value, and return whether a value begins."""
        if self._scanned:
            return True
        blank = len(self._buffer) - len(self._buffer.lstrip(_BLANK))
        del self._buffer[:blank]
        # Numbers and words are values too, but no requests, and have no end of their own.
        if self._buffer and self._buffer[0] not in b'{["':
            raise MalformedJson("QMP input must be a JSON object")
        return bool(self._buffer)

    def _end(self) -> int | None:
        """Scan on, and return where the value ends, or None when it has not ended yet."""
        buffer = self._buffer
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(buffer, self._scanned):
            at, byte = found.start(), buffer[found.start()]
            if self._in_string and byte == _ESCAPE:
                if at + 1 == len(buffer):
                    self._scanned = at  # the escaped byte is still to come
                    return None
                self._scanned = at + 2
                continue
            self._scanned = at + 1
            if byte == _QUOTE:
                self._in_string = not self._in_string
            elif byte in _OPEN_TO_CLOSE:
                self._closers.append(_OPEN_TO_CLOSE[byte])
                if len(self._closers) > MAX_NESTING:
                    _refuse(f"nested more than {MAX_NESTING} levels deep")
            elif self._closers and byte == self._closers[-1]:
                self._closers.pop()
            else:
                _refuse(f"unexpected {_shown(byte)}")
            if not self._closers and not self._in_string:
                return self._scanned
        self._scanned = len(buffer)
        return None


def decode(text: bytes) -> object:
    """Return the value of one JSON text.

    Raises:
        MalformedJson: the text has none.
    """
    try:
        value: object = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedJson(f"JSON parse error, {error}") from error
    return value


def _refuse(why: str) -> NoReturn:
    raise MalformedJson(f"JSON parse error, {why}")


def _shown(byte: int) -> str:
    return f"'{byte:c}'" if 0x20 < byte < 0x7F else f"byte 0x{byte:02x}"
