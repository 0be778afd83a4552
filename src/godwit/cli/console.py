"""``godwit console``: a terminal, or a pair of pipes, at a vsock port of a guest."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from godwit.client.qmp import Client
from godwit.errors import ConfigError, HostError

from .keyboard import ESCAPE

_CHUNK = 1 << 16
#: How long a guest may take to accept, seconds.
_CONNECT_S = 10.0


def console(qmp: str, port: int) -> int:
    """Carry bytes between this terminal and a guest's vsock port, and return 0 at either's end.

    Raises:
        ConfigError: the VM has no vsock.
        HostError: nobody listens there in the guest.
        ClientError: the VM does not answer.
    """
    with Client.connect(qmp) as client:
        devices = client.execute("query-devices")
    cids = [d["properties"]["cid"] for d in devices if d["kind"] == "virtio-vsock"]
    if not cids:
        raise ConfigError(f"the VM at '{qmp}' has no vsock; start it with --vsock cid=auto")
    with _connected(int(cids[0]), port) as stream, _raw(sys.stdin.fileno()) as terminal:
        if terminal:
            print("ctrl-] leaves", file=sys.stderr, end="\r\n")
        carry(stream, sys.stdin.fileno(), sys.stdout.fileno(), escape=terminal)
    return 0


@contextmanager
def _connected(cid: int, port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stream:
        stream.settimeout(_CONNECT_S)
        try:
            stream.connect((cid, port))
        except OSError as error:
            raise HostError(
                f"CID {cid}, port {port}: {error.strerror or error}; something has to listen there "
                "in the guest, as sshd or an agent"
            ) from error
        stream.settimeout(None)
        yield stream


@contextmanager
def _raw(fd: int) -> Iterator[bool]:
    """Have a terminal pass each key on, and yield whether ``fd`` is one."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def carry(stream: socket.socket, source: int, sink: int, *, escape: bool) -> None:
    """Carry bytes both ways until the guest ends, or with ``escape`` until ctrl-] is typed.

    The end of ``source`` is passed on, and what the guest still says is waited for.
    """
    fds = [stream.fileno(), source]
    while True:
        ready = select.select(fds, [], [])[0]
        if stream.fileno() in ready:
            try:
                data = stream.recv(_CHUNK)
            except ConnectionResetError:
                return  # as a migration does
            if not data:
                return
            _write(sink, data)
        if source in ready:
            data = os.read(source, _CHUNK)
            if escape and ESCAPE in data:
                return
            try:
                if data:
                    stream.sendall(data)
                else:
                    fds.remove(source)
                    stream.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                    raise
                return


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
