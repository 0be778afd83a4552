"""The QMP of a qemu-storage-daemon, by which images are opened and closed while it runs."""

from __future__ import annotations

import socket
import time

import msgspec

from godwit.errors import HostError

#: How long a command may take, of which closing an image flushes it, seconds.
_ANSWER_S = 20.0
#: Bytes at once, and of a line: a description of a few nodes has some KiB.
_MOST, _LONGEST = 1 << 16, 1 << 20


class _Failed(msgspec.Struct, frozen=True):
    desc: str = ""


class _Answer(msgspec.Struct, frozen=True):
    """A line of the daemon's: an answer with its command's id, or a greeting or event with none."""

    returned: msgspec.Raw = msgspec.field(default=msgspec.Raw(b"null"), name="return")
    error: _Failed | None = None
    id: object = None


class _Node(msgspec.Struct, frozen=True):
    """A node in an answer of the daemon's."""

    name: str = msgspec.field(default="", name="node-name")


_decode = msgspec.json.Decoder(_Answer).decode
_decode_nodes = msgspec.json.Decoder(list[_Node]).decode


class StorageDaemon:
    """A connection to the daemon's monitor, which is closed with it.

    The daemon does one command after the other. One that was not answered in time may still be
    done, but never once a later one is answered.

    Attributes:
        silent: the last command was not answered.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._read = b""
        self._introduced = False
        self._last = 0
        self.silent = False

    def nodes(self) -> set[str]:
        """Return the names of all nodes, once all earlier commands are done.

        Raises:
            HostError: as :meth:`execute`.
        """
        answer = self.execute("query-named-block-nodes", flat=True)
        try:
            return {node.name for node in _decode_nodes(answer)}
        except msgspec.MsgspecError as error:
            raise HostError(f"qemu-storage-daemon answered with no nodes: {error}") from error

    def execute(self, command: str, **arguments: object) -> msgspec.Raw:
        """Have a command done, whose arguments have the names of QMP with '_' for '-'.

        Raises:
            HostError: the daemon refuses, or is silent, by which the command may be done later, or
                has ended.
        """
        if not self._introduced:
            self._introduced = True
            self.execute("qmp_capabilities")
        self._last += 1
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "arguments": given, "id": self._last}
        self.silent = True
        try:
            self._send(msgspec.json.encode(request) + b"\n")
            answer = self._answer(time.monotonic() + _ANSWER_S)
        except (OSError, msgspec.MsgspecError) as error:
            if not isinstance(error, TimeoutError):
                self.close()
            raise HostError(f"qemu-storage-daemon does not answer {command}: {error}") from error
        self.silent = False
        if answer.error is not None:
            raise HostError(answer.error.desc)
        return answer.returned

    def _send(self, line: bytes) -> None:
        self._connection.settimeout(_ANSWER_S)
        try:
            self._connection.sendall(line)
        except TimeoutError as error:
            raise OSError("it takes no commands") from error  # a part of one may be sent

    def _answer(self, until: float) -> _Answer:
        """Return the answer to the last command, and drop late ones to others."""
        while True:
            line, end, rest = self._read.partition(b"\n")
            if end:
                self._read = rest
                answer = _decode(line)
                if answer.id == self._last:
                    return answer
                continue
            self._connection.settimeout(max(0.001, until - time.monotonic()))
            more = self._connection.recv(_MOST)
            if not more or len(self._read) > _LONGEST:
                raise OSError("it has ended" if not more else "its line is too long")
            self._read += more

    def close(self) -> None:
        """Close the connection, unless closed already."""
        self._connection.close()
