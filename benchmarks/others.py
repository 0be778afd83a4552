"""Other programs' share of this machine's CPUs while the emulated lab measures.

The lab has no way to see the others, and its times double when somebody compiles beside the lab.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Self


class Others:
    """A context manager with a thread that looks at the CPU times once a second."""

    def __init__(self) -> None:
        #: (realtime in seconds, share of the CPU time that was neither a child of ours nor idle)
        self.seen: list[tuple[float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        children, busy, everything = _ticks()
        while not self._end.wait(1):
            before = children, busy, everything
            children, busy, everything = _ticks()
            ours = children - before[0]
            passed = everything - before[2]
            if passed and ours >= 0:  # less: a child exited
                share = max(0.0, busy - before[1] - ours) / passed
                self.seen.append((round(time.time(), 1), round(share, 2)))


def _ticks() -> tuple[int, int, int]:
    """Return the CPU time so far: our children's, all but the idle, and all (proc_stat(5))."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(word) for word in words]
    ours = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process exited
        if int(fields[1]) == os.getpid():
            ours += int(fields[11]) + int(fields[12])
    return ours, sum(ticks) - ticks[3] - ticks[4], sum(ticks)
