"""The line between source and destination: addresses, frames on a socket, deadlines."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence

from godwit.errors import ConfigError, LinkLost
from godwit.host import unixsocket

from . import messages as codec
from .stream import Line

#: A peer that says nothing for so long is gone, seconds.
SILENCE = 10.0
_BUFFER = 1 << 20
_SO_SNDBUFFORCE = 32  # beyond wmem_max, for root (asm-generic/socket.h)


class Address:
    """``unix:PATH`` or ``tcp:HOST:PORT``.

    Raises:
        ConfigError: neither; or ``tcp:`` beyond this host without ``insecure``, because the stream
            is neither encrypted nor authenticated.
    """

    def __init__(self, uri: str, insecure: bool) -> None:
        self.uri = uri
        scheme, _, rest = uri.partition(":")
        self.path: str | None = None
        self.host, self.port = "", 0
        if scheme == "unix" and rest:
            self.path = rest
            return
        host, _, port = rest.rpartition(":")
        if scheme != "tcp" or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"migration address '{uri}'; unix:PATH, tcp:HOST:PORT or file:PATH, please"
            )
        self.host, self.port = host.strip("[]"), int(port)
        if not insecure and not _loopback(self.host):
            raise ConfigError(
                f"'{uri}' leaves this host, and the stream is neither encrypted nor "
                "authenticated: whoever reads it has the guest's memory. Say --insecure on a "
                "network that you trust"
            )

    def listen(self) -> socket.socket:
        """A listening socket.

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

    def connect(self, timeout: float = SILENCE) -> Channel:
        """A line to who listens there.

        Raises:
            LinkLost: nobody does (its cause is the OSError).
        """
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
        return Channel(sock)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    import ipaddress  # here: it is slow to import, and most addresses never come this far

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Channel(Line):
    """Frames on a connected socket. One thread sends, one receives; either may close."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        # Blocking, with the kernel's own time-outs: a whole frame is then one call each way, where
        # Python's would poll before each piece.
        sock.setblocking(True)
        self.set_timeout(SILENCE)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            # TCP tunes its buffers itself; a Unix socket's default holds fifty pages.
            try:
                sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    def fileno(self) -> int:
        """To wait for it among others."""
        return self._sock.fileno()

    def set_timeout(self, seconds: float) -> None:
        """How long a silent peer is waited for."""
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send the bytes of all parts, without copying them first. Raises LinkLost."""
        try:
            self._in_pieces(parts, self._sock.sendmsg)
        except OSError as error:
            raise _lost(error) from error

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views``. Raises LinkLost."""
        left = [view for view in views if len(view)]
        try:
            while left:
                got = self._sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
                if not got:
                    raise LinkLost("the peer closed the line")
                while left and got >= len(left[0]):
                    got -= len(left.pop(0))
                if got:
                    left[0] = left[0][got:]
        except OSError as error:
            raise _lost(error) from error

    def read_some(self, most: int) -> bytes:
        """What is there, at most so many bytes, once poll says so. Raises LinkLost."""
        try:
            data = self._sock.recv(most, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise _lost(error) from error
        if not data:
            raise LinkLost("the peer closed the line")
        return data

    def as_seen(self, handover: bool = False) -> codec.Welcome:
        """How this end, the destination's, sees the line."""
        near, far = self._ends()
        return codec.Welcome(os.getpid(), near, far, handover)

    def is_direct(self, seen: codec.Welcome) -> bool:
        """Whether nothing stands between the two ends, by what the other end has seen."""
        if self._sock.family == socket.AF_UNIX:
            size = struct.calcsize("3i")
            pid, _, _ = struct.unpack(
                "3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            )
            return bool(pid == seen.pid)
        return self._ends() == (seen.far, seen.near)

    def _ends(self) -> tuple[str, str]:
        if self._sock.family == socket.AF_UNIX:
            return "", ""
        near, far = self._sock.getsockname(), self._sock.getpeername()
        return f"{near[0]} {near[1]}", f"{far[0]} {far[1]}"

    def interrupt(self) -> None:
        """Make whoever waits on the line give up, from any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def stop_receiving(self) -> None:
        """Make whoever waits for a frame here give up, from any thread; sending goes on."""
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass

    def close(self) -> None:
        """Give the socket back."""
        self._sock.close()


def _lost(error: OSError) -> LinkLost:
    if isinstance(error, (BlockingIOError, TimeoutError)):
        return LinkLost(f"the peer was silent for {SILENCE:.0f} s")
    return LinkLost(f"the line broke: {error.strerror or error}")
