"""The user of the process at the other end of a TCP connection within this host.

/proc/net/tcp and tcp6 (proc_pid_net(5)): a line a socket, of this network namespace.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import suppress

_LISTEN = "0A"


def owner_of_peer(sock: socket.socket) -> int | None:
    """Return the user whose socket is the other end, or None outside this namespace.

    A connection nobody has accepted yet belongs to the listener.

    Raises:
        OSError: the connection is gone.
    """
    near, far = sock.getsockname(), sock.getpeername()
    wanted = _written(sock.family, far), _written(sock.family, near)
    port = wanted[0].rpartition(":")[2]
    listeners: set[int] = set()
    for name in ("tcp", "tcp6"):
        for local, remote, state, uid, inode in _lines(name):
            if (local, remote) == wanted and inode != "0":
                return uid
            if state == _LISTEN and local.rpartition(":")[2] == port:
                listeners.add(uid)
    # Several listen at the port, at different addresses: none may be taken for another.
    return max(listeners, default=None)


def _lines(name: str) -> Iterator[tuple[str, str, str, int, str]]:
    """Yield (local address, remote address, state, user, inode) of each socket of a table."""
    with suppress(FileNotFoundError), open(f"/proc/self/net/{name}", encoding="ascii") as table:
        next(table)
        for line in table:
            fields = line.split()
            yield fields[1], fields[2], fields[3], int(fields[7]), fields[9]


def _written(family: int, end: tuple[str, int]) -> str:
    """Return an address as the tables write one: words in this machine's byte order."""
    raw = socket.inet_pton(family, end[0].partition("%")[0])
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    digits = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{digits}:{end[1]:04X}"
