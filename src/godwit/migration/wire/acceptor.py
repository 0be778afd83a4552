"""A listener for the first messages of several connections at once.

Whoever can connect may send half a message, or one byte now and then, or nothing. None of these
keeps the one out whose message is whole: each connection has a deadline for the introduction, and
of too many one is closed of those from where most come.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable

from godwit.errors import GodwitError, LinkLost, StreamError
from godwit.migration.times import Times

from . import messages
from .address import Address
from .messages import Kind
from .sockets import SocketConnection
from .stream import WaitingConnection

#: Connections whose introduction is awaited at once.
MAX_NEWCOMERS = 64

#: A connection with its whole first message.
Introduced = tuple[WaitingConnection, Kind, bytes]


class _Newcomer:
    """A connection whose first message has not come whole yet."""

    def __init__(self, address: Address, sock: socket.socket, due: float) -> None:
        self.due = due
        #: The address of the other end's host; nothing for a Unix socket.
        self.origin = str(sock.getpeername()[0]) if sock.family != socket.AF_UNIX else ""
        self.connection: SocketConnection = address.accepted(sock)
        self._address = address
        self._received = bytearray()
        self._greeted = False
        self._challenge: Callable[[Kind, bytes], None] | None = None

    def step(self) -> tuple[Kind, bytes] | None:
        """Receive what is here, and return the first message once whole.

        Raises:
            GodwitError: this is nobody to talk to.
        """
        if not self.connection.ready():
            return None
        if not self._greeted:
            self._greeted = True
            self._address.check_peer(self.connection)
            if self._address.secret is not None:
                from . import secret

                self._challenge = secret.challenge(self.connection, self._address.secret)
        while True:
            # Not a byte more than the message has: the rest is for the conversation.
            size = messages.HEADER.size
            if len(self._received) >= size:
                kind, length = messages.parse_header(self._received[:size])
                expected = (Kind.AUTH,) if self._challenge else (Kind.HELLO, Kind.QUERY)
                if kind not in expected:
                    raise StreamError(f"message {kind.name} as the first of a connection")
                size += length
                if len(self._received) == size:
                    payload = bytes(self._received[messages.HEADER.size :])
                    self._received.clear()
                    if self._challenge is None:
                        return kind, payload
                    self._challenge(kind, payload)
                    self._challenge = None
                    continue
            data = self.connection.read_some(size - len(self._received))
            if not data:
                return None
            self._received += data


class Acceptor:
    """A listener at ``address``, from construction to :meth:`close`.

    ``refuse(connection, error)`` is called for a connection that is closed for what it sent.

    Raises:
        ConfigError, HostError: the address cannot be had.
    """

    def __init__(
        self,
        address: Address,
        times: Times,
        refuse: Callable[[WaitingConnection, GodwitError], None],
    ) -> None:
        self._address = address
        self._times = times
        self._refuse = refuse
        self._listener = address.listen()
        self._listener.setblocking(False)
        self._newcomers: dict[int, _Newcomer] = {}
        self._closing = threading.Event()

    def next(self, timeout: float | None) -> Introduced | None:
        """Return the next introduced connection.

        Returns None after ``timeout`` seconds, or once closing. Called by one thread.
        """
        until = None if timeout is None else self._times.now() + timeout
        while not self._closing.is_set():
            for fd in self._wait(until):
                newcomer = self._newcomers.get(fd) or self._accept()
                # A new one, too: with a secret it is sent something first.
                if newcomer is not None and (message := self._step(newcomer)) is not None:
                    return newcomer.connection, *message
            self._shed()
            if until is not None and self._times.now() >= until:
                return None
        return None

    def interrupt(self) -> None:
        """Make :meth:`next` return None, now and from now on, from any thread."""
        self._closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed already

    def close(self) -> None:
        """Listen no more: whoever connects is refused, and who was not introduced is closed."""
        self._closing.set()
        self._listener.close()
        while self._newcomers:
            self._newcomers.popitem()[1].connection.close()

    def _wait(self, until: float | None) -> list[int]:
        """Return the ready descriptors, the newcomers' first, by ``until``."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        for fd in self._newcomers:
            poll.register(fd, select.POLLIN)
        dues = [newcomer.due for newcomer in self._newcomers.values()]
        dues += [] if until is None else [until]
        wait = max(0.0, min(dues) - self._times.now()) * 1000 if dues else None
        return sorted((fd for fd, _ in poll.poll(wait)), key=lambda fd: fd not in self._newcomers)

    def _accept(self) -> _Newcomer | None:
        try:
            sock = self._listener.accept()[0]
            due = self._times.now() + self._times.introduction
            newcomer = _Newcomer(self._address, sock, due)
        except BlockingIOError:
            return None
        except (GodwitError, OSError):
            # A peer that gave up already, or no descriptors left: others may come.
            self._closing.wait(0.1)
            return None
        self._newcomers[newcomer.connection.fileno()] = newcomer
        return newcomer if len(self._newcomers) <= MAX_NEWCOMERS else self._make_room(newcomer)

    def _make_room(self, newest: _Newcomer) -> _Newcomer | None:
        """Close one of too many newcomers, and return the newest if another was closed.

        One of those from where most come, at random: the oldest may be the one whose answer is on
        its way.
        """
        count = Counter(newcomer.origin for newcomer in self._newcomers.values())
        crowd = count.most_common(1)[0][0]
        fds = [fd for fd, newcomer in self._newcomers.items() if newcomer.origin == crowd]
        closed = self._newcomers.pop(fds[int.from_bytes(os.urandom(4), "big") % len(fds)])
        closed.connection.close()
        return None if closed is newest else newest

    def _step(self, newcomer: _Newcomer) -> tuple[Kind, bytes] | None:
        fd = newcomer.connection.fileno()
        try:
            message = newcomer.step()
        except Exception as error:  # whatever it is: others may come
            del self._newcomers[fd]
            if isinstance(error, GodwitError) and not isinstance(error, LinkLost):
                self._refuse(newcomer.connection, error)
            newcomer.connection.close()
            return None
        if message is not None:
            del self._newcomers[fd]
        return message

    def _shed(self) -> None:
        """Close the connections which took too long."""
        now = self._times.now()
        for fd, newcomer in tuple(self._newcomers.items()):
            if now >= newcomer.due:
                del self._newcomers[fd]
                newcomer.connection.close()
