"""The two rings that the kernel serves for a vsock: the guest's, or a copy of the receive ring."""

from __future__ import annotations

import os
from collections.abc import Iterator

from godwit.errors import GuestError
from godwit.host.eventfd import drain
from godwit.host.ioctl import address_of
from godwit.host.loop import Loop
from godwit.host.vhost_vsock import VhostVsock
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.budget import Budget
from godwit.hw.virtio.device import VirtioDevice

from .copied_ring import SIZE, CopiedRing

RX, TX = 0, 1


class Rings:
    """The rings of a device, to be called under the device's lock."""

    def __init__(self, owner: VirtioDevice, loop: Loop, memory: GuestMemory) -> None:
        self._owner = owner
        self._loop = loop
        self._memory = memory
        self._device: VhostVsock | None = None
        self._features = 0
        self._copying = False
        self._copy: CopiedRing | None = None

    def start(self, device: VhostVsock, features: int) -> None:
        """Have the kernel serve the rings.

        Raises:
            GuestError: a ring the kernel refuses.
        """
        self._device, self._features = device, features
        try:
            self._serve(device)
        except (OSError, GuestError) as error:
            self._device = None
            self._drop_copy()
            raise GuestError(f"vhost-vsock refused a ring: {error}") from error

    def stop(self) -> None:
        """Take the rings back, and learn the kernel's positions."""
        device, self._device = self._device, None
        if device is not None:
            self._take_back(device)

    def close(self) -> None:
        """Serve no rings any more."""
        self.stop()

    def set_call(self, index: int) -> None:
        """Interrupt the guest by the present eventfd of a ring."""
        if self._device is not None and (index == TX or self._copy is None):
            self._device.set_call(index, self._owner.transport.queue_fd(index))

    def set_copying(self, on: bool) -> None:
        """Pass receive buffers through this process, or no longer, in the middle of traffic too.

        Raises:
            GuestError: a ring the kernel refuses.
        """
        if on == self._copying:
            return
        self._copying = on
        device = self._device
        if device is not None:
            self.stop()
            self.start(device, self._features)
            # A notification while nobody served the ring is lost.
            for index in (RX, TX):
                os.eventfd_write(self._owner.transport.kick_fd(index), 1)

    def written(self) -> Iterator[tuple[int, int]]:
        """Yield (guest address, bytes) of what the kernel may have written without a mark."""
        if self._device is not None:
            queue = self._owner.queues[TX]
            yield queue.used, 6 + 8 * queue.size

    # --- the kernel's side ------------------------------------------------------------------------
    def _serve(self, device: VhostVsock) -> None:
        transport = self._owner.transport
        device.set_features(self._features)
        for index in (RX, TX):
            queue = self._owner.queues[index]
            if index == RX and self._copying:
                self._serve_copy(device)
                continue
            device.set_size(index, queue.size)
            device.set_base(index, queue.last_avail)
            desc, used, avail = (
                address_of(self._memory.view(address, 1))
                for address in (queue.desc, queue.used, queue.avail)
            )
            device.set_addresses(index, (desc, used, avail), False, queue.used)
            device.set_call(index, transport.queue_fd(index))
            device.set_kick(index, transport.kick_fd(index))
        device.set_running(True)
        if self._copy is not None:
            self._loop.watch(transport.kick_fd(RX), self._kicked)
            self._loop.watch(self._copy.call, self._used)
            os.eventfd_write(transport.kick_fd(RX), 1)

    def _serve_copy(self, device: VhostVsock) -> None:
        self._copy = copy = CopiedRing(self._owner.queues[RX])
        device.set_size(RX, SIZE)
        device.set_base(RX, 0)
        device.set_addresses(RX, copy.addresses, False, 0)
        device.set_call(RX, copy.call)
        device.set_kick(RX, copy.kick)

    def _take_back(self, device: VhostVsock) -> None:
        device.set_running(False)
        for index in (TX,) if self._copy is not None else (RX, TX):
            queue = self._owner.queues[index]
            queue.last_avail = device.base(index)
            queue.resync_used()
            self._memory.mark_dirty(queue.used, 6 + 8 * queue.size)
        if self._copy is not None:
            self._copy.give_back()
            self._signal()
            self._drop_copy()

    def _drop_copy(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None:
            self._loop.unwatch(self._owner.transport.kick_fd(RX))
            self._loop.unwatch(copy.call)
            copy.close()

    # --- the copy ---------------------------------------------------------------------------------
    def _kicked(self) -> None:
        with self._owner.lock:
            if self._copy is not None:
                drain(self._owner.transport.kick_fd(RX))
                with self._owner.guarded("receive queue"):
                    self._fill()

    def _used(self) -> None:
        with self._owner.lock:
            if self._copy is not None:
                drain(self._copy.call)
                with self._owner.guarded("receive queue"):
                    self._copy.take()
                    self._signal()
                    self._fill()

    def _fill(self) -> None:
        assert self._copy is not None
        budget = Budget()
        self._copy.fill(budget)
        if not budget.left:
            os.eventfd_write(self._owner.transport.kick_fd(RX), 1)  # more waits; others first

    def _signal(self) -> None:
        if self._owner.queues[RX].should_notify():
            self._owner.transport.signal_queue(RX)
