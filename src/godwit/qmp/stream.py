"""A stream of bytes cut into JSON values, however they were split or joined on the way.

QMP is a stream of JSON values, not of lines (QEMU's docs/interop/qmp-spec, 'General definitions').
Each byte is looked at once, so that a peer who sends one byte at a time costs no more than one who
does not; what is kept is bounded in length and in nesting. Nothing behind malformed JSON is
understood: see docs/decisions/0018-qmp-lists.md.

QEMU's parser takes more than JSON (qobject/json-lexer.c, 'Extensions over RFC 8259'): strings in
single quotes, and an escaped single quote in either sort. Both are written anew while they are
scanned, so that what is decoded is JSON. The third extension, interpolation, is for QEMU's own C
code; QEMU as well refuses it from a client.
"""

from __future__ import annotations

import re
from typing import NoReturn

import msgspec

#: The longest value, bytes. QEMU allows 64 MiB; no command here needs a thousandth of that.
MAX_VALUE = 1 << 20
#: The deepest nesting. QEMU allows 1,024 (qobject/json-streamer.c); no command needs more than 3.
MAX_NESTING = 100

_QUOTE, _SINGLE, _ESCAPE = ord('"'), ord("'"), ord("\\")
# Control characters and 0xff, which is not UTF-8, are in no JSON text, outside or inside of a
# string: found here, a forgotten quote is an error at the line's end, not a wait without one.
_OUTSIDE = re.compile(rb"""[{}\[\]"'\\\x00-\x08\x0b\x0c\x0e-\x1f\xff]""")
#: What ends a piece of a string, by the quote that the string began with.
_INSIDE = {
    _QUOTE: re.compile(rb'["\\\x00-\x1f\xff]'),
    _SINGLE: re.compile(rb"""['"\\\x00-\x1f\xff]"""),
}
_BLANK = b" \t\r\n"
_BEGINS = b"{[\"'"
_OPEN_TO_CLOSE = {ord("{"): ord("}"), ord("["): ord("]")}


class MalformedJson(Exception):
    """The peer sent what is no JSON, or too much of it."""


class JsonStream:
    """The values in one peer's bytes: add bytes with :meth:`feed`, and take values one by one."""

    def __init__(self) -> None:
        self._input = bytearray()
        self._at = 0  # in the input; what is before was scanned
        self._value = bytearray()  # what was scanned of a value that has not ended, as JSON
        self._length = 0  # of that value, as it was sent
        self._closers = bytearray()
        self._quote = 0  # what ends the string that the scan is in; 0: it is in none
        self._escaped = False  # the next byte of that string is escaped

    def feed(self, data: bytes) -> None:
        """Take bytes, of which nothing is looked at yet."""
        del self._input[: self._at]
        self._at = 0
        self._input += data

    def next(self) -> bytes | None:
        """Return the next value's text, as JSON, or None if no further value has ended yet.

        Raises:
            MalformedJson: what follows is no JSON; the stream is of no use any more.
        """
        if not self._begin():
            return None
        began, ended = self._at, self._scan()
        self._length += self._at - began
        if self._length > MAX_VALUE:
            _refuse(f"a value is longer than {MAX_VALUE} bytes")
        if not ended:
            return None
        text = bytes(self._value)
        self._value.clear()
        self._length = 0
        return text

    def _begin(self) -> bool:
        """Pass over the blanks before a value, and return whether there is something to scan."""
        data = self._input
        while not self._length and self._at < len(data) and data[self._at] in _BLANK:
            self._at += 1
        if self._at == len(data):
            return False
        # Numbers and words are values too, but no requests, and have no end of their own.
        if not self._length and data[self._at] not in _BEGINS:
            raise MalformedJson("QMP input must be a JSON object")
        return True

    def _scan(self) -> bool:
        """Scan on, and return whether the value has ended."""
        data, value = self._input, self._value
        while self._at < len(data):
            if self._escaped:
                self._take_escaped()
                continue
            pattern = _INSIDE[self._quote] if self._quote else _OUTSIDE
            found = pattern.search(data, self._at)
            end = found.start() if found else len(data)
            value += data[self._at : end]
            self._at = end
            if found:
                self._at += 1
                if self._quote:
                    self._take_in_string(data[end])
                else:
                    self._take(data[end])
                if not self._closers and not self._quote:
                    return True
        return False

    def _take(self, byte: int) -> None:
        """Take an opening or closing byte outside of all strings."""
        closers = self._closers
        if byte in _INSIDE:
            self._quote, byte = byte, _QUOTE
        elif byte in _OPEN_TO_CLOSE:
            closers.append(_OPEN_TO_CLOSE[byte])
            if len(closers) > MAX_NESTING:
                _refuse(f"nested more than {MAX_NESTING} levels deep")
        elif closers and byte == closers[-1]:
            closers.pop()
        else:
            _refuse(f"unexpected {_shown(byte)}")
        self._value.append(byte)

    def _take_in_string(self, byte: int) -> None:
        """Take a byte which ends a string, or is special inside."""
        if byte == self._quote:
            self._quote, byte = 0, _QUOTE
        elif byte == _ESCAPE:
            self._escaped = True
            return
        elif byte == _QUOTE:  # in single quotes it needs no escape; in JSON it does
            self._value.append(_ESCAPE)
        else:
            _refuse(f"unexpected {_shown(byte)}")
        self._value.append(byte)

    def _take_escaped(self) -> None:
        byte = self._input[self._at]
        self._at += 1
        self._escaped = False
        if byte < 0x20 or byte == 0xFF:
            _refuse(f"unexpected {_shown(byte)}")
        if byte != _SINGLE:  # which JSON has no escape for, and needs none
            self._value.append(_ESCAPE)
        self._value.append(byte)


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
