"""The QMP of a qemu-storage-daemon, by which images are opened and closed while it runs."""

from __future__ import annotations

import socket
import time

import msgspec

from godwit.errors import HostError

#: How long a command may take, of which closing an image flushes it, seconds.
_ANSWER_S = 20.0
_LONGEST = 1 << 16


class _Failed(msgspec.Struct, frozen=True):
    desc: str = ""


class _Answer(msgspec.Struct, frozen=True):
    """A line of the daemon's: an answer, or a greeting or event, which is neither."""

    returned: object = msgspec.field(default=None, name="return")
    error: _Failed | None = None
    QMP: object = None
    event: str | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class StorageDaemon:
    """A connection to the daemon's monitor, which is closed with it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._read = b""
        self._introduced = False

    def execute(self, command: str, **arguments: object) -> None:
        """Have a command done, whose arguments have the names of QMP with '_' for '-'.

        Raises:
            HostError: the daemon refuses, is silent, or has ended.
        """
        if not self._introduced:
            self._introduced = True
            self.execute("qmp_capabilities")
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        until = time.monotonic() + _ANSWER_S
        try:
            self._connection.settimeout(_ANSWER_S)
            self._connection.sendall(
                msgspec.json.encode({"execute": command, "arguments": given}) + b"\n"
            )
            answer = self._answer(until)
        except (OSError, msgspec.MsgspecError) as error:
            self.close()  # an answer that comes later would be taken for the next one's
            raise HostError(f"qemu-storage-daemon does not answer {command}: {error}") from error
        if answer.error is not None:
            raise HostError(answer.error.desc)

    def _answer(self, until: float) -> _Answer:
        while True:
            line, end, rest = self._read.partition(b"\n")
            if end:
                self._read = rest
                answer = _decode(line)
                if answer.QMP is None and answer.event is None:
                    return answer
                continue
            self._connection.settimeout(max(0.001, until - time.monotonic()))
            more = self._connection.recv(_LONGEST)
            if not more or len(self._read) > _LONGEST:
                raise OSError("it has ended" if not more else "its line is too long")
            self._read += more

    def close(self) -> None:
        """Close the connection, unless closed already."""
        self._connection.close()
