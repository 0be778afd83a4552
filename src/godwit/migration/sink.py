"""Takers of a guest's bytes: a peer's stream here, a file in :mod:`.snapshot.saver`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from godwit.hw.memory import PAGE, GuestMemory

from .ram.page_runs import pages_in
from .wire import messages
from .wire.messages import Hello, Kind, Run
from .wire.stream import Connection


class Sink(ABC):
    """A taker of a guest, in the order of these methods. All of them raise LinkLost."""

    @property
    @abstractmethod
    def sent(self) -> int:
        """The number of bytes taken until now."""

    @abstractmethod
    def hello(self, hello: Hello) -> None:
        """Take the description of machine and migration."""

    @abstractmethod
    def coming(self, runs: Sequence[Run]) -> None:
        """Take the list of pages of the first round, ahead."""

    @abstractmethod
    def pages(self, runs: Sequence[Run]) -> int:
        """Take pages as they are now, at most MAX_PAGES, and return the bytes of all this."""

    @abstractmethod
    def zeros(self, runs: Sequence[Run], first: bool) -> None:
        """Take pages of zeros, which are nothing new in the ``first`` round."""

    @abstractmethod
    def end_of_round(self) -> None:
        """Take the end of a round over RAM."""

    @abstractmethod
    def state(self, payload: bytes) -> None:
        """Take the state: everything but RAM."""


class StreamSink(Sink):
    """A peer at the other end of a connection."""

    def __init__(self, connection: Connection, memory: GuestMemory) -> None:
        self._connection = connection
        self._memory = memory

    @property
    def sent(self) -> int:
        """Bytes sent on the connection."""
        return self._connection.sent

    def hello(self, hello: Hello) -> None:
        """Send HELLO to the peer."""
        self._connection.send(Kind.HELLO, hello)

    def coming(self, runs: Sequence[Run]) -> None:
        """Send PREFAULT messages to the peer."""
        for at in range(0, len(runs), 4096):
            table = messages.encode_runs(runs[at : at + 4096])
            self._connection.send_parts([messages.message(Kind.PREFAULT, table)])

    def pages(self, runs: Sequence[Run]) -> int:
        """Send a RAM message to the peer."""
        table = messages.encode_runs(runs)
        size = len(table) + pages_in(runs) * PAGE
        parts: list[bytes | memoryview] = [messages.header(Kind.RAM, size) + table]
        parts += self._memory.views(runs)
        self._connection.send_parts(parts)
        return size

    def zeros(self, runs: Sequence[Run], first: bool) -> None:
        """Send ZERO, unless the destination's RAM is zeros anyway."""
        if not first:
            table = messages.encode_runs(runs)
            self._connection.send_parts([messages.message(Kind.ZERO, table)])

    def end_of_round(self) -> None:
        """Send ROUND to the peer."""
        self._connection.send(Kind.ROUND)

    def state(self, payload: bytes) -> None:
        """Send STATE to the peer."""
        self._connection.send_parts([messages.header(Kind.STATE, len(payload)), payload])
