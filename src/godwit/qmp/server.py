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
from .outbox import Outbox

#: The most clients at once: a VM has an operator, perhaps a monitor, not a crowd.
MAX_CLIENTS = 32
#: The time for a client to finish the negotiation, seconds: enough for one who types.
NEGOTIATION_S = 60.0
#: With so many bytes of replies unsent, a client's requests wait until it has taken some of them.
#: Events do not count: a guest that floods a client with events keeps it from no command.
PAUSE_AT = 64 << 10
#: The most that one client's requests do before others have their turn: requests, and seconds.
MAX_REQUESTS = 16
MAX_WORK_S = 0.01
_CHUNK = 4096
# When there were no descriptors left for a client, seconds.
_ACCEPT_AGAIN = 1.0


class _Client:
    def __init__(self, sock: socket.socket, session: protocol.Session, now: float) -> None:
        self.sock = sock
        self.session = session
        self.out = Outbox()
        self.last_came = now  # when it last sent something
        self.deadline = now + NEGOTIATION_S  # of its negotiation
        self.busy = False  # requests of it may be complete that are not executed yet
        self.scheduled = False  # its next turn is due in the loop
        self.ended = False  # nothing more comes from it; close when all was sent to it
        self.broken = False  # nothing can be sent to it


class Server:
    """A listener on ``path`` (mode 0600) from construction to :meth:`close`, and its clients.

    ``execute`` is called in the loop's thread; :meth:`emit` and :meth:`run_state_changed` may be
    called from any. An event a command causes reaches clients before the command's reply, as
    with QEMU. A client that does not read keeps its connection: its requests wait, and of its
    events those that are too many are left out (:mod:`.outbox`).

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
        self._flush_due = False
        self._deadlines_due = False
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
        with self._lock:
            ready = [client for client in self._clients.values() if client.session.negotiated]
            if self._closed or not ready:
                return
            message = protocol.event(event, data)
            for client in ready:
                client.out.event(event, message)
            if not self._flush_due:
                self._flush_due = True
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
        if len(self._clients) >= MAX_CLIENTS and not self._make_space():
            sock.close()
            return
        sock.setblocking(False)
        session = protocol.Session(self._execute, self._on_error)
        client = _Client(sock, session, self._loop.now())
        with self._lock:
            client.out.reply(session.greeting())
            self._clients[sock.fileno()] = client
        if not self._deadlines_due:
            self._deadlines_due = True
            self._loop.call_later(NEGOTIATION_S, self._keep_deadlines)
        self._flush(client)

    def _make_space(self) -> bool:
        """Drop the longest idle of all clients without negotiation, if there are some."""
        idle = self._not_negotiated()
        if idle:
            self._drop(min(idle, key=lambda client: client.last_came))
        return bool(idle)

    def _not_negotiated(self) -> list[_Client]:
        return [client for client in self._clients.values() if not client.session.negotiated]

    def _keep_deadlines(self) -> None:
        """Drop who has not negotiated in time, and look again while there is somebody who may."""
        now = self._loop.now()
        for client in self._not_negotiated():
            if client.deadline <= now:
                self._drop(client)
        left = [client.deadline for client in self._not_negotiated()]
        self._deadlines_due = bool(left)
        if left:
            # One timer for all: a cancelled one would stay with the loop until it is due.
            self._loop.call_later(min(left) - now, self._keep_deadlines)

    def _readable(self, client: _Client) -> None:
        try:
            data = client.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        client.last_came = self._loop.now()
        client.session.feed(data)
        client.ended = not data
        client.busy = True
        self._serve(client)

    def _serve(self, client: _Client) -> None:
        """Execute some of a client's requests, and leave the others for its next turn."""
        end = self._loop.now() + MAX_WORK_S
        for _ in range(MAX_REQUESTS):
            if client.out.replies >= PAUSE_AT:
                self._flush(client)
            if not self._has(client) or client.out.replies >= PAUSE_AT:
                break
            reply = client.session.step()
            if reply is None:
                client.busy = False
                client.ended = client.ended or client.session.broken
                break
            with self._lock:
                client.out.reply(reply)
            if self._loop.now() >= end:
                break
        # Other clients' events as well: the command may be the last that the loop does.
        self._flush_all()

    def _serve_on(self, client: _Client) -> None:
        client.scheduled = False
        if self._has(client) and client.busy:
            self._serve(client)

    def _flush_all(self) -> None:
        with self._lock:
            self._flush_due = False
        for client in tuple(self._clients.values()):
            self._flush(client)

    def _flush(self, client: _Client) -> None:
        """Send what the socket takes now, and watch for what is to come."""
        if not self._has(client):
            return
        with self._lock:
            try:
                while client.out:
                    client.out.sent(client.sock.send(client.out.data))
            except BlockingIOError:
                pass
            except OSError:
                client.broken = True
            unsent, space = len(client.out), client.out.replies < PAUSE_AT
        if client.broken or (client.ended and not client.busy and not unsent):
            self._drop(client)
            return
        if client.busy and space and not client.scheduled:
            client.scheduled = True
            self._loop.call_soon(lambda: self._serve_on(client))

        def readable() -> None:
            self._readable(client)

        def writable() -> None:
            self._flush(client)

        reading = not client.ended and not client.busy and space
        self._loop.watch(
            client.sock.fileno(), readable if reading else None, writable if unsent else None
        )

    def _has(self, client: _Client) -> bool:
        return self._clients.get(client.sock.fileno()) is client

    def _drop(self, client: _Client) -> None:
        fd = client.sock.fileno()
        with self._lock:
            self._clients.pop(fd, None)
        self._loop.unwatch(fd)
        client.sock.close()
