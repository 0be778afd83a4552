"""A throttle that keeps a machine's vCPUs out of the guest for a share of the time, by slices.

One thread looks after all vCPUs and kicks each one at the end of a slice in the guest. The vCPU
then stays out for as long as the throttle asks (:class:`godwit.machine.vcpu.VcpuThread`). So the
time really spent in the guest counts: a late kick makes for a longer rest. The GIL's cost after a
rest comes on top: the guest gets the share at the most, and never nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from godwit.machine.vcpu import SLICE_S


class Throttled(Protocol):
    """The methods of a vCPU's thread the throttle calls."""

    def throttle(self, percent: int) -> None:
        """Keep the vCPU out of the guest for ``percent`` of the time, or not at all with 0."""

    def end_slice(self) -> float:
        """Have the vCPU rest if its slice is over, and return the seconds to the next call."""


class Throttle:
    """The throttle of all vCPUs, off until :meth:`set`, and after :meth:`end`.

    ``vcpus`` returns the vCPUs, once needed. No lock is taken but the vCPUs' own, and those only
    for a moment.
    """

    def __init__(self, vcpus: Callable[[], Sequence[Throttled]]) -> None:
        self._vcpus = vcpus
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: The throttle in force, percent.
        self.percent = 0

    def set(self, percent: int) -> None:
        """Keep the vCPUs out for ``percent`` of the time, 0 to 99, or do nothing after the end."""
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
        """Let the vCPUs go on as they like, at once and for good.

        From any thread, and harmless the second time.
        """
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
