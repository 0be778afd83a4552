"""The console's input: read as fast as the guest takes it, so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from godwit.host.loop import Loop

ESCAPE = 0x1D  # ctrl-]
#: Bytes read ahead of the guest, so that the escape is found behind them.
_AHEAD = 1 << 20
_READ, _GIVE = 1 << 12, 1 << 14


class Port(Protocol):
    """A receiver of the input, which may have no room."""

    #: Called from any thread once there is room again.
    on_room: Callable[[], None] | None

    def receive(self, data: bytes) -> int:
        """Take bytes, and return how many had room."""


class Keyboard:
    """The input of ``fd``, a terminal, pipe or file, which goes to ``port``.

    ``on_escape`` is called for ctrl-], which goes nowhere else, as does what follows it. Without
    ``on_escape`` every byte is the guest's.
    """

    def __init__(
        self, loop: Loop, port: Port, fd: int, on_escape: Callable[[], None] | None
    ) -> None:
        self._loop = loop
        self._port = port
        self._fd = fd
        self._on_escape = on_escape
        self._waiting = bytearray()
        self._ended = self._watched = False
        self._polled = True  # a regular file is always readable

    def start(self) -> None:
        """Begin to read the input."""
        self._port.on_room = lambda: self._loop.call_soon(self._feed)
        try:
            self._loop.watch(self._fd, self._read)
            self._watched = True
        except PermissionError:  # a regular file: epoll does not take it
            self._polled = False
            self._loop.call_soon(self._feed)

    def close(self) -> None:
        """Stop reading the console's input. Closing twice is harmless."""
        self._ended = True
        self._port.on_room = None
        self._watch(False)

    def _read(self) -> None:
        """Read what there is, and feed the guest."""
        if self._ended:
            return  # it was called for before the end
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return  # another reader of the terminal was quicker
        except OSError:
            data = b""  # a terminal that hung up
        if self._on_escape is not None and ESCAPE in data:
            self._waiting += data[: data.index(ESCAPE)]
            self._ended = True
            self._on_escape()
        else:
            self._waiting += data
            self._ended = not data
        self._feed()

    def _feed(self) -> None:
        """Give the guest what it has room for, and read on if there is room here."""
        while self._waiting:
            taken = self._port.receive(bytes(self._waiting[:_GIVE]))
            del self._waiting[:taken]
            if taken < _GIVE:
                break
        wanted = not self._ended and len(self._waiting) < _AHEAD
        if self._polled:
            self._watch(wanted)
        elif wanted:
            self._loop.call_soon(self._read)

    def _watch(self, wanted: bool) -> None:
        if wanted != self._watched:
            self._watched = wanted
            if wanted:
                self._loop.watch(self._fd, self._read)
            else:
                self._loop.unwatch(self._fd)
