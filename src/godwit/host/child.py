"""A process to serve this one and to end with this one, started before there is any thread.

Not by subprocess, which is slow to import, and whose objects wait for their processes by a system
call not there in the sandbox.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CLONE_NEWNS = 0x20000  # linux/sched.h
# linux/mount.h
_RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MOST_TEXT, _MOST_LINES = 16384, 3

_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A running program, which gets SIGTERM when this process ends in whatever way.

    ``keep`` are descriptors for the program, under the same numbers. ``prepare`` is called in the
    new process, and what is raised there ends the process.

    Nobody waits for the process by a system call: the end is seen by the messages, and init does
    the rest.

    Attributes:
        messages: readable when the program has written something; at the end once all is over.
    """

    def __init__(
        self,
        argv: Sequence[str],
        keep: Sequence[int] = (),
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.messages, theirs = os.pipe()
        os.set_blocking(self.messages, False)
        parent = os.getpid()
        if not os.fork():
            _become(argv, keep, prepare, theirs, parent)
        os.close(theirs)

    def read(self) -> bytes | None:
        """Return what the program has written, b"" for nothing so far, or None at the end."""
        try:
            return os.read(self.messages, _MOST_TEXT) or None
        except BlockingIOError:
            return b""

    def last_words(self, timeout: float) -> str | None:
        """Return the last lines of a program, or None if still running after ``timeout`` s."""
        until = time.monotonic() + timeout
        text = b""
        while (piece := self.read()) is not None:
            text = (text + piece)[-_MOST_TEXT:]
            if not piece and not self._readable(until - time.monotonic()):
                return None
        lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
        return ". ".join([line for line in lines if line][-_MOST_LINES:])

    def wait(self, timeout: float) -> bool:
        """Wait until the program is over, at most ``timeout`` s, and return whether so."""
        until = time.monotonic() + timeout
        while (piece := self.read()) is not None:
            if not piece and not self._readable(until - time.monotonic()):
                return False
        return True

    def _readable(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self.messages, select.POLLIN)
        return bool(poll.poll(1000 * max(0.0, timeout)))

    def close(self) -> None:
        """Give the descriptor back, while the program goes on."""
        if self.messages >= 0:
            os.close(self.messages)
            self.messages = -1


def _become(
    argv: Sequence[str],
    keep: Sequence[int],
    prepare: Callable[[], None],
    output: int,
    parent: int,
) -> None:
    """Run the program in this process, which is the new one."""
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # over before the signal was set
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.setsid()  # a key on the terminal that interrupts the VM is not for the program
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for fd in keep:
            os.set_inheritable(fd, True)
        prepare()
        os.execv(argv[0], list(argv))
    except BaseException as error:
        os.write(2, f"{argv[0]}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def show_read_only(path: str) -> None:
    """Make a folder, with what is mounted below, read only for this process and all children.

    Raises:
        OSError: the kernel refuses, as to all but root.
    """
    _check(_libc.unshare(_CLONE_NEWNS))
    place = os.fsencode(os.path.realpath(path))
    _mount(None, b"/", _REC | _PRIVATE)
    _mount(place, place, _BIND | _REC)
    _mount(None, place, _BIND | _REMOUNT | _RDONLY)


def _mount(source: bytes | None, target: bytes, flags: int) -> None:
    _check(_libc.mount(source, target, None, ctypes.c_ulong(flags), None))


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
