"""A VM as a process of its own: start one, wait for one, migrate one, end one.

::

    with Vm("guest", Path("/run"), ["--kernel", kernel, "--nic", "tap=tap0"]) as vm:
        vm.qmp.wait_event("SHUTDOWN", 3600)

Another VMM's process, or one that is started in another way, is a subclass.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import VmGone
from .qmp import Client

__all__ = ["Vm", "VmGone"]

#: Bytes of the console that are kept, the newest: a guest may print as much as it likes.
MAX_CONSOLE = 64 << 20
_ENDS = ("completed", "failed", "cancelled")


class Vm:
    """The process of a VM, its console and its QMP connection, all of which end with the block.

    ``arguments`` go to ``godwit run``, whose QMP socket is made in ``folder`` and called after
    ``name``. ``env`` is the process' environment (None: this process's). ``preexec`` is called in
    the child before the program is, to enter a namespace, say.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
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
            env=env,
            preexec_fn=preexec,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _command(self) -> list[str]:
        """Return the command up to the caller's arguments."""
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
        """The id of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    @property
    def console(self) -> str:
        """The newest of what was printed: the guest's console, and the VMM's own messages."""
        with self._changed:
            return self._text.decode(errors="replace")

    @property
    def qmp(self) -> Client:
        """The QMP connection, for whose socket the first use waits."""
        if self._client is None:
            end = time.monotonic() + 60
            while not self.qmp_path.exists() and not self._ended and time.monotonic() < end:
                time.sleep(0.05)  # a look is cheap, an attempt to connect is not
            self._client = Client.connect(self.qmp_path, 10.0, retry=True)
        return self._client

    def wait_console(self, text: str, deadline: float = 60.0) -> str:
        """Wait until ``text`` was printed, and return all that was printed.

        Raises:
            VmGone: ``text`` was not printed in ``deadline`` seconds, or before the process exited.
        """
        sought = text.encode()
        with self._changed:
            self._changed.wait_for(lambda: sought in self._text or self._ended, deadline)
            if sought not in self._text:
                raise VmGone(
                    f"{self.name}: no {text!r} within {deadline:g} s; it printed:\n"
                    + self._text.decode(errors="replace")[-4000:]
                )
            return self._text.decode(errors="replace")

    def status(self) -> str:
        """Return the VM's run state."""
        return str(self.qmp.execute("query-status")["status"])

    def migrate(self, uri: str, insecure: bool = False, deadline: float = 60.0) -> dict[str, Any]:
        """Migrate the guest to ``uri``, wait for the end, and return query-migrate's answer.

        Raises:
            CommandRefused: the migration was not even started.
            VmGone: no end within ``deadline`` seconds.
        """
        self.start_migration(uri, insecure)
        return self.wait_migration(deadline)

    def start_migration(self, uri: str, insecure: bool = False) -> None:
        """Begin to migrate the guest, with ``insecure`` also to ``tcp:`` beyond this host.

        Raises:
            CommandRefused: the VM refused the migration.
        """
        self.qmp.execute("migrate", {"uri": uri, "insecure": insecure})

    def wait_migration(self, deadline: float = 60.0) -> dict[str, Any]:
        """Wait for the end of the migration that was begun, and return query-migrate's answer.

        Raises:
            VmGone: no end within ``deadline`` seconds.
        """
        self.qmp.wait_event("MIGRATION", deadline, lambda data: data.get("status") in _ENDS)
        return dict(self.qmp.execute("query-migrate"))

    def wait(self, deadline: float = 30.0) -> int:
        """Wait until the process has exited, and return its exit code.

        Raises:
            VmGone: the process still runs after ``deadline`` seconds.
        """
        try:
            code = self._process.wait(deadline)
        except subprocess.TimeoutExpired as error:
            raise VmGone(f"{self.name} has not exited within {deadline:g} s") from error
        with self._changed:
            self._changed.wait_for(lambda: self._ended, deadline)
        return code

    def quit(self) -> int:
        """End the VM by QMP, and return its exit code."""
        self.qmp.execute("quit")
        return self.wait()

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(10)

    def close(self) -> None:
        """End the VM in any case."""
        if self._client is not None:
            self._client.close()
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
                del self._text[:-MAX_CONSOLE]
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
