"""A guest kept in a file: ``migrate file:PATH`` saves, ``--incoming file:PATH`` loads.

The file is a migration's stream with the source's messages only: HELLO, RAM in rounds while the
guest runs, STATE, the last pages, and COMMIT. The file is named only when whole and on the disk,
which is the commit: before, the guest runs where it ran; afterwards, the guest is in the file and
nowhere else. A file is trusted as little as a peer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from godwit.errors import ConfigError, GodwitError, LinkLost, MigrationError, StreamError
from godwit.host import sandbox
from godwit.spec.parameters import ConvergenceParameters, OnNoConvergence
from godwit.spec.runstate import RunState, RunStates

from .guest import Guest
from .incoming import Incoming, TakeOver
from .outgoing import Outgoing, Parameters
from .ram.page_runs import union
from .times import TIMES, Times
from .wire import messages
from .wire.compatibility import adopt, check
from .wire.messages import Kind
from .wire.stream import Connection, advance, send_pieces

_MAX_PARTS = os.sysconf("SC_IOV_MAX")


def path_of(uri: str) -> Path:
    """Return the path of ``file:PATH``.

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
    """A connection through an open file, written or read from start to end."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__()
        self._fd = fd
        self._name = name
        self._stopped = False

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write the bytes of all parts.

        Raises:
            LinkLost: the file cannot be written.
        """
        try:
            self.sent += send_pieces(parts, lambda left: os.writev(self._fd, left[:_MAX_PARTS]))
        except OSError as error:
            raise LinkLost(f"cannot write '{self._name}': {error.strerror}") from error

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill all ``views`` from the file.

        Raises:
            LinkLost: the file cannot be read, or ends too early.
        """
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
        """Do nothing, as a file is never silent."""

    def give_up(self) -> None:
        """Read no further, so that the reading thread gives up."""
        self._stopped = True

    def sync(self) -> None:
        """Have all written bytes on the disk.

        Raises:
            LinkLost: the file cannot be written.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise LinkLost(f"cannot write '{self._name}': {error.strerror}") from error

    def close(self) -> None:
        """Close the descriptor of the file."""
        os.close(self._fd)


class Saver(Outgoing):
    """A migration of a guest into the file at ``path``, which is replaced if there is one."""

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
        """The message with the guest's file, and the way back."""
        return f"the guest is in '{self._path}'; --incoming file:{self._path} brings it back"

    def give_up(self, why: str, by_person: bool = False) -> bool:
        """Give the save up, or return False when too late, as the file has its name."""
        given_up = super().give_up(why, by_person)
        if given_up:
            # Here, and not only in the thread, which may be in a long call of an exiting process.
            self._discard()
        return given_up

    def _longest_stop(self) -> float:
        # A disk is no peer, and how long it takes depends on nobody.
        return float("inf")

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
            partial = str(path.parent / f".{path.name}.{os.urandom(8).hex()}.partial")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(partial, flags, 0o600)
            self._partial = partial
        except OSError as error:
            raise MigrationError(
                f"cannot write beside '{path}': {error.strerror}{sandbox.hint(error)}"
            ) from error
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
            runs, self._to_send = union(self._to_send, self._log.take()), []
            self._send_pages(runs)
            self._peer.send(Kind.ROUND)
        self._file.sync()

    def _publish(self) -> None:
        """Give the file its name, with which the guest is there."""
        assert self._file is not None
        running = self._before is RunState.RUNNING
        self._file.send(Kind.COMMIT, messages.Commit(self._token, running))
        self._file.sync()
        self._machine.devices.release()
        with self._decision:
            self._check_given_up()
            if self._partial is None:
                raise MigrationError("the partial file is gone")
            try:
                os.replace(self._partial, self._path)
            except OSError as error:
                raise MigrationError(f"cannot write '{self._path}': {error.strerror}") from error
            self._partial = None
            self._committed = self._gone = True
        _sync_directory(self._path.parent)
        self.report.phase("saved")
        self._states.set(RunState.POSTMIGRATE)

    def _finish(self, status: str, error: str | None = None) -> None:
        problem = self._discard()
        super()._finish(status, f"{error or status}; {problem}" if problem else error)

    def _discard(self) -> str | None:
        """Remove the partial file, unless named, and return what went wrong with that."""
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
    """Have the new name on the disk, if the file system can do so."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Restorer(Incoming):
    """A migration of a guest from the file at ``path``.

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
            raise ConfigError(
                f"cannot read the snapshot '{path}': {error.strerror}{sandbox.hint(error)}"
            ) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ConfigError(f"cannot read the snapshot '{path}': it is no regular file")
        super().__init__(guest, take_over, on_failed, times, kept=True)
        self._file = FileConnection(fd, str(path))

    def _run(self) -> None:
        hello = self._file.expect_struct(Kind.HELLO, messages.Hello)
        check(hello, self._guest.machine, kept=True)
        adopt(hello, self._guest.machine)
        self._receiver.receive(self._file)
        commit = self._file.expect_struct(Kind.COMMIT, messages.Commit)
        if commit.token != hello.token:
            raise StreamError("COMMIT: the token of another migration")
        self.phase("commit")
        self._take_over(self, commit.running)

    def _interrupt(self) -> None:
        self._file.give_up()

    def _finish(self) -> None:
        self._file.close()
