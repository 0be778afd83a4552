"""Addresses of migrations: how they are written, listened on and connected to."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from godwit.errors import ConfigError, HostError, LinkLost
from godwit.host import sandbox, unixsocket
from godwit.migration.times import TIMES, Times

from .sockets import SocketConnection

if TYPE_CHECKING:
    from .tls import Tls

#: Bytes of the longest address: a path has 107 at the most, a host's name 253.
_LONGEST = 512


class Credentials(NamedTuple):
    """The proofs by which the two ends of a migration know each other, beside a socket's owner."""

    tls: Tls | None = None
    #: What both ends were given: see :mod:`.secret`.
    secret: bytes | None = None


NONE = Credentials()


class Address:
    """An address of a migration, ``unix:PATH``, ``tls:HOST:PORT`` or ``tcp:HOST:PORT``.

    Raises:
        ConfigError: none of them; ``tls:`` without certificates; or ``tcp:`` beyond this host
            without ``insecure``, because the stream is not encrypted.
    """

    def __init__(
        self, uri: str, insecure: bool, times: Times = TIMES, credentials: Credentials = NONE
    ) -> None:
        self.uri = uri if len(uri) <= _LONGEST else uri[:80] + "…"
        self._times = times
        self._insecure = insecure
        self._secret = credentials.secret
        self._tls: Tls | None = None
        scheme, _, rest = uri.partition(":")
        self.path: str | None = None
        self.host, self.port = "", 0
        if scheme == "unix" and rest and len(uri) <= _LONGEST:
            self.path = rest
            if "\0" in rest or not _encodable(rest):
                raise ConfigError(f"migration address {uri!r}: no socket can have that path")
            return
        host, _, port = rest.rpartition(":")
        if not (
            len(uri) <= _LONGEST
            and scheme in ("tcp", "tls")
            and host
            and port.isascii()
            and port.isdecimal()
            and 0 < int(port) < 65536
        ):
            raise ConfigError(
                f"migration address {self.uri!r}; give unix:PATH, tls:HOST:PORT, tcp:HOST:PORT or "
                "file:PATH"
            )
        self.host, self.port = host.strip("[]"), int(port)
        # A name in another script is written in its ASCII form (xn--...), as the resolver has it.
        if not self.host.isascii() or not self.host.isprintable():
            raise ConfigError(f"migration address {uri!r}: no host has that name")
        if scheme == "tls":
            if credentials.tls is None:
                raise ConfigError(
                    f"'{uri}' needs certificates: start both VMs with --tls DIR "
                    "('godwit pki' makes some)"
                )
            self._tls = credentials.tls
        elif not insecure and not _loopback(self.host):
            raise ConfigError(
                f"'{uri}' leaves this host, and the stream is neither encrypted nor "
                "authenticated: whoever reads it has the guest's memory. Use tls:, or give "
                "--insecure on a network that you trust"
            )

    @property
    def secret(self) -> bytes | None:
        """The secret shared with the other end, or None."""
        return self._secret

    def listen(self) -> socket.socket:
        """Return a socket listening at this address.

        Raises:
            ConfigError, HostError: the address cannot be had.
        """
        if self.path is not None:
            return unixsocket.listen(self.path, "migration")
        try:
            family, *_, end = socket.getaddrinfo(self.host.encode(), self.port)[0]
            return socket.create_server(end[:2], family=family)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot listen on '{self.uri}': {error}") from error

    def connect(
        self,
        timeout: float | None = None,
        given_up: Callable[[], bool] = lambda: False,
        on_open: Callable[[SocketConnection], None] = lambda connection: None,
    ) -> SocketConnection:
        """Return a connection to the listener there, each end of which knows the other.

        ``on_open`` gets the connection before the other end is waited for, to give it up; until
        then ``given_up()`` is asked.

        Raises:
            LinkLost: nobody listens (its cause is the OSError).
            HostError, PeerRefused, StreamError: the listener is not the one that was meant, or
                knows another secret.
        """
        timeout = self._times.silence if timeout is None else timeout
        failed: Exception = OSError(errno.EADDRNOTAVAIL, "the name has no address")
        for family, end in self._ends():
            sock = unixsocket.make() if self.path is not None else socket.socket(family)
            connection: SocketConnection | None = None
            try:
                self._reach(sock, end, self._times.now() + timeout, given_up)
                connection = self._connection(sock, server=False)
                on_open(connection)
                break
            except OSError as error:
                sock.close()
                failed = error
        else:
            hint = sandbox.hint(failed) if isinstance(failed, OSError) else ""
            raise LinkLost(f"cannot reach '{self.uri}': {failed}{hint}") from failed
        try:
            self.check_peer(connection, listener=True)
            connection.handshake()
            if self._secret is not None:
                from . import secret

                secret.prove(connection, self._secret)
        except BaseException:
            connection.close()
            raise
        return connection

    def _ends(self) -> list[tuple[int, Any]]:
        """Return the (family, address) pairs to try, in order.

        Raises:
            LinkLost: the host's name is not known.
        """
        if self.path is not None:
            return [(socket.AF_UNIX, self.path)]
        try:
            # As bytes: for text Python loads its tables of international names.
            found = socket.getaddrinfo(self.host.encode(), self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise LinkLost(f"cannot reach '{self.uri}': {error}") from error
        return [(family, end) for family, *_, end in found]

    def _reach(
        self, sock: socket.socket, end: Any, until: float, given_up: Callable[[], bool]
    ) -> None:
        """Connect a socket by ``until``, in steps between which the migration may be given up.

        Raises:
            OSError: nobody listens, or the migration was given up.
        """
        sock.setblocking(False)
        while (result := sock.connect_ex(end)) not in (0, errno.EISCONN):
            if result not in (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN):
                raise OSError(result, os.strerror(result))
            if given_up() or self._times.now() >= until:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            poll = select.poll()
            # A full queue of a Unix socket (EAGAIN) is no event: a moment, then.
            poll.register(sock, 0 if result == errno.EAGAIN else select.POLLOUT)
            poll.poll(50 if result == errno.EAGAIN else 250)

    def accepted(self, sock: socket.socket) -> SocketConnection:
        """Return the connection on an accepted socket."""
        return self._connection(sock, server=True)

    def _connection(self, sock: socket.socket, server: bool) -> SocketConnection:
        if self._tls is None:
            return SocketConnection(sock, self._times)
        return self._tls.connection(sock, self._times, None if server else self.host)

    def check_peer(self, connection: SocketConnection, listener: bool = False) -> None:
        """Refuse a process of another user: at a Unix socket, and at a port of this host.

        A certificate or secret says more, and so does the operator's word that the network can be
        trusted.

        Raises:
            HostError: the process at the other end runs as another user.
        """
        if self._tls is not None or self._secret or (self.path is None and self._insecure):
            return
        uid = connection.peer_uid(listener)
        if uid not in (0, os.geteuid()):
            who = "an unknown user" if uid is None else f"user {uid}"
            raise HostError(
                f"the process at the other end of '{self.uri}' runs as {who}, this one as user "
                f"{os.geteuid()}; run both as one user, or give both the same --migration-secret"
            )


def _encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeError:
        return False
    return True


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    for family, most in ((socket.AF_INET, 8), (socket.AF_INET6, 128)):
        try:
            raw = socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        own = b"\x7f\0\0\1" if family == socket.AF_INET else bytes(15) + b"\1"
        return raw[: most // 8] == own[: most // 8]
    return False
