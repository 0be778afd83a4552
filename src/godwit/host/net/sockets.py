"""The user of the process at the other end of a TCP connection within this host.

/proc/net/tcp and tcp6 (proc_pid_net(5)): a line a socket, of this network namespace.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import suppress

_LISTEN = "0A"


def owner_of_peer(sock: socket.socket, listener: bool) -> int | None:
    """Return the user whose socket is the other end, or None outside this namespace.

    With ``listener`` the other end listened: a connection nobody has accepted yet belongs to who
    listens at just that address, or else at all of them.

    Raises:
        OSError: the connection is gone, or the tables cannot be read.
    """
    near, far = sock.getsockname(), sock.getpeername()
    wanted = _written(sock.family, far), _written(sock.family, near)
    port = wanted[0].rpartition(":")[2]
    exact: set[int] = set()
    everywhere: set[int] = set()
    for name in ("tcp", "tcp6"):
        for local, remote, state, uid, inode in _lines(name):
            if (local, remote) == wanted and inode != "0":
                return uid
            address, _, at = local.rpartition(":")
            if state == _LISTEN and at == port:
                if local == wanted[0]:
                    exact.add(uid)
                elif not address.strip("0"):
                    everywhere.add(uid)
    # The kernel prefers the listener at the exact address. Two users are nobody that is known.
    users = exact or everywhere
    return users.pop() if listener and len(users) == 1 else None


def _lines(name: str) -> Iterator[tuple[str, str, str, int, str]]:
    """Yield (local address, remote address, state, user, inode) of each socket of a table."""
    # As bytes: in its sandbox a process may not find its codecs any more.
    with suppress(FileNotFoundError), open(f"/proc/self/net/{name}", "rb") as table:
        next(table)
        for line in table:
            fields = line.decode("latin-1").split()
            yield fields[1], fields[2], fields[3], int(fields[7]), fields[9]


def _written(family: int, end: tuple[str, int]) -> str:
    """Return an address as the tables write one: words in this machine's byte order."""
    raw = socket.inet_pton(family, end[0].partition("%")[0])
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    digits = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{digits}:{end[1]:04X}"
