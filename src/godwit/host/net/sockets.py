"""The user of the process at the other end of a TCP connection within this host.

/proc/net/tcp and tcp6 (proc_pid_net(5)): a line a socket, of this network namespace.
"""

from __future__ import annotations

import socket
import sys


def owner_of_peer(sock: socket.socket) -> int | None:
    """Return the user whose socket is the other end, or None if it is not of this namespace.

    Raises:
        OSError: the connection is gone.
    """
    near, far = sock.getsockname(), sock.getpeername()
    wanted = _written(sock.family, far), _written(sock.family, near)
    name = "tcp6" if sock.family == socket.AF_INET6 else "tcp"
    with open(f"/proc/self/net/{name}", encoding="ascii") as table:
        next(table)
        for line in table:
            fields = line.split()
            if (fields[1], fields[2]) == wanted and fields[9] != "0":  # an inode: not closed yet
                return int(fields[7])
    return None


def _written(family: int, end: tuple[str, int]) -> str:
    """Return an address as the tables write one: words in this machine's byte order."""
    raw = socket.inet_pton(family, end[0].partition("%")[0])
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    digits = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{digits}:{end[1]:04X}"
