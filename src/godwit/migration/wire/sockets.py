"""Connections on sockets: deadlines, and each end's view of the other."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterable, Sequence

from godwit.errors import LinkLost
from godwit.host import unixsocket
from godwit.migration.times import TIMES, Times

from . import messages
from .stream import Parts, WaitingConnection, advance

#: The kernel waits for so long in one call, seconds: deadlines are looked at in between.
_SLICE_S = 0.25
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

_Some = Callable[[list[bytes | memoryview], float], int]


class SocketConnection(WaitingConnection):
    """A connection on a stream socket, unencrypted."""

    def __init__(self, sock: socket.socket, times: Times = TIMES) -> None:
        super().__init__()
        self._sock = sock
        self._times = times
        self._silence = times.silence
        self._receive_until = 0.0
        #: A message was sent in part, and what follows would be taken for the rest.
        self._cut = False
        #: Since when messages have to be sent soon, or not at all; the migration's clock.
        self._hurried_at: float | None = None
        self._set = {socket.SO_RCVTIMEO: -1.0, socket.SO_SNDTIMEO: -1.0}
        self._set_up(sock)
        self.begin()

    def _set_up(self, sock: socket.socket) -> None:
        # Blocking, with the kernel's own time-outs: a whole message is then one call each way,
        # where Python's would poll before each piece.
        sock.setblocking(True)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return
        unixsocket.enlarge(sock)  # TCP tunes its buffers itself

    def handshake(self) -> None:
        """Do what comes before the first message: nothing here.

        Raises:
            LinkLost: the peer is not whom it should be, or is gone.
        """

    def ready(self) -> bool:
        """Go on with the handshake without waiting, and return whether it is over.

        Raises:
            LinkLost: as :meth:`handshake`.
        """
        return True

    # --- bytes ------------------------------------------------------------------------------------
    def begin(self, length: int | None = None) -> None:
        """Start the time of the next message, or of its payload of ``length`` bytes."""
        self._receive_until = self._due(length or 0)

    def send_parts(self, parts: Parts) -> None:
        """Send the bytes of a message.

        Raises:
            LinkLost: the connection broke, or the peer did not take the message in time.
        """
        began = self._times.now()
        until = self._due(sum(map(len, parts)))
        if self._cut:
            raise LinkLost("the connection ends in the middle of a message")
        self._cut = True
        left: list[bytes | memoryview] = list(parts)
        quiet_at = began + self._silence
        while left:
            limit = min(until, quiet_at)
            if self._hurried_at is not None:
                limit = min(limit, max(began, self._hurried_at) + self._times.hurry)
            done = self._call(self._send_some, left, limit, quiet_at)
            if done:
                self.sent += advance(left, done)
                quiet_at = self._times.now() + self._silence
        self._cut = False

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views`` with the next bytes of the message.

        Raises:
            LinkLost: the connection broke, or the message was not whole in time.
        """
        left: list[bytes | memoryview] = [view for view in views if len(view)]
        quiet_at = self._times.now() + self._silence
        while left:
            limit = min(self._receive_until, quiet_at)
            done = self._call(self._receive_some, left, limit, quiet_at)
            self.on_wait()
            if done:
                advance(left, done)
                quiet_at = self._times.now() + self._silence

    def read_some(self, most: int) -> bytes:
        """Return the bytes that are here, without waiting.

        Raises:
            LinkLost: the connection broke.
        """
        try:
            data = self._sock.recv(most, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise _broke(error) from error
        if not data:
            raise LinkLost("the peer closed the connection")
        return data

    def wait(self, timeout: float, others: Iterable[int] = ()) -> tuple[bool, set[int]]:
        """Wait for bytes or other descriptors. A connection that was closed is readable."""
        poll = select.poll()
        own = self._sock.fileno()
        for fd in (own, *others):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, timeout) * 1000)}
        return own in ready or own < 0, ready - {own}

    def _send_some(self, left: list[bytes | memoryview], timeout: float) -> int:
        """Send some bytes, and return how many.

        Raises:
            BlockingIOError: the peer took none within ``timeout`` seconds.
            OSError: the connection broke.
        """
        self._limit(socket.SO_SNDTIMEO, timeout)
        return self._sock.sendmsg(left)

    def _receive_some(self, left: list[bytes | memoryview], timeout: float) -> int:
        """Receive bytes into the buffers, and return how many.

        Raises:
            BlockingIOError: none came within ``timeout`` seconds.
            OSError: the connection broke.
            LinkLost: the peer closed the connection.
        """
        self._limit(socket.SO_RCVTIMEO, timeout)
        done = self._sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
        if not done:
            raise LinkLost("the peer closed the connection")
        return done

    def _call(
        self,
        some: _Some,
        left: list[bytes | memoryview],
        limit: float,
        quiet_at: float,
    ) -> int:
        """Have ``some`` move bytes until ``limit`` at the most, and return how many it moved."""
        now = self._times.now()
        if self.deadline is not None and now >= self.deadline:
            raise LinkLost("the time for the whole of the stop is over")
        if now >= limit:
            if quiet_at - limit < self._silence / 2:
                raise LinkLost(f"the peer was silent for {self._silence:g} s")
            raise LinkLost("the peer took too long for a message")
        if self.deadline is not None:
            limit = min(limit, self.deadline)
        try:
            return some(left, min(limit - now, _SLICE_S))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _broke(error) from error

    def _due(self, length: int) -> float:
        return self._times.now() + self._silence + length / self._times.rate

    def _limit(self, option: int, seconds: float) -> None:
        """Have the next call give up after some time: the kernel counts the whole call."""
        if self._set[option] != seconds:
            self._set[option] = seconds
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1)
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)

    # --- the peer ---------------------------------------------------------------------------------
    def set_silence(self, seconds: float) -> None:
        """Set for how many seconds a silent peer is waited for."""
        self._silence = seconds

    def fileno(self) -> int:
        """Return the socket's descriptor, to be polled, or -1 once closed."""
        return self._sock.fileno()

    def peer_uid(self, listener: bool) -> int | None:
        """Return the user of the process at the other end, or None if that is not known.

        A process of another host, or of another network namespace, has no known user. With
        ``listener`` the other end listened, and may not have accepted the connection yet.
        """
        if self._sock.family == socket.AF_UNIX:
            return self._credentials()[1]
        from godwit.host.net.sockets import owner_of_peer

        try:
            return owner_of_peer(self._sock, listener)
        except OSError:
            return None

    def describe(self, packets: bool) -> messages.Welcome:
        """Return the connection as this end sees it."""
        near, far = self._ends()
        return messages.Welcome(os.getpid(), near, far, packets)

    def is_direct(self, seen: messages.Welcome) -> bool:
        """Return whether nothing stands between the two ends."""
        if self._sock.family == socket.AF_UNIX:
            return self._credentials()[0] == seen.pid
        return self._ends() == (seen.far, seen.near)

    def _credentials(self) -> tuple[int, int, int]:
        try:
            raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError as error:
            raise _broke(error) from error
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        return pid, uid, gid

    def _ends(self) -> tuple[str, str]:
        if self._sock.family == socket.AF_UNIX:
            return "", ""
        try:
            near, far = self._sock.getsockname(), self._sock.getpeername()
        except OSError as error:
            raise _broke(error) from error
        return f"{near[0]} {near[1]}", f"{far[0]} {far[1]}"

    # --- ends -------------------------------------------------------------------------------------
    def interrupt(self) -> None:
        """Make all threads that wait on the connection give up."""
        self._shut_down(socket.SHUT_RDWR)

    def give_up(self) -> None:
        """Make the receiving thread give up, and the sending one soon."""
        self._hurried_at = self._times.now()
        self._shut_down(socket.SHUT_RD)

    def _shut_down(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # closed by the peer already

    def close(self) -> None:
        """Give back the connection's socket."""
        self._sock.close()


def _broke(error: OSError) -> LinkLost:
    return LinkLost(f"the connection broke: {error.strerror or error}")
