"""A connection: messages on something that carries bytes, a socket or a file.

Nobody above this knows what carries the bytes: there are no descriptors, flags or polls in the
interface, so that TLS, which holds bytes back that its socket no longer has, can stand behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from godwit.errors import PeerRefused, StreamError
from godwit.spec import saved

from . import messages
from .messages import Kind

_T = TypeVar("_T")
Parts = Sequence[bytes | memoryview]


class Connection(ABC):
    """A connection on which one thread sends and one receives, and either may close.

    A message is whole within a total time, whatever its bytes' pace.
    """

    def __init__(self) -> None:
        #: Bytes sent.
        self.sent = 0
        #: When everything has to be over, by the migration's clock; None: each message has its own
        #: time.
        self.deadline: float | None = None
        #: Called now and then while bytes are awaited.
        self.on_wait: Callable[[], None] = lambda: None

    # --- bytes ------------------------------------------------------------------------------------
    @abstractmethod
    def send_parts(self, parts: Parts) -> None:
        """Send a message's bytes, without copying the parts first.

        Raises:
            LinkLost: the connection broke, or the peer did not take the message in time.
        """

    @abstractmethod
    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views`` with the next bytes of the message.

        Raises:
            LinkLost: the connection broke, or the message was not whole in time.
        """

    @abstractmethod
    def begin(self, length: int | None = None) -> None:
        """Start the time of the next message, or of its payload of ``length`` bytes."""

    @abstractmethod
    def give_up(self) -> None:
        """Make the receiving thread give up, and the sending one soon, from any thread.

        A message that is nearly sent is still sent, and what follows if the peer takes it at once.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back the connection's carrier."""

    # --- messages ---------------------------------------------------------------------------------
    def send(self, kind: Kind, value: msgspec.Struct | None = None) -> None:
        """Send a struct, or an empty message.

        Raises:
            LinkLost: the connection broke, or the peer did not take the message in time.
        """
        payload = saved.encode(value) if value is not None else b""
        self.send_parts([messages.message(kind, payload)])

    def receive(self) -> tuple[Kind, int]:
        """Return the next message's kind and payload length.

        Raises:
            LinkLost: no message came.
            StreamError: the header is malformed.
        """
        self.begin()
        kind, length = messages.parse_header(self.read(messages.HEADER.size))
        self.begin(length)
        return kind, length

    def read(self, length: int) -> bytearray:
        """Return exactly ``length`` bytes of the message.

        Raises:
            LinkLost: the connection broke, or the message was not whole in time.
        """
        data = bytearray(length)
        self.read_into([memoryview(data)])
        return data

    def expect(self, kind: Kind) -> None:
        """Receive an empty message of ``kind``. Raises as :meth:`expect_struct`."""
        if self.expect_one(kind)[1]:
            raise StreamError(f"message {kind.name} has a payload")

    def expect_struct(self, kind: Kind, struct: type[_T]) -> _T:
        """Receive a message of ``kind``, and return the ``struct`` of its payload.

        Raises:
            LinkLost: no message came.
            PeerRefused: the peer refused, and why.
            StreamError: another message came, or a malformed one.
        """
        return saved.decode(self.expect_one(kind)[1], struct)

    def expect_one(self, *kinds: Kind) -> tuple[Kind, bytearray]:
        """Receive a message of one of these kinds, and return kind and payload.

        Raises as :meth:`expect_struct`.
        """
        got, length = self.receive()
        payload = self.read(length)
        if got in (Kind.REFUSED, Kind.FAILED):
            raise PeerRefused(saved.decode(payload, messages.Reason).reason)
        if got not in kinds:
            due = " or ".join(kind.name for kind in kinds)
            raise StreamError(f"message {got.name} where {due} was due")
        return got, payload


class WaitingConnection(Connection):
    """A connection to a live peer, which can be waited for among other things."""

    @abstractmethod
    def wait(self, timeout: float, others: Iterable[int] = ()) -> tuple[bool, set[int]]:
        """Wait until bytes can be received, or another descriptor is readable.

        ``timeout`` is in seconds. Returns whether bytes can be received, and the readable ones of
        the other descriptors.
        """

    @abstractmethod
    def read_some(self, most: int) -> bytes:
        """Return the bytes that are here, at most ``most``, without waiting.

        Raises:
            LinkLost: the connection broke.
        """

    @abstractmethod
    def set_silence(self, seconds: float) -> None:
        """Set for how many seconds a silent peer is waited for."""

    @abstractmethod
    def describe(self, packets: bool) -> messages.Welcome:
        """Return the connection as this end sees it, with or without packet handover."""

    @abstractmethod
    def is_direct(self, seen: messages.Welcome) -> bool:
        """Return whether nothing stands between the two ends, by what the other end has seen."""

    @abstractmethod
    def interrupt(self) -> None:
        """Make all threads that wait on the connection give up, from any thread."""


def send_pieces(parts: Parts, send: Callable[[list[bytes | memoryview]], int]) -> int:
    """Have ``send`` take all parts, piece by piece, and return the bytes.

    ``send`` takes as much as it likes of the list it is given, and returns how many bytes.
    """
    left: list[bytes | memoryview] = list(parts)
    total = 0
    while left:
        total += advance(left, send(left))
    return total


def advance(left: list[memoryview] | list[bytes | memoryview], done: int) -> int:
    """Drop the first ``done`` bytes of a list of buffers, and return ``done``."""
    taken = done
    while left and taken >= len(left[0]):
        taken -= len(left.pop(0))
    if taken:
        left[0] = memoryview(left[0])[taken:]
    return done
