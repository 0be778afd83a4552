"""A relay between a migration's source and destination that cuts the connection at a message."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from godwit.errors import GodwitError
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec import saved


class ConnectionCutter:
    """A relay of messages from ``near`` to ``far`` and back, until the first ``kind``.

    A ``kind`` of None cuts nothing. The message of that kind arrives if ``delivered``. Then the
    connection breaks, or, if ``stalls``, stays open and passes nothing more. Later connections are
    left whole. ``before`` is called as the message comes, and then nobody listens at ``near`` any
    more, as at the destination's death. ``on_message`` is called with each message's kind and
    payload.
    """

    def __init__(
        self,
        near: Path,
        far: Path,
        kind: Kind | None,
        delivered: bool,
        before: Callable[[], None] | None = None,
        on_message: Callable[[Kind, bytes | bytearray], None] = lambda kind, payload: None,
        stalls: bool = False,
    ) -> None:
        self._stalls = stalls
        self.cut = threading.Event()
        self._dead = threading.Event()
        self.lines = 0
        self._far = far
        self._kind = kind
        self._delivered = delivered
        self._before = before
        self._on_message = on_message
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(near))
        near.chmod(0o666)  # a VM that root started goes on as another user
        self._listener.listen()
        self._connections: list[SocketConnection] = []
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_listening()
        self._thread.join()
        for connection in self._connections:
            connection.interrupt()
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.close()

    def _stop_listening(self) -> None:
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        except OSError:
            pass
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                source = SocketConnection(self._listener.accept()[0])
            except OSError:
                return
            self.lines += 1
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(self._far))  # whatever user it runs as: a relay has no opinion
            except OSError:
                sock.close()
                source.close()  # the destination is dead: as its kernel would refuse
                continue
            target = SocketConnection(sock)
            self._connections += [source, target]
            for one, other in ((source, target), (target, source)):
                one.set_silence(120)
                arguments = (one, other, self.lines == 1, one is target)
                thread = threading.Thread(target=self._pass, args=arguments, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(
        self, one: SocketConnection, other: SocketConnection, first: bool, from_target: bool
    ) -> None:
        try:
            while True:
                kind, length = one.receive()
                payload = one.read(length)
                self._on_message(kind, payload)
                if self._stalls and first and self.cut.is_set():
                    continue  # the message is lost
                cutting = kind is self._kind and not self.cut.is_set()
                if from_target and self._dead.is_set():
                    continue  # the dead send nothing
                if kind is Kind.WELCOME:
                    payload = self._as_ours(payload)
                if cutting:
                    self.cut.set()
                    if self._before is not None:
                        self._dead.set()
                        self._before()
                        self._stop_listening()
                if not cutting or self._delivered:
                    try:
                        other.send_parts([messages.header(kind, len(payload)), memoryview(payload)])
                    except GodwitError:
                        # The other side closed: its earlier messages are passed on first.
                        if not cutting:
                            return
                if cutting and not self._stalls:
                    break
        except GodwitError:
            pass  # one of the two closed
        # Messages already sent still arrive (AF_UNIX keeps them), then the end.
        one.interrupt()
        other.interrupt()

    @staticmethod
    def _as_ours(payload: bytearray) -> bytearray:
        """Return a WELCOME with which the source takes the connection for a direct one."""
        welcome = saved.decode(payload, messages.Welcome)
        return bytearray(saved.encode(msgspec.structs.replace(welcome, pid=os.getpid())))
