"""QMP on a Unix socket, in the event loop: nothing a client does makes the VM wait."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Mapping

from godwit.host import unixsocket
from godwit.host.loop import Loop
from godwit.spec import events
from godwit.spec.events import Event
from godwit.spec.runstate import RunState

from . import protocol

#: The most clients at once: a VM has an operator, perhaps a monitor, not a crowd.
MAX_CLIENTS = 32
#: The most that a client may leave unread, bytes, before the client is dropped.
MAX_UNREAD = 1 << 20
#: A client with this much unread, bytes, is not read from until some of it was taken.
PAUSE_AT = 64 << 10
# Small, since every two bytes may cause an error reply of a hundred.
_CHUNK = 4096
# When there were no descriptors left for a client, seconds.
_ACCEPT_AGAIN = 1.0


class _Client:
    def __init__(self, sock: socket.socket, session: protocol.Session) -> None:
        self.sock = sock
        self.session = session
        self.out = bytearray()
        self.ended = False  # nothing more comes from it; close when all was sent to it
        self.dropped = False

    def push(self, data: bytes) -> None:
        """Add to what is to be sent, or drop a client that does not read.

        The caller holds the server's lock.
        """
        if len(self.out) + len(data) > MAX_UNREAD:
            self.dropped = True
        elif not self.dropped:  # no gap in what it is sent until it is closed
            self.out += data


class Server:
    """A listener on ``path`` (mode 0600) from construction to :meth:`close`, and its clients.

    ``execute`` is called in the loop's thread; :meth:`emit` and :meth:`run_state_changed` may be
    called from any. An event a command causes reaches clients before the command's reply, as
    with QEMU.

    Raises:
        ConfigError: ``path`` is too long, not a socket, or somebody listens there.
        HostError: the socket cannot be made; the message has the cause.
    """

    def __init__(
        self,
        loop: Loop,
        path: str | os.PathLike[str],
        execute: protocol.Execute,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._loop = loop
        self._execute = execute
        self._on_error = on_error
        self._clients: dict[int, _Client] = {}
        # Held for buffers and the table of clients, never while a command is executed.
        self._lock = threading.Lock()
        self._closed = False
        self._sock = unixsocket.listen(self.path, "QMP")
        self._sock.setblocking(False)
        self._inode = os.stat(self.path).st_ino
        self._watch_listener()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def emit(self, event: Event, data: Mapping[str, object] | None = None) -> None:
        """Send an event to each client that has finished the negotiation, from any thread."""
        message = protocol.event(event, data)
        with self._lock:
            if self._closed:
                return
            ready = [client for client in self._clients.values() if client.session.negotiated]
            for client in ready:
                client.push(message)
            if ready:
                # Under the lock, so that the loop is still open: close() comes before it ends.
                self._loop.call_soon(self._flush_all)

    def run_state_changed(self, old: RunState, new: RunState) -> None:
        """Send the events of a transition: listen to the run states with this."""
        for event, data in events.of_transition(old, new):
            self.emit(event, data)

    def close(self) -> None:
        """Send what can be sent without waiting, hang up, and remove the socket's file.

        Call it in the loop's thread, or after the loop has ended and before it is closed.
        """
        self._flush_all()
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for client in tuple(self._clients.values()):
            self._drop(client)
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        unixsocket.remove(self.path, self._inode)

    def _watch_listener(self) -> None:
        if not self._closed:
            self._loop.watch(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The client stays in the queue and the socket readable: do not turn in circles.
                self._loop.unwatch(self._sock.fileno())
                self._loop.call_later(_ACCEPT_AGAIN, self._watch_listener)
            return  # else it has gone already
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        client = _Client(sock, protocol.Session(self._execute, self._on_error))
        with self._lock:
            client.push(client.session.greeting())
            self._clients[sock.fileno()] = client
        self._flush(client)

    def _readable(self, client: _Client) -> None:
        try:
            data = client.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if data:
            replies = client.session.feed(data)
            with self._lock:
                client.push(replies)
        client.ended = not data or client.session.broken
        # Other clients' events as well: the command may be the last that the loop does.
        self._flush_all()

    def _flush_all(self) -> None:
        for client in tuple(self._clients.values()):
            self._flush(client)

    def _flush(self, client: _Client) -> None:
        """Send what the socket takes now, and watch for what is to come."""
        fd = client.sock.fileno()
        if self._clients.get(fd) is not client:
            return
        with self._lock:
            try:
                while client.out:
                    del client.out[: client.sock.send(client.out)]
            except BlockingIOError:
                pass
            except OSError:
                client.dropped = True
            unread = len(client.out)
        if client.dropped or (client.ended and not unread):
            self._drop(client)
            return

        def readable() -> None:
            self._readable(client)

        def writable() -> None:
            self._flush(client)

        reading = not client.ended and unread < PAUSE_AT
        self._loop.watch(fd, readable if reading else None, writable if unread else None)

    def _drop(self, client: _Client) -> None:
        fd = client.sock.fileno()
        with self._lock:
            self._clients.pop(fd, None)
        self._loop.unwatch(fd)
        client.sock.close()
