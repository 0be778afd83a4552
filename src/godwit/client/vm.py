"""A ``godwit run`` process, as the demo, the tests and the benchmarks start it.

Another VMM's process is a subclass: see qemu.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from godwit.errors import GodwitError, HostError
from lab.guest import READY
from lab.netns import entering

from .qmp import Client


class Vm:
    """The process, its console and its QMP connection. Ends with the block.

    ``arguments`` go to ``godwit run``; ``netns`` is the namespace that it runs in.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: Sequence[str],
        netns: str | None = None,
    ) -> None:
        self.name = name
        self.qmp_path = folder / f"{name}.qmp"
        self.started = time.monotonic()
        self._text = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._client: Client | None = None
        self._process = subprocess.Popen(
            [*self._command(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=entering(netns) if netns else None,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _command(self) -> list[str]:
        """What is run, up to the caller's arguments."""
        return [sys.executable, "-m", "godwit.cli.main", "run", "--qmp", str(self.qmp_path)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            error.add_note(f"{self.name} printed:\n{self.console[-2000:]}")
        self.close()

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def console(self) -> str:
        """What it printed so far: the guest's console, and its own messages."""
        with self._changed:
            return self._text.decode(errors="replace")

    @property
    def qmp(self) -> Client:
        """The QMP connection; waits for the socket."""
        if self._client is None:
            end = time.monotonic() + 60
            while not self.qmp_path.exists() and not self._ended and time.monotonic() < end:
                time.sleep(0.05)  # a look is cheap, an attempt to connect is not
            self._client = Client.connect(self.qmp_path, 10.0, retry=True)
        return self._client

    def wait_console(self, text: str, deadline: float = 60.0) -> str:
        """Wait until ``text`` was printed; all that was printed.

        Raises:
            HostError: it was not, in ``deadline`` seconds, or the process ended before.
        """
        sought = text.encode()
        with self._changed:
            self._changed.wait_for(lambda: sought in self._text or self._ended, deadline)
            if sought not in self._text:
                raise HostError(
                    f"{self.name}: no {text!r} within {deadline:g} s; it printed:\n"
                    + self._text.decode(errors="replace")[-4000:]
                )
            return self._text.decode(errors="replace")

    def wait_ready(self, deadline: float = 60.0) -> float:
        """Wait until the guest's agent listens; seconds since the process was started."""
        self.wait_console(READY, deadline)
        return time.monotonic() - self.started

    def status(self) -> str:
        """The run state."""
        return str(self.qmp.execute("query-status")["status"])

    def move(self, uri: str, insecure: bool = True, deadline: float = 60.0) -> dict[str, Any]:
        """Migrate and wait for the end; query-migrate's answer.

        Raises:
            HostError: no end within ``deadline`` seconds.
        """
        self.start_move(uri, insecure)
        return self.wait_move(deadline)

    def start_move(self, uri: str, insecure: bool = True) -> None:
        """Begin to migrate."""
        self.qmp.execute("migrate", {"uri": uri, "insecure": insecure})

    def wait_move(self, deadline: float = 60.0) -> dict[str, Any]:
        """Wait for the end of the move that was started; query-migrate's answer."""
        ends = ("completed", "failed", "cancelled")
        self.qmp.wait_event("MIGRATION", deadline, lambda data: data["status"] in ends)
        return dict(self.qmp.execute("query-migrate"))

    def wait(self, deadline: float = 30.0) -> int:
        """Wait for the process' end; its exit code."""
        code = self._process.wait(deadline)
        with self._changed:
            self._changed.wait_for(lambda: self._ended, deadline)
        return code

    def quit(self) -> int:
        """End it by QMP; its exit code."""
        self.qmp.execute("quit")
        return self.wait()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(10)

    def close(self) -> None:
        """End it in any case."""
        if self._client is not None:
            try:
                self._client.close()
            except GodwitError:
                pass
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def _read(self) -> None:
        stream = self._process.stdout
        if stream is None:
            return
        while data := os.read(stream.fileno(), 65536):
            with self._changed:
                self._text += data
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
