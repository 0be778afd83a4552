"""The fuzzer of one target: its corpus, what a strategy draws, mutations that coverage guides."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase

from .coverage import Coverage
from .mutate import mutate
from .target import Finding, Target

OUT = Path("out/fuzz")
#: The inputs that one turn of the strategy draws, and those that mutations make in between.
_DRAWN, _MUTATED = 40, 200
#: What one input may add to the process: kibibytes of its peak, descriptors and threads of a run.
_MOST_KIB, _MOST_DESCRIPTORS, _MOST_THREADS = 256 << 10, 64, 16
#: Seconds for which a finding is made smaller.
_SHRINK_S = 20.0


class Hang(BaseException):
    """An input that takes too long. No handler of errors in the subject catches it."""


class Result(NamedTuple):
    """What came of a run."""

    name: str
    seed: int
    inputs: int
    seconds: float
    edges: int
    kept: int
    #: The input that found something, and what it found; None: nothing.
    found: tuple[bytes, str] | None


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after some seconds; in the main thread alone, which has signals."""

    def late(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # again, if it is lost in a callback
        raise Hang(f"an input took more than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """A run of one target, which is the same for the same seed as far as the target is."""

    def __init__(self, target: Target, seed: int) -> None:
        self._target = target
        self._seed = seed
        self._random = random.Random(f"{seed} {target.name}")
        self._coverage = Coverage(target.subjects)
        self._queue: list[bytes] = []
        self._inputs = 0
        self._found: tuple[bytes, str] | None = None

    def run(self, seconds: float | None) -> Result:
        """Try the corpus and then other inputs, for a time or (None) a fixed number of them."""
        began = time.monotonic()
        descriptors, threads = _descriptors(), threading.active_count()
        for path in self._target.corpus:
            if self._found is None:
                self._queue.append(path.read_bytes())
                self._try(self._queue[-1])
        until = began + (seconds or 0)
        if seconds is None:
            self._fixed()
        while seconds is not None and self._found is None and time.monotonic() < until:
            self._draw(_DRAWN, until)
            self._mutate(_MUTATED, until)
        if self._found is None:
            self._check_left(descriptors, threads)
        return Result(
            self._target.name,
            self._seed,
            self._inputs,
            time.monotonic() - began,
            len(self._coverage.edges),
            len(self._queue),
            self._found,
        )

    def one(self, data: bytes) -> str | None:
        """Try one input, and return what it finds."""
        peak = _peak()
        try:
            with _bounded(self._target.limit):
                new = self._coverage.run(lambda: self._target.run(data))
        except (Exception, Hang):
            return traceback.format_exc()
        if _peak() - peak > _MOST_KIB:
            return f"one input took more than {_MOST_KIB >> 10} MiB"
        if new and data and data not in self._queue[-1:]:  # of the corpus it is there already
            self._queue.append(data)
        return None

    # --- inputs -----------------------------------------------------------------------------------
    def _fixed(self) -> None:
        self._draw(self._target.quick // 3, None)
        self._mutate(self._target.quick - self._target.quick // 3, None)

    def _try(self, data: bytes) -> None:
        self._inputs += 1
        what = self.one(data)
        if what is not None and self._found is None:
            self._found = data, what

    def _draw(self, count: int, until: float | None) -> None:
        """Try what hypothesis draws."""
        strategy = self._target.strategy
        if strategy is None or not count:
            return

        def example(data: bytes) -> None:
            if self._found is None and not _over(until):
                self._try(data)

        test = hypothesis.settings(
            max_examples=count,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(hypothesis.given(strategy)(example))
        hypothesis.seed(self._random.getrandbits(64))(test)()

    def _mutate(self, count: int, until: float | None) -> None:
        rnd = self._random
        for _ in range(count):
            if self._found is not None or _over(until):
                return
            if not self._queue:
                self._queue.append(b"\0")
            data, other = self._choice(), rnd.choice(self._queue)
            self._try(mutate(rnd, self._target, data, other))

    def _choice(self) -> bytes:
        """Return an input to be changed: a new one, one that begins in its own way, or any."""
        rnd = self._random
        way = rnd.randrange(3)
        if way == 0:
            return rnd.choice(self._queue[-32:])
        if way == 1:
            # What a target does first is named by the first byte: each has the same share.
            first = rnd.choice(sorted({data[:1] for data in self._queue}))
            return rnd.choice([data for data in self._queue if data[:1] == first])
        return rnd.choice(self._queue)

    def _check_left(self, descriptors: int, threads: int) -> None:
        left = _descriptors() - descriptors, threading.active_count() - threads
        if left[0] > _MOST_DESCRIPTORS or left[1] > _MOST_THREADS:
            self._found = b"", f"{left[0]} descriptors and {left[1]} threads were left behind"


def shrink(target: Target, data: bytes, still: Callable[[bytes], bool]) -> bytes:
    """Return the shortest part of an input that is ``still`` a finding and was found in time."""
    until = time.monotonic() + _SHRINK_S
    size = len(data) // 2
    while size:
        at = target.head if size >= target.record else 0
        while at < len(data) and time.monotonic() < until:
            shorter = data[:at] + data[at + size :]
            if still(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data


def keep(target: Target, data: bytes) -> Path:
    """Write an input into the folder of findings, and return its path."""
    OUT.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in OUT.glob(f"{target.name}-*.bin"))
    path = OUT / f"{target.name}-{number}.bin"
    path.write_bytes(data)
    return path


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _peak() -> int:
    """Return the most memory that the process ever had, kibibytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


__all__ = ["Finding", "Fuzzer", "Hang", "Result", "keep", "shrink"]
