"""The rate at which RAM goes through TLS: Godwit's messages against a plain loop of Python's ssl.

::

    python -m benchmarks.tls_rate

Two processes, one connection within the host, the same certificates (made by ``godwit pki``),
taking turns. RAM is sent in runs of a page, of 64 KiB and of 8 MiB, as a migration's messages are.
Both cost what the cipher costs, and the question is what Godwit adds.
"""

import mmap
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from godwit.cli.pki import pki
from godwit.migration.times import TIMES
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.tls import Tls

_SIZE = 256 << 20
_CHUNK = 8 << 20
_RUNS = (4096, 64 << 10, 8 << 20)
_TURNS = 5

_Half = Callable[[socket.socket], None]


def _between(server: _Half, client: _Half) -> float:
    """Return MB/s from another process's ``client`` to this one's ``server``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if not child:
            try:
                client(socket.create_connection(listener.getsockname()))
            finally:
                os._exit(0)
        near = listener.accept()[0]
        began = time.perf_counter()
        server(near)
        seconds = time.perf_counter() - began
        near.close()
        os.waitpid(child, 0)
        return _SIZE / seconds / 1e6


def _godwit(tls: Tls, ram: memoryview, run: int) -> float:
    def server(sock: socket.socket) -> None:
        connection = tls.connection(sock, TIMES, None)
        connection.handshake()
        target = memoryview(mmap.mmap(-1, _SIZE))
        done = 0
        while done < _SIZE:
            length = connection.receive()[1]
            connection.read_into([target[done : done + length]])
            done += length
        connection.send(Kind.READY)

    def client(sock: socket.socket) -> None:
        connection = tls.connection(sock, TIMES, "127.0.0.1")
        connection.handshake()
        for start in range(0, _SIZE, _CHUNK):
            views = [ram[at : at + run] for at in range(start, start + _CHUNK, run)]
            connection.send_parts([messages.header(Kind.RAM, _CHUNK), *views])
        connection.expect(Kind.READY)

    return _between(server, client)


def _plain(tls: Tls, ram: memoryview) -> float:
    def server(sock: socket.socket) -> None:
        wrapped = tls.server.wrap_socket(sock, server_side=True)
        target = memoryview(mmap.mmap(-1, _SIZE))
        done = 0
        while done < _SIZE:
            done += wrapped.recv_into(target[done:])
        wrapped.sendall(b"x")

    def client(sock: socket.socket) -> None:
        wrapped = tls.client.wrap_socket(sock)
        wrapped.sendall(ram)
        wrapped.recv(1)

    return _between(server, client)


def main() -> None:
    """Measure by turns, and print the medians."""
    ram = memoryview(mmap.mmap(-1, _SIZE))
    ram[:] = os.urandom(1 << 20) * (_SIZE >> 20)
    with tempfile.TemporaryDirectory() as folder:
        pki(folder, ["127.0.0.1"])
        tls = Tls(str(Path(folder) / "127.0.0.1"))
        for run in _RUNS:
            pairs = [(_plain(tls, ram), _godwit(tls, ram, run)) for _ in range(_TURNS)]
            plain, own = (median(pair[side] for pair in pairs) for side in (0, 1))
            ratio = median(mine / theirs for theirs, mine in pairs)
            print(
                f"runs of {run >> 10:5} KiB: plain ssl {plain:5.0f} MB/s, Godwit {own:5.0f} MB/s, "
                f"ratio {ratio:.2f} (median of {_TURNS} pairs)"
            )


if __name__ == "__main__":
    main()
