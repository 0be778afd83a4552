"""Keeps a machine's vCPUs out of the guest for a share of the time, by slices.

One thread looks after all of them: it kicks each vCPU whose slice in the guest is over, and the
vCPU itself stays out for as long as it has to make up for
(:class:`godwit.machine.vcpu.VcpuThread`). So what counts is the time that it really ran: a late
kick makes for a longer rest. What the GIL costs a vCPU after its rest comes on top: the guest gets
its share at the most, and never nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from godwit.machine.vcpu import SLICE_S


class Throttled(Protocol):
    """What is asked of a vCPU's thread."""

    def throttle(self, percent: int) -> None:
        """Keep it out for so much of the time; 0 ends it."""

    def end_slice(self) -> float:
        """Have it rest if its slice is over; after how many seconds to ask again."""


class Throttle:
    """Off until :meth:`set`, and after :meth:`end`. ``vcpus`` says which there are, once needed.

    It takes no lock but the vCPUs' own, and those only for a moment.
    """

    def __init__(self, vcpus: Callable[[], Sequence[Throttled]]) -> None:
        self._vcpus = vcpus
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: In force, percent.
        self.percent = 0

    def set(self, percent: int) -> None:
        """Keep the vCPUs out for so much of the time, 0 to 99; after the end, nothing."""
        with self._lock:
            if self._over.is_set() or percent == self.percent:
                return
            self.percent = percent
            for vcpu in self._vcpus():
                vcpu.throttle(percent)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="throttle", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """The vCPUs go on as they like, at once and for good. From any thread, also twice."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()  # and the thread's next look is its last
            if self.percent:
                self.percent = 0
                for vcpu in self._vcpus():
                    vcpu.throttle(0)

    def _main(self) -> None:
        pause = SLICE_S
        while not self._over.wait(pause):
            pause = min(vcpu.end_slice() for vcpu in self._vcpus())
