"""Frames on something that carries bytes: a connected socket, or a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from godwit.errors import PeerRefused, StreamError

from . import messages as codec
from .messages import Kind

_T = TypeVar("_T")


class Line(ABC):
    """One thread sends, one receives; either may close."""

    def __init__(self) -> None:
        #: Bytes sent.
        self.sent = 0

    def send(self, kind: Kind, value: msgspec.Struct | None = None) -> None:
        """Send a struct, or an empty frame. Raises LinkLost."""
        payload = codec.encode(value) if value is not None else b""
        self.send_parts([codec.frame(kind, payload)])

    @abstractmethod
    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send the bytes of all parts, without copying them first. Raises LinkLost."""

    def _in_pieces(
        self, parts: Sequence[bytes | memoryview], send: Callable[[list[bytes | memoryview]], int]
    ) -> None:
        """``send`` takes as much as it likes of what it is given, and says how much."""
        left: list[bytes | memoryview] = list(parts)
        while left:
            sent = send(left)
            self.sent += sent
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = memoryview(left[0])[sent:]

    def receive(self) -> tuple[Kind, int]:
        """The next frame's kind and payload length. Raises LinkLost, StreamError."""
        return codec.parse_header(self.read(codec.HEADER.size))

    def read(self, length: int) -> bytearray:
        """Exactly ``length`` bytes. Raises LinkLost."""
        data = bytearray(length)
        self.read_into([memoryview(data)])
        return data

    @abstractmethod
    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views``. Raises LinkLost."""

    def expect(self, kind: Kind) -> None:
        """The next frame must be an empty one of ``kind``. Raises as :meth:`expect_struct`."""
        if self._expect(kind):
            raise StreamError(f"frame {kind.name} has a payload")

    def expect_struct(self, kind: Kind, struct: type[_T]) -> _T:
        """The next frame must be of ``kind``, and hold a ``struct``.

        Raises:
            LinkLost: no frame came.
            PeerRefused: the peer said why not.
            StreamError: another frame came, or a malformed one.
        """
        return codec.decode(self._expect(kind), struct)

    def expect_one(self, *kinds: Kind) -> tuple[Kind, bytearray]:
        """The next frame must be one of these; its kind and payload. Raises as expect_struct."""
        got, length = self.receive()
        payload = self.read(length)
        if got in (Kind.REFUSED, Kind.FAILED):
            raise PeerRefused(codec.decode(payload, codec.Text).reason)
        if got not in kinds:
            due = " or ".join(kind.name for kind in kinds)
            raise StreamError(f"frame {got.name} where {due} was due")
        return got, payload

    def _expect(self, kind: Kind) -> bytearray:
        return self.expect_one(kind)[1]

    @abstractmethod
    def stop_receiving(self) -> None:
        """Make whoever waits for a frame here give up, from any thread; sending goes on."""

    @abstractmethod
    def close(self) -> None:
        """Give the socket or file back."""
