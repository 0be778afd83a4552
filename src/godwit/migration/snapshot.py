"""A guest kept in a file: ``migrate file:PATH`` saves it there, ``--incoming file:PATH`` loads it.

The file is a migration's stream with the source's messages only: HELLO, RAM in rounds while the
guest runs, STATE, the last pages, and COMMIT. It has its name only once it is whole and on the
disk, which is the commit: before, the guest runs where it ran; afterwards, it is in the file and
nowhere else. What a file says is believed as little as what a peer says.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from godwit.errors import ConfigError, GodwitError, LinkLost, MigrationError, StreamError
from godwit.spec.parameters import ConvergenceParameters, OnNoConvergence
from godwit.spec.runstate import RunState, RunStates

from .guest import Guest
from .incoming import Incoming, TakeOver
from .outgoing import Outgoing, Parameters
from .ram.page_runs import union
from .times import TIMES, Times
from .wire import messages
from .wire.compatibility import check
from .wire.messages import Kind
from .wire.stream import Connection, advance, send_pieces

_MAX_PARTS = os.sysconf("SC_IOV_MAX")


def path_of(uri: str) -> Path:
    """The path of ``file:PATH``.

    Raises:
        ConfigError: a path that is not absolute: the VMM need not run where the operator stands.
    """
    name = uri.removeprefix("file:")
    try:
        os.fsencode(name)
    except ValueError as error:
        raise ConfigError(f"snapshot {uri!r}: no file can have that name ({error})") from error
    if not name.startswith("/") or "\0" in name:
        raise ConfigError(f"snapshot {uri!r}: give file:PATH with an absolute path")
    return Path(name)


class FileConnection(Connection):
    """Messages in an open file, written or read from its start to its end."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__()
        self._fd = fd
        self._name = name
        self._stopped = False

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write the bytes of all parts. Raises LinkLost."""
        try:
            self.sent += send_pieces(parts, lambda left: os.writev(self._fd, left[:_MAX_PARTS]))
        except OSError as error:
            raise LinkLost(f"cannot write '{self._name}': {error.strerror}") from error

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views``. Raises LinkLost."""
        left = [view for view in views if len(view)]
        while left:
            if self._stopped:
                raise LinkLost(f"'{self._name}' is read no further")
            try:
                got = os.readv(self._fd, left[:_MAX_PARTS])
            except OSError as error:
                raise LinkLost(f"cannot read '{self._name}': {error.strerror}") from error
            if not got:
                raise LinkLost(f"'{self._name}' ends too early")
            advance(left, got)

    def begin(self, length: int | None = None) -> None:
        """Do nothing: a file is never silent."""

    def stop_receiving(self) -> None:
        """Read no further: the thread that reads gives up."""
        self._stopped = True

    def sync(self) -> None:
        """Have all written bytes on the disk. Raises LinkLost."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise LinkLost(f"cannot write '{self._name}': {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Saver(Outgoing):
    """Saves a guest in the file at ``path``, which is replaced if it exists."""

    def __init__(
        self,
        guest: Guest,
        states: RunStates,
        path: Path,
        parameters: Parameters,
        on_status: Callable[[str], None],
        times: Times = TIMES,
    ) -> None:
        super().__init__(guest, states, parameters, on_status, times)
        self._path = path
        self._partial: str | None = None
        self._file: FileConnection | None = None

    @property
    def completion(self) -> str:
        """The message with the guest's place, and the way back."""
        return f"the guest is in '{self._path}'; --incoming file:{self._path} brings it back"

    def cancel(self) -> bool:
        """Give the save up; return False when it is too late, because the file has its name."""
        given_up = super().cancel()
        if given_up:
            # Here, and not only in the thread: it may be in a long call, and the process ending.
            self._discard()
        return given_up

    @property
    def _convergence(self) -> ConvergenceParameters:
        # The guest does not run when this is over: how long it is stopped for is nobody's downtime,
        # and to throttle it, or give the save up, would be for nothing.
        return ConvergenceParameters(on_no_convergence=OnNoConvergence.STOP_AND_COPY)

    def _phases(self) -> tuple[Callable[[], None], ...]:
        return self._open, self._precopy, self._settle, self._stop, self._final, self._publish

    def _open(self) -> None:
        self._check_alive()
        path = self._path
        try:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise MigrationError(f"'{path}' exists and is no regular file; name another")
            # For its owner alone: it holds the guest's memory.
            fd, self._partial = tempfile.mkstemp(".partial", f".{path.name}.", path.parent)
        except OSError as error:
            raise MigrationError(f"cannot write beside '{path}': {error.strerror}") from error
        self._connection = self._file = FileConnection(fd, str(self._path))
        self._introduce()
        self._status("active")

    def _settle(self) -> None:
        """Sync what was written while the guest runs, and then what it changed meanwhile.

        Little is left for the stop then.
        """
        assert self._file is not None
        for _ in range(2):
            self._file.sync()
            runs, self._left = union(self._left, self._log.take()), []
            self._send_pages(runs)
            self._peer.send(Kind.ROUND)
        self._file.sync()

    def _publish(self) -> None:
        """Give the file its name: the guest is in it."""
        assert self._file is not None
        running = self._before is RunState.RUNNING
        self._file.send(Kind.COMMIT, messages.Commit(self._token, running))
        self._file.sync()
        with self._decision:
            if self._cancelled.is_set() or self._partial is None:
                raise MigrationError("cancelled")
            try:
                os.replace(self._partial, self._path)
            except OSError as error:
                raise MigrationError(f"cannot write '{self._path}': {error.strerror}") from error
            self._partial = None
            self._committed = True
        _sync_directory(self._path.parent)
        self.report.phase("saved")
        self._states.set(RunState.POSTMIGRATE)

    def _finish(self, status: str, error: str | None = None) -> None:
        problem = self._discard()
        super()._finish(status, f"{error or status}; {problem}" if problem else error)

    def _discard(self) -> str | None:
        """Remove the partial file, unless it has its name; return what went wrong with that."""
        with self._decision:
            name, self._partial = self._partial, None
            if name is None or self._committed:
                return None
        try:
            Path(name).unlink(missing_ok=True)
        except OSError as error:
            return f"'{name}', with the guest's memory, is left behind: {error.strerror}; delete it"
        return None


def _sync_directory(path: Path) -> None:
    """Have the new name on the disk; not every file system can say."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Restorer(Incoming):
    """Loads a guest from the file at ``path``.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(
        self,
        guest: Guest,
        path: Path,
        take_over: TakeOver,
        on_failed: Callable[[GodwitError], None],
        times: Times = TIMES,
    ) -> None:
        try:
            # Non-blocking, so that a pipe that nobody writes is opened, and found to be no file.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"cannot read the snapshot '{path}': {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ConfigError(f"cannot read the snapshot '{path}': it is no regular file")
        super().__init__(guest, take_over, on_failed, times)
        self._file = FileConnection(fd, str(path))

    def _run(self) -> None:
        hello = self._file.expect_struct(Kind.HELLO, messages.Hello)
        check(hello, self._guest.machine)
        self._receiver.receive(self._file)
        commit = self._file.expect_struct(Kind.COMMIT, messages.Commit)
        if commit.token != hello.token:
            raise StreamError("COMMIT: the token of another migration")
        self.phase("commit")
        self._take_over(self, commit.running)

    def _interrupt(self) -> None:
        self._file.stop_receiving()

    def _finish(self) -> None:
        self._file.close()
