"""The vhost-net backend, where the kernel walks the rings and Python carries no frame.

KVM cannot see vhost's writes, so a migration asks vhost to log them: VHOST_F_LOG_ALL and a bitmap
vhost sets bits in. Python has no atomic swap of a bitmap, so there are two: vhost is switched
to the other (the ioctl takes each ring's mutex, drivers/vhost/vhost.c), then the idle one is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from godwit.errors import GuestError, HostError
from godwit.host.eventfd import drain
from godwit.host.ioctl import address_of
from godwit.host.loop import Loop, SoonCall
from godwit.host.net.tap import Tap
from godwit.host.vhost import DEVICE, F_LOG_ALL, LOG_PAGE, VhostNet
from godwit.hw.capabilities import LogsDirtyPages
from godwit.hw.device import guarded
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.nic.tap_reader import BUDGET, BUDGET_BYTES
from godwit.hw.virtio.budget import Budget
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue

from . import offloads
from .backend import F_MRG_RXBUF, Ring
from .rx_ring import notify, place

_VERSION_1 = 1 << 32
_RING_FEATURES = F_EVENT_IDX | F_INDIRECT_DESC | F_MRG_RXBUF | _VERSION_1


class VhostBackend(LogsDirtyPages):
    """A tap served by vhost-net: a :class:`.backend.Backend`.

    Around a migration the receive ring is served here at first: the backlog's frames are placed in
    the ring, and only then vhost gets the ring.

    Raises:
        HostError: vhost-net is missing; the message names the other backend.
    """

    def __init__(
        self,
        tap: Tap,
        backlog: RxBacklog,
        memory: GuestMemory,
        loop: Loop,
        lock: threading.RLock,
        on_guest_error: Callable[[str], None],
        device: Callable[[], VhostNet] = VhostNet,
    ) -> None:
        self._tap = tap
        self._memory = memory
        self._loop = loop
        self._lock = lock
        self._on_guest_error = on_guest_error
        self._backlog = backlog
        backlog.on_change = self._serve
        self._serve_soon = SoonCall(loop, self._serve_again)
        self._receiving = False  # vhost has the receive ring
        self._starved = False  # the guest is to notify when the receive ring has space
        self._dropping = False  # the transmit ring is served here, for want of a tap
        self._device = device()
        try:
            self._supported = self._device.features()
            self._device.set_memory((r.start, r.size, r.host) for r in memory.regions)
        except OSError as error:
            self._device.close()
            raise HostError(f"{DEVICE}: {error}; use the in-process backend (vhost=off)") from error
        self.features = offloads.offered(tap.offloads) | (self._supported & F_MRG_RXBUF)
        self._closed = False
        self._rings: tuple[Ring, ...] = ()
        self._negotiated = 0
        pages = memory.regions[-1].end // LOG_PAGE
        self._log_size = -(-pages // 64) * 8
        self._logs: list[bytearray] = []

    def prepare(self, features: int) -> None:
        """Set the tap's offloads early, as the kernel then notifies all users of the tap.

        Raises:
            OSError: the tap refused the offloads.
        """
        self._tap.set_offloads(offloads.tap_flags(features))

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Hand both rings to the kernel."""
        self._negotiated = features & self._supported & _RING_FEATURES
        self._rings = (rx, tx)
        try:
            self._tap.set_offloads(offloads.tap_flags(features))
            self._set_features()
            for index, ring in enumerate(self._rings):
                queue = ring.queue
                self._device.set_size(index, queue.size)
                self._device.set_base(index, queue.last_avail)
                self._set_addresses(index)
                self._device.set_call(index, ring.call)
                self._device.set_kick(index, ring.kick)
            if self._backlog.lost:
                self._drop_frames()
            else:
                self._device.set_backend(1, self._tap.fd)
            if not self._backlog.held:  # else the guest runs first, and gets the backlog then
                self._receive()
        except (OSError, GuestError) as error:
            # Its rings were never served: there are no positions to learn.
            self._feed_no_more()
            self._drop_no_more()
            self._rings = ()
            self._receiving = False
            for index in (0, 1):
                try:
                    self._device.set_backend(index, -1)
                except OSError:
                    pass  # that ring was not set up far enough to have one
            raise GuestError(f"vhost-net refused a ring: {error}") from error

    def stop(self) -> None:
        """Take the rings back, and learn the kernel's positions."""
        self._feed_no_more()
        dropping = self._drop_no_more()
        rings, self._rings = self._rings, ()
        if rings:
            if not dropping:
                self._take_back_transmits(rings[1])
            self._take_back(rings[0])

    def set_call(self, index: int, fd: int) -> None:
        """Interrupt by another eventfd for ring ``index``."""
        if self._rings:
            self._device.set_call(index, fd)
            rings = list(self._rings)
            rings[index] = rings[index]._replace(call=fd)
            self._rings = tuple(rings)

    def start_log(self) -> None:
        """Log what vhost writes from now on, in the middle of traffic too."""
        with self._lock:
            self._logs = [bytearray(self._log_size), bytearray(self._log_size)]
            self._set_log_base()
            self._set_log_flags()

    def take_log(self) -> bytes:
        """Switch vhost to the other bitmap, and return the bits of the idle one."""
        with self._lock:
            self._logs.reverse()
            self._set_log_base()
            idle = self._logs[1]
            taken = bytes(idle)
            idle[:] = bytes(len(idle))
            return taken

    def stop_log(self) -> None:
        """Log no more of vhost's writes."""
        with self._lock:
            self._logs, old = [], self._logs
            self._set_log_flags()
            del old  # kept alive until vhost was notified

    # --- the receive ring ----------------------------------------------------------------------
    def _serve(self) -> None:
        with guarded(self._on_guest_error, "receive ring"):
            try:
                self._receive()
            except OSError as error:
                raise GuestError(str(error)) from error

    def _receive(self) -> None:
        """Place the backlog's frames in the ring, and give vhost the ring when none is left."""
        if not self._rings:
            return
        if self._backlog.lost and not self._dropping:
            self._take_back_transmits(self._rings[1])
            self._drop_frames()
            if not self._rings:  # the guest broke the ring's rules
                return
        ring = self._rings[0]
        if self._backlog:
            if self._receiving:
                self._take_back(ring)
            self._place(ring)
        if self._backlog:
            if not self._starved:
                self._starved = True
                self._loop.watch(ring.kick, self._more_space)
        elif not (self._backlog.held or self._receiving or self._backlog.lost):
            self._feed_no_more()
            self._device.set_base(0, ring.queue.last_avail)
            self._device.set_backend(0, self._tap.fd)
            self._receiving = True

    def _place(self, ring: Ring) -> None:
        merge = bool(self._negotiated & F_MRG_RXBUF)
        frames = size = 0
        while self._backlog and frames < BUDGET and size < BUDGET_BYTES:
            frame = self._backlog.next()
            if frame is None:
                break
            frames += 1
            size += len(frame)
            if not place(ring.queue, frame, merge):
                self._backlog.requeue(frame)
                break
        else:
            if self._backlog:
                self._serve_soon.request()  # others first
        notify(ring)

    def _serve_again(self) -> None:
        with self._lock:
            if self._rings:
                self._serve()

    def _more_space(self) -> None:
        """Serve the ring again: the guest put buffers into a ring that had too few."""
        with self._lock:
            if self._rings and self._starved:
                drain(self._rings[0].kick)
                self._serve()

    def _feed_no_more(self) -> None:
        if self._starved:
            self._starved = False
            self._loop.unwatch(self._rings[0].kick)

    def _take_back(self, ring: Ring) -> None:
        if self._receiving:
            self._receiving = False
            self._device.set_backend(0, -1)
            self._learn(0, ring.queue)

    # --- the transmit ring, without a tap -------------------------------------------------------
    def _take_back_transmits(self, ring: Ring) -> None:
        """Take the transmit ring back from vhost.

        Of a tap that is gone, vhost takes frames and never returns their buffers
        (drivers/vhost/net.c, vhost_tx_batch), and the guest would never send again. The frames
        behind the last that was returned are the guest's to send once more.
        """
        self._device.set_backend(1, -1)
        self._learn(1, ring.queue)
        if self._backlog.lost or not self._tap.attached:
            ring.queue.last_avail = ring.queue.last_used

    def _drop_frames(self) -> None:
        """Return the buffers of whatever the guest sends from now on: there is no network."""
        self._dropping = True
        self._loop.watch(self._rings[1].kick, self._drop)
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            if not self._dropping:
                return
            ring = self._rings[1]
            drain(ring.kick)
            with guarded(self._on_guest_error):
                budget = Budget()
                while budget.left:
                    chain = ring.queue.pop()
                    if chain is None:
                        break
                    budget.spend(chain)
                    ring.queue.push(chain, 0)
                else:
                    os.eventfd_write(ring.kick, 1)  # more waits; others first
                notify(ring)

    def _drop_no_more(self) -> bool:
        """Serve the transmit ring here no more, and return whether it was served here."""
        dropping, self._dropping = self._dropping, False
        if dropping:
            self._loop.unwatch(self._rings[1].kick)
        return dropping

    def _learn(self, index: int, queue: Virtqueue) -> None:
        """Learn the kernel's position in a ring."""
        queue.last_avail = self._device.base(index)
        queue.resync_used()

    def close(self) -> None:
        """Stop, and give vhost back."""
        if not self._closed:
            self._closed = True
            self.stop()
            self._device.close()

    def _set_features(self) -> None:
        self._device.set_features(self._negotiated | (F_LOG_ALL if self._logs else 0))

    def _set_log_flags(self) -> None:
        self._set_features()
        for index in range(len(self._rings)):
            self._set_addresses(index)

    def _set_log_base(self) -> None:
        self._device.set_log(address_of(self._logs[0]))

    def _set_addresses(self, index: int) -> None:
        queue = self._rings[index].queue
        desc, used, avail = (
            address_of(self._memory.view(address, 1))
            for address in (queue.desc, queue.used, queue.avail)
        )
        self._device.set_addresses(index, (desc, used, avail), bool(self._logs), queue.used)
