"""QMP's framing, from the client's side: JSON objects, on lines of their own or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

#: Bytes of the longest message; QEMU's longest is the answer to query-qmp-schema, half a megabyte.
MAX_MESSAGE = 8 << 20
_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\]]'), re.compile(rb'["\\]')


class Messages:
    """The split of a stream into JSON objects, which may or may not have lines of their own."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = self._depth = 0
        self._quoted = False

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
        """Add what has arrived, and yield each whole message and its length in bytes.

        Raises:
            ValueError: the stream is not one of JSON objects, or a message is too long.
        """
        self._data += data
        while match := (_INSIDE if self._quoted else _OUTSIDE).search(self._data, self._at):
            self._at = match.end()
            if match[0] == b'"':
                self._quoted = not self._quoted
            elif match[0] == b"\\":
                self._at += 1  # what is escaped ends nothing
            elif match[0] in b"{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    length, self._at, self._depth = self._at, 0, 0
                    yield self._message(length), length
        self._at = max(self._at, len(self._data))
        if len(self._data) > MAX_MESSAGE:
            raise ValueError(f"a message of more than {MAX_MESSAGE} bytes")

    def _message(self, length: int) -> dict[str, Any]:
        text = bytes(self._data[:length])
        del self._data[:length]
        try:
            found = json.loads(text)
        except RecursionError as error:
            raise ValueError("a message that is nested too deeply") from error
        if not isinstance(found, dict):
            raise ValueError("a message that is no object")
        return found
