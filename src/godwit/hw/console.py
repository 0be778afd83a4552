"""The guest's console: a writer thread that loses nothing, and an optional input."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

#: Bytes that wait before those of a guest that ignores the UART's 'not empty' are dropped.
_OVERRUN = 16 << 20


class Console:
    """A console that writes bytes to ``fd`` from a thread of its own.

    The descriptor may be a terminal somebody stopped: a blocking write then holds this thread
    and no vCPU. ``has_space()`` is False while more than ``limit`` bytes wait, and the UART reports
    that to the guest; nothing is dropped.
    """

    def __init__(self, fd: int, limit: int = 1 << 16) -> None:
        self._fd = fd
        self._limit = limit
        self._waiting = bytearray()
        self._writing = False
        self._closed = False
        self._changed = threading.Condition()
        #: Called from the writer's thread when there is space again after there was none.
        self.on_space: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def has_space(self) -> bool:
        """Return whether a byte may be written now."""
        return len(self._waiting) < self._limit

    def write(self, data: bytes) -> None:
        """Take ``data`` for the writer thread, without blocking.

        A writer that ignores :meth:`has_space` overruns the console in the end, as on a real UART.
        """
        with self._changed:
            if len(self._waiting) >= _OVERRUN:
                return
            self._waiting += data
            if not self._writing:
                self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all is written, or return False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Flush, end the thread, and return whether all was written."""
        done = self.flush(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if done:
            self._thread.join(timeout)
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                data = bytes(self._waiting)
                full = len(data) >= self._limit
                self._waiting.clear()
                self._writing = True
            try:
                while data:
                    data = data[self._write(data) :]
            except OSError:
                # The reader is gone (EPIPE, EIO): there is nobody to lose it for.
                pass
            with self._changed:
                self._writing = False
                self._changed.notify_all()
            if full and self.on_space is not None:
                self.on_space()

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            # Who shares the terminal may have made it non-blocking: wait, do not lose.
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            poll.poll()
            return 0
