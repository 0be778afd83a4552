"""virtio-rng (virtio 1.2, 5.4): the host's random numbers for the guest (getrandom(2)).

Requests are answered in the event loop. With a rate limit, requests beyond the period's bytes wait
in the queue for the next period.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from godwit.errors import GuestError
from godwit.host.eventfd import drain
from godwit.host.loop import Loop, Timer
from godwit.hw.capabilities import Counts
from godwit.hw.device import Slot
from godwit.hw.memory import GuestMemory
from godwit.spec.config import DeviceConfig, RngConfig

from .budget import Budget
from .chain import Chain
from .device import VirtioDevice
from .pci import VirtioPci
from .queue import Virtqueue

_QUEUE_SIZE = 64
#: Requests answered before other work of the loop gets a turn.
_BUDGET = 64
#: Bytes given to one request at the most; fewer than there is space for are fine (5.4.6.2).
_MOST = 1024


class RngState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of the random number generator, which is its transport's alone."""


class VirtioRng(VirtioDevice, Counts):
    """The entropy device, which gives ``max_bytes`` (None: any number) in ``period`` seconds."""

    kind = "virtio-rng"
    State = RngState
    device_id = 4
    class_code = 0x00FF00  # unclassified, as QEMU's (hw/virtio/virtio-rng-pci.c: OTHERS)

    def __init__(
        self, id: str, memory: GuestMemory, loop: Loop, max_bytes: int | None, period: float
    ) -> None:
        super().__init__(id, 0, [Virtqueue(memory, _QUEUE_SIZE)])
        self._loop = loop
        self._max_bytes = max_bytes
        self._period = period
        self._left = max_bytes
        self._timer: Timer | None = None
        self._counts = {"requests": 0, "bytes": 0}

    def counters(self) -> Mapping[str, int]:
        """Return how many requests were answered, with how many bytes."""
        return dict(self._counts)

    def start(self) -> None:
        """Serve the queue of requests."""
        if self.started:
            return
        if not self.queues[0].enabled:
            raise GuestError("the driver is ready, but set up no request queue")
        self.started = True
        self._loop.watch(self.transport.kick_fd(0), self._kicked)

    def stop(self) -> None:
        """Serve the queue no more.

        Requests that wait for the next period stay in the queue.
        """
        if self.started:
            self.started = False
            self._loop.unwatch(self.transport.kick_fd(0))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def save(self) -> RngState:
        """Return the (empty) saved state."""
        return RngState()

    def load(self, state: RngState) -> None:
        """Take over a saved state, which is empty."""

    def _kicked(self) -> None:
        with self.lock:
            if self.started:
                drain(self.transport.kick_fd(0))
                with self.guarded("request queue"):
                    self._serve()

    def _serve(self) -> None:
        queue = self.queues[0]
        budget = Budget(_BUDGET)
        while budget.left:
            if self._left == 0:
                self._begin_period()  # a pause may have ended the one that was under way
                break
            chain = queue.pop()
            if chain is None:
                break
            budget.spend(chain)
            queue.push(chain, self._fill(chain))
        else:
            os.eventfd_write(self.transport.kick_fd(0), 1)  # more waits; others first
        if queue.should_notify():
            self.transport.signal_queue(0)

    def _fill(self, chain: Chain) -> int:
        """Write random bytes into a request's buffer, and return how many."""
        if chain.readable or not chain.writable_size():
            raise GuestError("a request needs a buffer to write to, and no other")
        most = _MOST if self._left is None else min(_MOST, self._left)
        size = min(chain.writable_size(), most)
        data = memoryview(os.getrandom(size))
        for part in chain.writable:
            count = min(len(part), len(data))
            part[:count] = data[:count]
            data = data[count:]
        if self._left is not None:
            self._left -= size
            self._begin_period()
        self._counts["requests"] += 1
        self._counts["bytes"] += size
        return size

    def _begin_period(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._period, self._next_period)

    def _next_period(self) -> None:
        with self.lock:
            self._timer = None
            self._left = self._max_bytes
            if self.started:
                with self.guarded("request queue"):
                    self._serve()


def make(config: DeviceConfig, slot: Slot) -> VirtioPci:
    """Return a random number generator behind PCI."""
    assert isinstance(config, RngConfig)
    device = VirtioRng(config.id, slot.memory, slot.loop, config.max_bytes, config.period_ms / 1000)
    return VirtioPci(device, slot)
