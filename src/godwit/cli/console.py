"""``godwit console``: a terminal, or a pair of pipes, at a vsock port of a guest."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from godwit.client.qmp import Client
from godwit.errors import ConfigError, HostError

from .keyboard import ESCAPE

_CHUNK = 1 << 16
#: Bytes read ahead of their reader, so that the escape is found behind them.
_AHEAD = 1 << 20
#: A pipe that is writable takes so many bytes without a wait (pipe(7), PIPE_BUF).
_PIECE = 4096
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
    if cids[0] is None:
        raise ConfigError(f"the VM at '{qmp}' waits for its guest, and has no CID so far")
    if sys.stdin is None or sys.stdout is None:
        raise ConfigError("there is no standard input or output; give both, /dev/null too")
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    with _connected(int(cids[0]), port) as stream, _raw(source) as terminal:
        if terminal:
            print("ctrl-] leaves", file=sys.stderr, end="\r\n")
        carry(stream, source, sink, escape=terminal)
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

    The end of ``source`` is passed on, and what the guest still says is waited for. Each way waits
    for itself alone.
    """
    stream.setblocking(False)
    there, here = Way(source, stream.fileno()), Way(stream.fileno(), sink)
    while not here.over:
        reads = [way.source for way in (there, here) if way.reads]
        writes = [way.sink for way in (there, here) if way.waiting]
        readable, writable, _ = select.select(reads, writes, [])
        if source in readable:
            there.read()
            if escape and ESCAPE in there.waiting:
                return
        if stream.fileno() in readable:
            here.read()
        for way in (there, here):
            if way.waiting and way.sink in writable:
                way.write()
        if there.over and not there.told:
            there.told = True
            with suppress(OSError):  # it has gone already
                stream.shutdown(socket.SHUT_WR)


class Way:
    """One direction of a carrier, with the bytes that were read and not written."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.waiting = bytearray()
        self.ended = self.told = False

    @property
    def reads(self) -> bool:
        """True while there may be more to read, and space for more."""
        return not self.ended and len(self.waiting) < _AHEAD

    @property
    def over(self) -> bool:
        """True once the source has ended and all is written, or the sink is gone."""
        return self.ended and not self.waiting

    def read(self) -> None:
        """Read some bytes, and take an error for the end."""
        try:
            data = os.read(self.source, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # as a migration resets the connection, and a terminal hangs up
        self.waiting += data
        self.ended = not data

    def write(self) -> None:
        """Write some bytes, and end this way where nobody takes them."""
        try:
            del self.waiting[: os.write(self.sink, self.waiting[:_PIECE])]
        except BlockingIOError:
            pass
        except OSError:
            self.waiting.clear()
            self.ended = True
