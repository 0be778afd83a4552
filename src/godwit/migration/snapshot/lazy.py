"""RAM from a snapshot's file, mapped privately: pages come from the file when touched.

The file must not change. A lease is for that: whoever wants to write or truncate the file waits
until the guest has a copy of its own. And a thread checks RAM from the start to the end while the
guest runs. If a chunk is wrong, the guest stops: the guest may have read from there.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from godwit.errors import ConfigError, GodwitError, KvmError, StreamError
from godwit.host import eventfd, lease
from godwit.machine.machine import Machine

from .format import CHUNK, RAM_AT
from .reader import Snapshot, named

#: Bytes without data that are mapped along, so that there are few mappings
#: (Documentation/admin-guide/sysctl/vm.rst, max_map_count: 65,530).
_GAP = 16 << 20
#: The guest comes first: after each chunk the checking thread rests for so many times as long. (Not
#: by its priority: while the thread has the interpreter, nobody else should have to wait for it.)
_REST = 3.0
#: Between two tries to pause a guest whose device is busy, seconds.
_AGAIN_S = 1.0
#: A guest that cannot be paused so many times, each of which takes its time, ends with its VM.
_TRIES = 3


class _Closed(GodwitError):
    """The end of a check, because the VM ends."""


class Lazy:
    """A machine's RAM from ``snapshot``, which stays open as long. To be made in the main thread.

    ``on_damaged(error)`` is called in the checking thread.

    Raises:
        ConfigError: the file cannot be mapped into such RAM, or not be held unchanged.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        machine: Machine,
        on_damaged: Callable[[GodwitError], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._snapshot = snapshot
        self._machine = machine
        self._on_damaged = on_damaged
        self._now = now
        self._turned = now()
        self._closing = self._wanted = self._detached = False
        self._begun, self._checked = threading.Event(), threading.Event()
        self._damage: StreamError | None = None
        self._thread = threading.Thread(target=self._main, name="snapshot", daemon=True)
        if machine.memory.fd is not None:
            raise ConfigError(
                "--restore lazy needs private RAM; leave out shared=on, or --restore lazy"
            )
        self._wake = eventfd.make()
        try:
            lease.take(snapshot.fd, self._asked)
        except OSError as error:
            os.close(self._wake)
            raise ConfigError(
                f"the snapshot '{snapshot.path}' cannot be kept from being changed "
                f"(a lease: {error.strerror}); close what writes it, have it belong to the user "
                "who starts the VM, or leave out --restore lazy"
            ) from error

    def map(self) -> None:
        """Make RAM the file's, before the state is loaded.

        Raises:
            StreamError: the snapshot is compressed, and no file to be mapped.
        """
        if self._snapshot.header.compression:
            raise StreamError("it is compressed, and not to be mapped; leave out --restore lazy")
        parts: list[tuple[int, int]] = []
        for chunk in self._snapshot.used:
            at = chunk.number * CHUNK
            if parts and at - sum(parts[-1]) <= _GAP:
                parts[-1] = parts[-1][0], at + CHUNK - parts[-1][0]
            else:
                parts.append((at, CHUNK))
        try:
            self._machine.memory.back_by_file(self._snapshot.fd, RAM_AT, parts)
        except OSError as error:
            raise StreamError(f"it cannot be mapped: {error}") from error

    def start(self) -> None:
        """Make the thread that checks RAM, which waits for :meth:`begin`.

        There has to be one before the guest runs.
        """
        self._thread.start()

    def begin(self) -> None:
        """Begin to check RAM, which the guest uses from now on."""
        self._begun.set()

    def hurry(self) -> bool:
        """Have the check rest no more, and return whether all of RAM was checked by now.

        Raises:
            StreamError: RAM is wrong.
        """
        if not self._checked.is_set():
            with suppress(OSError):  # by which each rest is over, as nobody drains it meanwhile
                os.eventfd_write(self._wake, 1)
            return False
        if self._damage is not None:
            raise StreamError(str(self._damage)) from self._damage
        return True

    def close(self) -> None:
        """End the check, as RAM may not be used any more."""
        self._closing = True
        self._begun.set()
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _asked(self) -> None:
        """Note, in a signal's handler, somebody's wish to write the file."""
        self._wanted = True
        with suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def _main(self) -> None:
        self._begun.wait()
        self._turned = self._now()
        try:
            self._snapshot.check_ram(self._rest)
            self._checked.set()
            self._turn()
            while not self._detached:
                # If it was asked for in vain, because a device was busy or memory short: again.
                select.select([self._wake], [], [], _AGAIN_S if self._wanted else None)
                eventfd.drain(self._wake)
                self._turn()
            # With it the lease ends, as nothing of the file is mapped any more. (Who does not own
            # the file, as this process in its sandbox, cannot give the lease up.)
            self._snapshot.close()
        except _Closed:
            pass
        except StreamError as error:
            self._damage = damage = named(self._snapshot.path, error)
            self._checked.set()  # first: nothing of the guest leaves from now on
            try:
                self._stop_guest()
            finally:
                self._on_damaged(damage)
        finally:
            if not self._checked.is_set():
                self._damage = StreamError("the check of its RAM has ended before the end")
                self._checked.set()

    def _stop_guest(self) -> None:
        """Pause the guest, some time after a device that is busy or a vCPU that is late."""
        for _ in range(_TRIES):
            try:
                with self._machine.lock:
                    self._machine.pause()
                return
            except KvmError:
                if self._closing:
                    return
                select.select([self._wake], [], [], _AGAIN_S)
                eventfd.drain(self._wake)

    def _rest(self) -> None:
        """Do what was asked for between two chunks, and rest unless somebody waits for the end."""
        self._turn()
        select.select([self._wake], [], [], _REST * (self._now() - self._turned))
        self._turned = self._now()

    def _turn(self) -> None:
        """Do what was asked for, the end of the check included."""
        if self._closing:
            raise _Closed
        if self._wanted and not self._detached:
            with suppress(KvmError, OSError):
                self._detach()

    def _detach(self) -> None:
        """Give the guest RAM of its own, while paused, with all of the file copied."""
        machine = self._machine
        with machine.lock:
            ran = machine.running
            machine.pause()
            try:
                machine.memory.leave_file()
                self._detached = True
            finally:
                if ran:
                    machine.resume()
