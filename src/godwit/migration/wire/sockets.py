"""Connections on sockets: addresses, deadlines, and each end's view of the other."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterable, Sequence

from godwit.errors import ConfigError, LinkLost
from godwit.host import unixsocket
from godwit.migration.times import TIMES, Times

from . import messages
from .stream import Parts, WaitingConnection, advance, send_pieces

_BUFFER = 1 << 20
_SO_SNDBUFFORCE = 32  # beyond wmem_max, for root (asm-generic/socket.h)
#: A socket's time-out is set anew when it is off by more than this, seconds.
_EXACT_S = 0.25
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Address:
    """An address of a migration, ``unix:PATH`` or ``tcp:HOST:PORT``.

    Raises:
        ConfigError: neither; or ``tcp:`` beyond this host without ``insecure``, because the stream
            is neither encrypted nor authenticated.
    """

    def __init__(self, uri: str, insecure: bool, times: Times = TIMES) -> None:
        self.uri = uri
        self._times = times
        scheme, _, rest = uri.partition(":")
        self.path: str | None = None
        self.host, self.port = "", 0
        if scheme == "unix" and rest:
            self.path = rest
            return
        host, _, port = rest.rpartition(":")
        if scheme != "tcp" or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"migration address '{uri}'; give unix:PATH, tcp:HOST:PORT or file:PATH"
            )
        self.host, self.port = host.strip("[]"), int(port)
        if not insecure and not _loopback(self.host):
            raise ConfigError(
                f"'{uri}' leaves this host, and the stream is neither encrypted nor "
                "authenticated: whoever reads it has the guest's memory. Give --insecure on a "
                "network that you trust"
            )

    def listen(self) -> socket.socket:
        """Return a socket that listens there.

        Raises:
            ConfigError, HostError: the address cannot be had.
        """
        if self.path is not None:
            return unixsocket.listen(self.path, "migration")
        try:
            family = socket.getaddrinfo(self.host, self.port)[0][0]
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise ConfigError(f"cannot listen on '{self.uri}': {error}") from error

    def connect(self, timeout: float | None = None) -> SocketConnection:
        """Return a connection to the listener there.

        Raises:
            LinkLost: nobody listens (its cause is the OSError).
        """
        timeout = self._times.silence if timeout is None else timeout
        try:
            if self.path is None:
                sock = socket.create_connection((self.host, self.port), timeout)
            else:
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.settimeout(timeout)
                    sock.connect(self.path)
                except OSError:
                    sock.close()
                    raise
        except OSError as error:
            raise LinkLost(f"cannot reach '{self.uri}': {error}") from error
        return SocketConnection(sock, self._times)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    import ipaddress  # here: it is slow to import, and most addresses never come this far

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
        #: The last call had the rest of the message's time, and no whole silence.
        self._due_soon = False
        self._set = {socket.SO_RCVTIMEO: -1.0, socket.SO_SNDTIMEO: -1.0}
        # Blocking, with the kernel's own time-outs: a whole message is then one call each way,
        # where Python's would poll before each piece.
        sock.setblocking(True)
        self.begin()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            # TCP tunes its buffers itself; a Unix socket's default holds fifty pages.
            try:
                sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    # --- bytes ------------------------------------------------------------------------------------
    def begin(self, length: int | None = None) -> None:
        """Start the time of the next message, or of its payload of ``length`` bytes."""
        self._receive_until = self._due(length or 0)

    def send_parts(self, parts: Parts) -> None:
        """Send the bytes of a message.

        Raises:
            LinkLost: the connection broke, or the peer did not take the message in time.
        """
        until = self._due(sum(map(len, parts)))

        def send(left: list[bytes | memoryview]) -> int:
            self._limit(socket.SO_SNDTIMEO, until)
            return self._sock.sendmsg(left)

        if self._cut:
            raise LinkLost("the connection ends in the middle of a message")
        self._cut = True
        try:
            self.sent += send_pieces(parts, send)
        except OSError as error:
            raise self._lost(error) from error
        self._cut = False

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views`` with the next bytes of the message.

        Raises:
            LinkLost: the connection broke, or the message was not whole in time.
        """
        left = [view for view in views if len(view)]
        try:
            while left:
                self._limit(socket.SO_RCVTIMEO, self._receive_until)
                got = self._sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
                if not got:
                    raise LinkLost("the peer closed the connection")
                advance(left, got)
        except OSError as error:
            raise self._lost(error) from error

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
            raise self._lost(error) from error
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

    def _due(self, length: int) -> float:
        return self._times.now() + self._silence + length / self._times.rate

    def _limit(self, option: int, until: float) -> None:
        """Have the next call give up after a silence, or at ``until`` if that is sooner.

        The kernel counts the whole call, which returns what there was by then.
        """
        left = until - self._times.now()
        if left <= 0:
            raise TimeoutError
        self._due_soon = left < self._silence / 2
        left = min(left, self._silence)
        if abs(self._set[option] - left) > _EXACT_S or left < _EXACT_S:
            self._set[option] = left
            limit = struct.pack("ll", int(left), int(left % 1 * 1e6) or 1)
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)

    # --- the peer ---------------------------------------------------------------------------------
    def set_silence(self, seconds: float) -> None:
        """Set for how many seconds a silent peer is waited for."""
        self._silence = seconds

    def describe(self, packets: bool) -> messages.Welcome:
        """Return the connection as this end sees it."""
        near, far = self._ends()
        return messages.Welcome(os.getpid(), near, far, packets)

    def is_direct(self, seen: messages.Welcome) -> bool:
        """Return whether nothing stands between the two ends."""
        if self._sock.family == socket.AF_UNIX:
            raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, _, _ = _CREDENTIALS.unpack(raw)
            return bool(pid == seen.pid)
        return self._ends() == (seen.far, seen.near)

    def _ends(self) -> tuple[str, str]:
        if self._sock.family == socket.AF_UNIX:
            return "", ""
        near, far = self._sock.getsockname(), self._sock.getpeername()
        return f"{near[0]} {near[1]}", f"{far[0]} {far[1]}"

    def _lost(self, error: OSError) -> LinkLost:
        if isinstance(error, BlockingIOError) and not self._due_soon:
            return LinkLost(f"the peer was silent for {self._silence:g} s")
        if isinstance(error, (BlockingIOError, TimeoutError)):
            return LinkLost("the peer took too long for a message")
        return LinkLost(f"the connection broke: {error.strerror or error}")

    # --- ends -------------------------------------------------------------------------------------
    def interrupt(self) -> None:
        """Make all threads that wait on the connection give up."""
        self._shut_down(socket.SHUT_RDWR)

    def stop_receiving(self) -> None:
        """Make the receiving thread give up, while sending goes on."""
        self._shut_down(socket.SHUT_RD)

    def _shut_down(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # closed by the peer already

    def close(self) -> None:
        """Give back the connection's socket."""
        self._sock.close()
