"""A QMP server in a loop in a thread, and a client without manners, for the tests of both."""

import json
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from godwit.errors import ConfigError
from godwit.host.loop import Loop
from godwit.qmp.server import Server
from godwit.spec.runstate import RunState, RunStates

DEADLINE = 20.0


class Vm:
    """A loop in a thread with a server in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[BaseException] = []
        self.states = RunStates(RunState.RUNNING)
        self.loop = Loop(self.errors.append)
        self.server = Server(self.loop, path, self.execute, self.errors.append)
        self.states.listen(self.server.run_state_changed)
        self.thread = threading.Thread(target=self.loop.run)

    def __enter__(self) -> "Vm":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()
        self.thread.join(DEADLINE)
        self.server.close()
        self.loop.close()

    def execute(self, name: str, arguments: Mapping[str, object]) -> object:
        match name:
            case "stop":
                self.states.set(RunState.PAUSED)
            case "quit":
                self.loop.stop()
            case "fail":
                raise ConfigError("it is wrong")
            case "big":
                return "x" * int(str(arguments["size"]))
        return {"did": name}

    def call(self, work: Callable[[], object]) -> None:
        """Do ``work`` in the loop's thread and wait until it is done."""
        done = threading.Event()
        self.loop.call_soon(lambda: (work(), done.set()))
        assert done.wait(DEADLINE)


class Raw:
    """A client without manners."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(path))
        self._file = self.sock.makefile("rb")
        self.greeting = self.read()
        if negotiate:
            self.send({"execute": "qmp_capabilities"})
            assert self.read() == {"return": {}}

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.sock.close()

    def send(self, message: object) -> None:
        self.sock.sendall(json.dumps(message).encode())

    def read(self) -> Any:
        """The next message; None at the end of the connection."""
        line = self._file.readline()
        return json.loads(line) if line else None
