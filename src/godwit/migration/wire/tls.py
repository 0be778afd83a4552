"""Connections by TLS 1.3, both ends of which have a certificate of one authority.

Imported only by a VM that was given certificates: Python's ssl takes longer than the rest of a
start. An :class:`ssl.SSLSocket` must not be used by two threads at once (CPython up to 3.12 has no
lock of its own there), so each call is made without waiting, under a lock, and the waiting is done
outside.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import ssl
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from godwit.errors import ConfigError, LinkLost
from godwit.migration.times import Times

from .sockets import SocketConnection

#: Bytes encrypted by one call: small pieces are put together up to this.
_GATHER = 128 << 10
_SMALL = 16 << 10
_WANTS = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Tls:
    """The certificates in ``folder``: ``ca.pem``, ``cert.pem`` and ``key.pem``.

    ``peers``: names, or SHA-256 fingerprints as ``sha256:HEX``, one of which the other end's
    certificate must have; without any, a destination takes each certificate of the authority, and
    a source the one with the name of the host that it connects to.

    Attributes:
        server, client: the contexts of this host's end, as a destination and as a source.

    Raises:
        ConfigError: a file is missing, is no certificate or key, or the key is open to others.
    """

    def __init__(self, folder: str, peers: Iterable[str] = ()) -> None:
        self._peers = [_peer(peer) for peer in peers]
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER, Path(folder))
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, Path(folder))

    @staticmethod
    def _context(protocol: int, folder: Path) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # here, with fingerprints and several names
        context.verify_mode = ssl.CERT_REQUIRED
        key = folder / "key.pem"
        try:
            if stat.S_IMODE(key.stat().st_mode) & 0o077:
                raise ConfigError(f"--tls: others can read '{key}'; do 'chmod 600 {key}'")
            context.load_verify_locations(folder / "ca.pem")
            context.load_cert_chain(folder / "cert.pem", key, password="")
        except ssl.SSLError as error:
            raise ConfigError(
                f"--tls {folder}: ca.pem, cert.pem and key.pem do not make a pair of certificate "
                f"and key ({error.reason or error}); 'godwit pki' makes such"
            ) from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"--tls {folder!s}: {reason}; there have to be ca.pem, cert.pem and key.pem "
                "('godwit pki' makes them)"
            ) from error
        return context

    def connection(self, sock: socket.socket, times: Times, host: str | None) -> TlsConnection:
        """Return the connection on a socket: to ``host``, or from a source (None)."""
        context = self.server if host is None else self.client
        sock.setblocking(False)
        try:
            wrapped = context.wrap_socket(
                sock, server_side=host is None, do_handshake_on_connect=False
            )
        except OSError as error:
            sock.close()
            raise LinkLost(f"TLS: {error}") from error
        wanted = self._peers or ([] if host is None else [_peer(host)])
        return TlsConnection(wrapped, times, wanted)


class TlsConnection(SocketConnection):
    """A connection on a TLS socket, whose peer has a certificate with one of ``peers``, if any."""

    def __init__(self, sock: ssl.SSLSocket, times: Times, peers: list[str]) -> None:
        self._tls = sock
        self._peers = peers
        self._lock = threading.Lock()
        self._ready = False
        super().__init__(sock, times)

    def _set_up(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handshake(self) -> None:
        """Make keys with the peer, and check the peer's certificate.

        Raises:
            LinkLost: the peer is another than it should be, or does not take this end's
                certificate.
        """
        self.begin()
        until = self._times.now() + self._silence
        while not self.ready():
            left = until - self._times.now()
            if left <= 0:
                raise LinkLost(f"TLS: the peer was silent for {self._silence:g} s")
            self._poll(select.POLLIN, min(left, 0.25))

    def ready(self) -> bool:
        """Go on with the handshake without waiting, and return whether it is over.

        Raises:
            LinkLost: as :meth:`handshake`.
        """
        if not self._ready:
            try:
                with self._lock:
                    self._tls.do_handshake()
            except _WANTS:
                return False
            except OSError as error:
                raise LinkLost(f"TLS: {_reason(error)}") from error
            self._check_peer()
            self._ready = True
        return True

    def _check_peer(self) -> None:
        if not self._peers:
            return
        raw = self._tls.getpeercert(binary_form=True) or b""
        found = {"sha256:" + hashlib.sha256(raw).hexdigest()}
        names: Any = (self._tls.getpeercert() or {}).get("subjectAltName", ())
        found |= {_peer(str(value)) for kind, value in names if kind in ("DNS", "IP Address")}
        if not found & set(self._peers):
            shown = ", ".join(sorted(found - {""}))
            raise LinkLost(
                f"TLS: the peer's certificate is for {shown[:400]}, and not for "
                f"{' or '.join(self._peers)[:400]}; name it with --tls-peer, or make another"
            )

    # --- bytes ------------------------------------------------------------------------------------
    def read_some(self, most: int) -> bytes:
        """Return the bytes that are here, without waiting.

        Raises:
            LinkLost: the connection broke.
        """
        if not self.ready():
            return b""
        try:
            with self._lock:
                data = self._tls.recv(most)
        except _WANTS:
            return b""
        except OSError as error:
            raise LinkLost(f"the connection broke: {_reason(error)}") from error
        if not data:
            raise LinkLost("the peer closed the connection")
        return data

    def wait(self, timeout: float, others: Iterable[int] = ()) -> tuple[bool, set[int]]:
        """Wait for bytes or other descriptors, of bytes that were decrypted already, too."""
        with self._lock:
            pending = self._tls.fileno() >= 0 and self._tls.pending() > 0
        ready, fds = super().wait(0.0 if pending else timeout, others)
        return ready or pending, fds

    def _shut_down(self, how: int) -> None:
        # Not SSLSocket's, which forgets its keys with that: what is sent then is sent in clear.
        with suppress(OSError):  # closed by the peer already
            socket.socket.shutdown(self._tls, how)

    def _send_some(self, left: list[bytes | memoryview], timeout: float) -> int:
        # OpenSSL reports nothing until all of a piece is on its way.
        data = left[0][:_GATHER]
        if len(data) < _SMALL and len(left) > 1:
            gathered = bytearray()
            for part in left:
                gathered += part[: _GATHER - len(gathered)]
                if len(gathered) >= _GATHER:
                    break
            data = memoryview(gathered)
        try:
            with self._lock:
                return self._tls.send(data)
        except ssl.SSLWantReadError:
            self._poll(select.POLLIN, timeout)
        except ssl.SSLWantWriteError:
            self._poll(select.POLLOUT, timeout)
        raise BlockingIOError

    def _receive_some(self, left: list[bytes | memoryview], timeout: float) -> int:
        done = 0
        try:
            for view in left:
                assert isinstance(view, memoryview)
                with self._lock:
                    got = self._tls.recv_into(view)
                if not got:
                    break
                done += got
                if got < len(view):
                    return done
        except ssl.SSLWantReadError:
            if not done:
                self._poll(select.POLLIN, timeout)
                raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            if not done:
                self._poll(select.POLLOUT, timeout)
                raise BlockingIOError from None
        if not done:
            raise LinkLost("the peer closed the connection")
        return done

    def _poll(self, events: int, timeout: float) -> None:
        poll = select.poll()
        poll.register(self._tls, events)
        poll.poll(max(0.0, timeout) * 1000)


def _peer(text: str) -> str:
    kind, colon, rest = text.lower().partition(":")
    if colon and kind == "sha256":
        digits = rest.replace(":", "")
        if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
            raise ConfigError(f"--tls-peer {text}: a SHA-256 fingerprint has 64 hexadecimal digits")
        return f"sha256:{digits}"
    for family in (socket.AF_INET, socket.AF_INET6):
        # An IPv6 address has several spellings, and Python's certificates another one.
        with suppress(OSError, ValueError):
            return socket.inet_ntop(family, socket.inet_pton(family, text.strip("[]")))
    return text.lower()


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return os.strerror(error.errno) if error.errno else str(error)
