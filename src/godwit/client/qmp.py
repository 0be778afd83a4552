"""A synchronous QMP client on a Unix socket, of Godwit or of QEMU.

The server is not trusted: what a server may make this process keep is bounded, and a call ends by
its deadline however the server spreads its bytes.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import CommandRefused, VmGone
from .messages import Messages

__all__ = ["Client", "CommandRefused", "Event", "VmGone"]

Event = Mapping[str, Any]

#: Events that are kept until somebody asks for them, and the bytes of their text.
MAX_EVENTS, MAX_EVENT_BYTES = 10_000, 8 << 20
#: Between two attempts to connect to a VM that is not up yet, seconds.
_RETRY = 0.02
#: The longest look at what the socket holds, for a server that sends without an end, seconds.
_LOOK = 1.0
_CHUNK = 1 << 16


class _Broken(Exception):
    """The end of a connection's use, with the reason as text."""


class Client:
    """A connection to one VM. Use it as a context manager, from one thread.

    Events that arrive between calls are kept, in order, until asked for: the latest, up to a bound.

    Attributes:
        events_lost: how many events were dropped because nobody asked for them.
    """

    def __init__(self, path: str, sock: socket.socket) -> None:
        self.path = path
        self.events_lost = 0
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._messages = Messages()
        self._unsent = bytearray()
        self._events: deque[tuple[Event, int]] = deque()
        self._event_bytes = 0
        self._replies: dict[object, dict[str, Any]] = {}
        self._expected: object = None
        self._count = 0
        self._broken = ""

    @classmethod
    def connect(
        cls, path: str | os.PathLike[str], deadline: float = 5.0, retry: bool = False
    ) -> Client:
        """Connect and negotiate within ``deadline`` seconds.

        With ``retry``, a socket that is not there yet is waited for.

        Raises:
            VmGone: nobody answered.
        """
        name = os.fspath(path)
        end = time.monotonic() + deadline
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(name)
                client = cls(name, sock)
                client._negotiate(end)
                return client
            except TimeoutError as error:
                sock.close()
                raise VmGone(f"no VM answers on {name} within {deadline:g} s") from error
            except (OSError, _Broken) as error:
                sock.close()
                again = retry or isinstance(error, BlockingIOError)  # its backlog is full
                if not again or time.monotonic() + _RETRY > end:
                    why = getattr(error, "strerror", None) or str(error)
                    raise VmGone(f"no VM answers on {name}: {why}") from error
                time.sleep(_RETRY)
            except BaseException:
                sock.close()
                raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which is harmless the second time."""
        self._broken = self._broken or "the connection is closed"
        self._sock.close()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, deadline: float = 30.0
    ) -> Any:
        """Execute ``command`` and return its result, within ``deadline`` seconds.

        Raises:
            CommandRefused: the VM answered with an error.
            VmGone: the VM did not answer.
        """
        with self._reported(f"'{command}'", deadline):
            reply = self._ask(command, arguments, time.monotonic() + deadline)
        if "error" in reply:
            found = reply["error"] if isinstance(reply["error"], dict) else {}
            text, kind = found.get("desc", "no reason given"), found.get("class", "GenericError")
            raise CommandRefused(str(text), str(kind))
        return reply.get("return")

    def events(self) -> list[Event]:
        """Return the events that have arrived and were not asked for yet, in order, at once."""
        end = time.monotonic() + _LOOK
        try:
            while not self._broken and time.monotonic() < end and self._receive():
                pass
        except _Broken:
            pass  # the next call that needs the VM raises it
        found = [event for event, _ in self._events]
        self._events.clear()
        self._event_bytes = 0
        return found

    def wait_event(
        self,
        name: str,
        deadline: float = 30.0,
        predicate: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> Event:
        """Wait for the next event ``name`` whose data ``predicate`` accepts, and pass over others.

        Raises:
            VmGone: none came within ``deadline`` seconds, or the VM closed the connection.
        """
        with self._reported(f"event {name}", deadline):
            return self._next(name, time.monotonic() + deadline, predicate)

    def wait_any(self, name: str, deadline: float) -> Event | None:
        """Return the next event ``name``, or None if none comes within ``deadline`` seconds.

        Raises:
            VmGone: the VM closed the connection.
        """
        with self._reported(f"event {name}", deadline):
            try:
                return self._next(name, time.monotonic() + deadline)
            except TimeoutError:
                return None

    # --- the conversation -------------------------------------------------------------------------
    def _negotiate(self, end: float) -> None:
        self._expected = None  # the greeting is the one message without an id
        self._turn_until(lambda: None in self._replies, end)
        if "QMP" not in self._replies.pop(None):
            raise self._break("a greeting that is not QMP's")
        if "error" in self._ask("qmp_capabilities", None, end):
            raise self._break("capabilities are refused")

    def _ask(
        self, command: str, arguments: Mapping[str, object] | None, end: float
    ) -> dict[str, Any]:
        """Send a command, and return its reply. Replies to commands given up before are dropped."""
        self._count += 1
        self._expected = self._count
        self._replies.clear()
        request: dict[str, object] = {"execute": command, "id": self._count}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        self._unsent += json.dumps(request).encode() + b"\n"
        self._turn_until(lambda: self._expected in self._replies, end)
        return self._replies.pop(self._expected)

    def _next(
        self,
        name: str,
        end: float,
        predicate: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> Event:
        while True:
            self._turn_until(lambda: self._events, end)
            event, size = self._events.popleft()
            self._event_bytes -= size
            data = event.get("data")
            if event["event"] == name and (
                predicate is None or predicate(data if isinstance(data, dict) else {})
            ):
                return event

    def _turn_until(self, condition: Callable[[], object], end: float) -> None:
        """Send and receive until ``condition`` holds.

        Raises:
            TimeoutError: the condition does not hold at ``end``.
            _Broken: the connection broke.
        """
        while not condition():
            if self._broken:
                raise _Broken(self._broken)
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._poll.modify(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            if self._poll.poll(left * 1000):
                self._send()
                self._receive()

    def _send(self) -> None:
        if not self._unsent:
            return
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # what the VM sent before its end is still to be read

    def _receive(self) -> bool:
        """Receive what one system call gives, and return False for nothing."""
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._break(f"the VM closed the connection: {error.strerror}") from error
        if not data:
            raise self._break("the VM closed the connection")
        try:
            for message, size in self._messages.feed(data):
                self._sort(message, size)
        except ValueError as error:
            raise self._break(f"what the VM sends is not QMP: {error}") from error
        return True

    def _sort(self, message: dict[str, Any], size: int) -> None:
        if isinstance(message.get("event"), str):
            self._events.append((message, size))
            self._event_bytes += size
            # A guest may cause as many as it likes: they are no reason to end a conversation.
            while len(self._events) > MAX_EVENTS or self._event_bytes > MAX_EVENT_BYTES:
                self._event_bytes -= self._events.popleft()[1]
                self.events_lost += 1
        elif message.get("id") == self._expected and not self._replies:
            self._replies[self._expected] = message

    def _break(self, why: str) -> _Broken:
        self._broken = why
        self._sock.close()
        return _Broken(why)

    @contextmanager
    def _reported(self, what: str, deadline: float) -> Iterator[None]:
        """Raise a failure as VmGone."""
        try:
            yield
        except TimeoutError as error:
            raise VmGone(f"{what}: no answer from {self.path} within {deadline:g} s") from error
        except _Broken as error:
            raise VmGone(f"{what}: no answer from {self.path}: {error}") from error
