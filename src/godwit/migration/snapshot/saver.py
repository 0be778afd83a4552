"""A guest saved in a file: ``godwit save``, and ``migrate file:PATH``.

RAM goes out in rounds while the guest runs, each page to its place; at the stop, the rest and the
state. The file is named only when whole and on the disk, which is the commit. Before, the guest
runs where it ran. Afterwards the guest is in the file and nowhere else; or here, if it was to run
on, with a copy in the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from godwit.errors import ConfigError, LinkLost, MigrationError
from godwit.host import sandbox
from godwit.hw.capabilities import HasFile
from godwit.hw.memory import PAGE
from godwit.spec import saved
from godwit.spec.parameters import ConvergenceParameters, OnNoConvergence
from godwit.spec.runstate import RunState, RunStates

from ..guest import Guest
from ..outgoing import Outgoing, Parameters
from ..ram.page_runs import pages_in
from ..realtime import LONGEST_S, RealtimeSection
from ..sink import Sink
from ..times import TIMES, Times
from ..wire.messages import Hello, Run
from . import image
from .image import Image

#: Bytes that are copied at most while the guest stands still to run on: what more there is goes
#: into the file at once, and the guest waits for that.
_MOST_HELD = 256 << 20


def path_of(uri: str) -> Path:
    """Return the path of ``file:PATH``.

    Raises:
        ConfigError: a relative path: the VMM need not run where the operator stands.
    """
    name = uri.removeprefix("file:")
    try:
        os.fsencode(name)
    except ValueError as error:
        raise ConfigError(f"snapshot {uri!r}: no file can have that name ({error})") from error
    if not name.startswith("/") or "\0" in name:
        raise ConfigError(f"snapshot {uri!r}: give file:PATH with an absolute path")
    return Path(name)


class Manner(NamedTuple):
    """The choices of a save."""

    keep_running: bool = False
    """The guest runs on, and the file has a copy."""
    compression: str = ""
    """One of :data:`.format.COMPRESSIONS`."""
    ends_vm: bool = False
    """A guest that does not run on takes its VM along."""


#: QEMU's: the guest is in the file, and the VM waits for its end.
PLAIN = Manner()


class Saver(Outgoing):
    """A save of a guest into the file at ``path``, which is replaced if there is one.

    Raises:
        ConfigError: there is no zstd.
    """

    def __init__(
        self,
        guest: Guest,
        states: RunStates,
        path: Path,
        parameters: Parameters,
        on_status: Callable[[str], None],
        times: Times = TIMES,
        manner: Manner = PLAIN,
        checked: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(guest, states, parameters, on_status, times, checked)
        self._path = path
        self._manner = manner
        self._keeps = manner.keep_running
        self.ends_vm = manner.ends_vm and not self._keeps
        if self._keeps:
            self._stopped_as = RunState.SAVE_VM
        self._compress = None
        if manner.compression:
            from .compression import compressor

            self._compress = compressor()
        self._partials: list[tuple[str, int]] = []
        self._file: _FileSink | None = None
        self._runs_on = False
        self._realtime = RealtimeSection(times)

    @property
    def needs_guest(self) -> bool:
        """True until the guest runs on."""
        return self.active and not self._runs_on

    @property
    def completion(self) -> str:
        """The message with the guest's file, and the way back."""
        if self._keeps:
            what = f"the guest runs on, and a copy of it is in '{self._path}'"
            return f"{what}; --incoming file:{self._path} makes another of it"
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
        if self._keeps:
            return super()._convergence
        # The guest does not run when this is over: how long it is stopped for is nobody's downtime,
        # and to throttle it, or give the save up, would be for nothing.
        return ConvergenceParameters(on_no_convergence=OnNoConvergence.STOP_AND_COPY)

    @property
    def _sink(self) -> Sink:
        return self._whole

    @property
    def _whole(self) -> _FileSink:
        if self._file is None:
            raise LinkLost("there is no file yet")
        return self._file

    # --- phases -----------------------------------------------------------------------------------
    def _phases(self) -> tuple[Callable[[], None], ...]:
        begin = self._await_check, self._open, self._precopy
        if self._keeps:
            return *begin, self._stop, self._final, self._go_on, self._publish
        return *begin, self._settle, self._stop, self._final, self._publish

    def _open(self) -> None:
        self._check_alive()
        path = self._path
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise MigrationError(f"'{path}' exists and is no regular file; name another")
        self._spare_disks()
        self._file = _FileSink(Image(self._make(), str(path), self._machine.memory))
        self._introduce()
        self._status("active")

    def _spare_disks(self) -> None:
        """Refuse to replace a file that a disk of this VM is.

        Raises:
            MigrationError: the path is such a file, by whatever name.
        """
        try:
            status = self._path.stat()
        except OSError:
            return  # there is none, or none that can be replaced
        for part in self._machine.devices.having(HasFile):
            if part.is_file(status.st_dev, status.st_ino):
                raise MigrationError(f"'{self._path}' is a disk of this VM; name another file")

    def _make(self) -> int:
        """Make a partial file, for its owner alone, as the guest's memory goes there."""
        path = self._path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        name = str(path.parent / f".{path.name}.{os.urandom(8).hex()}.partial")
        try:
            fd = os.open(name, flags, 0o600)
        except OSError as error:
            raise MigrationError(
                f"cannot write beside '{path}': {error.strerror}{sandbox.hint(error)}"
            ) from error
        with self._decision:
            self._partials.append((name, fd))
        self._check_given_up()  # or it would be left behind
        return fd

    def _settle(self) -> None:
        """Sync the file while the guest runs, and then what the guest changed meanwhile.

        Little is left for the stop then.
        """
        image = self._whole.image
        for _ in range(2):
            if self._compress is None:
                image.sync()
                image.checksum(self._check_given_up)
            self._send_pages(self._to_send)
            self._to_send = self._log.take()
        if self._compress is None:
            image.sync()

    def _stop(self) -> None:
        if self._keeps:
            if (self.report.expected_ms or 0.0) <= LONGEST_S * 1000:
                self._realtime.begin()
            self._whole.image.hold(_MOST_HELD)
        super()._stop()

    def _go_on(self) -> None:
        """Let the guest go on as before, with all that the file lacks held in memory."""
        with self._machine.lock:
            self._resume()
        self._realtime.end()
        self.report.phase("resumed")
        if self.report.stopped is not None and self._before is RunState.RUNNING:
            self.report.downtime_ms = (self._times.now() - self.report.stopped) * 1000
        self._runs_on = True
        self._end_log()
        self._whole.image.release()

    def _publish(self) -> None:
        """Make the file whole, and rename the file, with which the guest is there."""
        name = self._finish_file()
        if not self._keeps:
            self._release()
        with self._decision:
            self._check_given_up()
            try:
                os.replace(name, self._path)
            except OSError as error:
                raise MigrationError(f"cannot write '{self._path}': {error.strerror}") from error
            self._committed = self._gone = True
        _sync_directory(self._path.parent)
        self.report.phase("saved")
        if not self._keeps:
            self._states.set(RunState.POSTMIGRATE)

    def _finish_file(self) -> str:
        """Write what is missing, and return the name of the whole partial file."""
        machine, whole = self._machine, self._whole
        running = self._before is RunState.RUNNING
        guest = image.Guest(machine.config.machine.name, whole.described, whole.saved, running)
        if self._compress is None:
            whole.image.finish(guest, self._check_given_up)
        else:
            fd = self._make()
            whole.image.compress(fd, guest, self._compress, self._check_given_up)
            self.report.bytes_sent = os.fstat(fd).st_size
        with self._decision:
            self._check_given_up()
            return self._partials[-1][0]

    # --- ends -------------------------------------------------------------------------------------
    def _fail(self, error: Exception) -> None:
        self._realtime.end()
        super()._fail(error)

    def _finish(self, status: str, error: str | None = None) -> None:
        problem = self._discard()
        super()._finish(status, f"{error or status}; {problem}" if problem else error)

    def _main(self) -> None:
        try:
            super()._main()
        finally:
            self._realtime.end()
            with self._decision:
                partials, self._partials = self._partials, []
            for _, fd in partials:
                with suppress(OSError):  # a file's last error
                    os.close(fd)

    def _discard(self) -> str | None:
        """Remove the partial files, all but a named one, and return what went wrong."""
        with self._decision:
            names = [name for name, _ in self._partials]
            if self._committed:
                names = names[:-1]  # of two, the uncompressed one
            problems = [_remove(name) for name in names]
        return "; ".join(filter(None, problems)) or None


def _remove(name: str) -> str | None:
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


class _FileSink(Sink):
    """A taker of a guest that is an image.

    Attributes:
        described: HELLO.
        saved: STATE.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self.described = self.saved = b""

    @property
    def sent(self) -> int:
        """Bytes of pages taken until now."""
        return self.image.written

    def hello(self, hello: Hello) -> None:
        """Keep the description for the index."""
        self.described = saved.encode(hello)

    def coming(self, runs: Sequence[Run]) -> None:
        """Do nothing, as a file has its places."""

    def pages(self, runs: Sequence[Run]) -> int:
        """Write pages to their places, or hold them."""
        self.image.put(runs)
        return pages_in(runs) * PAGE

    def zeros(self, runs: Sequence[Run], first: bool) -> None:
        """Write zeros where something else was."""
        if not first:
            self.image.put(runs)

    def end_of_round(self) -> None:
        """Do nothing: a later page overwrites an earlier one."""

    def state(self, payload: bytes) -> None:
        """Keep the state for the index."""
        self.saved = payload
