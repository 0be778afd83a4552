"""Cuts a stream of bytes into JSON values, however they were split or joined on the way.

QMP is a stream of JSON values, not of lines (QEMU's docs/interop/qmp-spec, 'General definitions').
Each byte is looked at once, so that a peer who sends one byte at a time costs no more than one who
does not; what is kept is bounded in length and in nesting.
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

# What a JSON text never contains outside and inside of a string: control characters, and 0xff,
# which is not UTF-8. qmp-spec, 'Forcing the JSON parser into known-good state', has clients send
# them on purpose. A line end inside a string is one too, so a forgotten quote costs one line.
_OUTSIDE = re.compile(rb'[{}\[\]"\x00-\x08\x0b\x0c\x0e-\x1f\xff]')
_NEVER = re.compile(rb"[\x00-\x1f\xff]")
_INSIDE = re.compile(rb'["\\\x00-\x1f\xff]')
# Where a number or a word at the top level ends.
_AFTER_SCALAR = re.compile(rb'[\s{}\[\]"\x00-\x1f\xff]')
# After an error the rest of the line says nothing, unless an object begins in it: ...
_RESUME = re.compile(rb"[\n{]")
# ... which it does all the time in what is nested too deeply.
_RESUME_LINE = re.compile(rb"[\n\x00-\x08\x0b\x0c\x0e-\x1f\xff]")
_BLANK = b" \t\r\n"
_OPEN_TO_CLOSE = {ord("{"): ord("}"), ord("["): ord("]")}
_QUOTE = ord('"')
_ESCAPE = ord("\\")


class MalformedJson(Exception):
    """What came in is no JSON; the text says why. The stream goes on behind it."""


class TooLong(MalformedJson):
    """A value has no end within :data:`MAX_VALUE`; nothing behind it can be understood."""


class JsonStream:
    """Give it bytes, take values."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._closers = bytearray()
        self._in_string = False
        self._skip_to: re.Pattern[bytes] | None = None

    def feed(self, data: bytes) -> Iterator[bytes | MalformedJson]:
        """Yield each complete JSON text, or what is wrong, in order.

        After a :class:`TooLong` the stream is of no use any more.
        """
        self._buffer += data
        while True:
            try:
                text = self._next()
            except MalformedJson as error:
                yield error
                if isinstance(error, TooLong):
                    return
                continue
            if text is None:
                return
            yield text

    def _next(self) -> bytes | None:
        """The next complete text; None when more bytes are needed."""
        if self._scanned == 0 and not self._begin():
            return None
        end = self._end()
        if (end or len(self._buffer)) > MAX_VALUE:
            raise TooLong(f"JSON parse error, a value is longer than {MAX_VALUE} bytes")
        return None if end is None else self._take(end)

    def _begin(self) -> bool:
        """Drop what stands before a value; whether one begins."""
        if self._skip_to:
            found = self._skip_to.search(self._buffer)
            if not found:
                self._buffer.clear()
                return False
            del self._buffer[: found.start()]
            self._skip_to = None
        blank = len(self._buffer) - len(self._buffer.lstrip(_BLANK))
        del self._buffer[:blank]
        return bool(self._buffer)

    def _end(self) -> int | None:
        """Scan on; where the value ends, or None when it has not ended yet."""
        buffer = self._buffer
        if not self._closers and not self._in_string and buffer[0] not in b'{["':
            return self._end_of_scalar()
        while True:
            found = (_INSIDE if self._in_string else _OUTSIDE).search(buffer, self._scanned)
            if not found:
                self._scanned = len(buffer)
                return None
            at, byte = found.start(), buffer[found.start()]
            if self._in_string and byte == _ESCAPE:
                if at + 1 == len(buffer):
                    self._scanned = at  # the escaped byte is still to come
                    return None
                # What no text contains is no escaped byte either: it is looked at as any other.
                self._scanned = at + 1 + (not _NEVER.match(buffer, at + 1))
                continue
            self._scanned = at + 1
            if byte == _QUOTE:
                self._in_string = not self._in_string
            elif byte in _OPEN_TO_CLOSE:
                self._closers.append(_OPEN_TO_CLOSE[byte])
                if len(self._closers) > MAX_NESTING:
                    self._refuse(f"nested more than {MAX_NESTING} levels deep", _RESUME_LINE)
            elif self._closers and byte == self._closers[-1]:
                self._closers.pop()
            else:
                self._refuse(f"unexpected {_shown(byte)}")
            if not self._closers and not self._in_string:
                return self._scanned

    def _end_of_scalar(self) -> int | None:
        """The end of a number or word at the top level: the next blank or bracket."""
        found = _AFTER_SCALAR.search(self._buffer, self._scanned)
        if not found:
            self._scanned = len(self._buffer)
            return None
        end = found.start()
        if end == 0:
            self._scanned = 1
            self._refuse(f"unexpected {_shown(self._buffer[0])}")
        try:
            decode(bytes(self._buffer[:end]))
        except MalformedJson:
            word = self._buffer[: min(end, 40)].decode("utf-8", "replace")
            self._scanned = end
            self._refuse(f"invalid keyword '{word}'")
        return end

    def _take(self, end: int) -> bytes:
        text = bytes(self._buffer[:end])
        self._drop(end)
        return text

    def _refuse(self, why: str, skip_to: re.Pattern[bytes] = _RESUME) -> NoReturn:
        self._drop(self._scanned)
        self._skip_to = skip_to
        raise MalformedJson(f"JSON parse error, {why}")

    def _drop(self, end: int) -> None:
        del self._buffer[:end]
        self._scanned = 0
        self._closers.clear()
        self._in_string = False


def decode(text: bytes) -> object:
    """The value of one JSON text.

    Raises:
        MalformedJson: it has none.
    """
    try:
        value: object = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedJson(f"JSON parse error, {error}") from error
    return value


def _shown(byte: int) -> str:
    return f"'{byte:c}'" if 0x20 < byte < 0x7F else f"byte 0x{byte:02x}"
