"""The vhost-net backend: the kernel walks the rings, Python is not on the frames' road.

KVM cannot see vhost's writes, so a migration asks vhost to log them: VHOST_F_LOG_ALL and a bitmap
that vhost sets bits in. Python has no atomic swap of a bitmap, so there are two: vhost is switched
to the other (the ioctl takes each ring's mutex, drivers/vhost/vhost.c), then the idle one is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from godwit.errors import GuestError, HostError
from godwit.host.ioctl import address_of
from godwit.host.loop import Loop
from godwit.host.net.tap import Tap
from godwit.host.vhost import DEVICE, F_LOG_ALL, LOG_PAGE, Vhost
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.rx_backlog import Ahead
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue

from . import offloads
from .backend import Ring
from .rx_ring import clear, notify, place

_MRG_RXBUF = 1 << 15
_VERSION_1 = 1 << 32
_RING_FEATURES = F_EVENT_IDX | F_INDIRECT_DESC | _MRG_RXBUF | _VERSION_1


class VhostBackend:
    """A tap served by vhost-net. See :class:`.backend.Backend` for the methods.

    Around a move the receive ring is served here at first: what goes ahead of the tap's frames is
    placed in it, and only then vhost gets it.

    Raises:
        HostError: vhost-net is missing; the message names the other backend.
    """

    def __init__(
        self,
        tap: Tap,
        memory: GuestMemory,
        loop: Loop,
        lock: threading.RLock,
        offend: Callable[[str], None],
        device: Callable[[], Vhost] = Vhost,
    ) -> None:
        self._tap = tap
        self._memory = memory
        self._loop = loop
        self._lock = lock
        self._offend = offend
        self._ahead = Ahead(tap)
        self._receiving = False  # vhost has the receive ring
        self._starved = False  # the guest is to say when the receive ring has room
        self._device = device()
        try:
            self._supported = self._device.features()
            self._device.set_memory((r.start, r.size, r.host) for r in memory.regions)
        except OSError as error:
            self._device.close()
            raise HostError(f"{DEVICE}: {error}; use the in-process backend (vhost=off)") from error
        self.features = offloads.offered(tap.offloads) | (self._supported & _MRG_RXBUF)
        self._closed = False
        self._rings: tuple[Ring, ...] = ()
        self._negotiated = 0
        pages = memory.regions[-1].end // LOG_PAGE
        self._log_size = -(-pages // 64) * 8
        self._logs: list[bytearray] = []

    def prepare(self, features: int) -> None:
        """Have the tap's offloads set: the kernel tells all who stand on it. Raises OSError."""
        self._tap.set_offloads(offloads.tap_flags(features))

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Hand the rings to the kernel."""
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
            self._device.set_backend(1, self._tap.fd)
            if not self._ahead.held:  # else the guest runs first, and gets what goes ahead then
                self._receive()
        except (OSError, GuestError) as error:
            # Its rings were never served: there are no positions to learn.
            self._feed_no_more()
            self._rings = ()
            self._receiving = False
            for index in (0, 1):
                try:
                    self._device.set_backend(index, -1)
                except OSError:
                    pass  # that ring was not set up far enough to have one
            raise GuestError(f"vhost-net refused a ring: {error}") from error

    def stop(self) -> None:
        """Take the rings back, and learn where the kernel was."""
        self._feed_no_more()
        rings, self._rings = self._rings, ()
        if rings:
            self._device.set_backend(1, -1)
            self._learn(1, rings[1].queue)
            self._take_back(rings[0])

    def set_call(self, index: int, fd: int) -> None:
        """Have ring ``index`` interrupt by another eventfd."""
        if self._rings:
            self._device.set_call(index, fd)
            rings = list(self._rings)
            rings[index] = rings[index]._replace(call=fd)
            self._rings = tuple(rings)

    def start_log(self) -> None:
        """Log what vhost writes, from now on, in the middle of traffic too."""
        self._logs = [bytearray(self._log_size), bytearray(self._log_size)]
        self._set_log_base()
        self._set_features()
        for index in range(len(self._rings)):
            self._set_addresses(index)

    def take_log(self) -> bytes | None:
        """Switch vhost to the other bitmap and take this one."""
        self._logs.reverse()
        self._set_log_base()
        idle = self._logs[1]
        taken = bytes(idle)
        idle[:] = bytes(len(idle))
        return taken

    def stop_log(self) -> None:
        """Log no more."""
        self._logs, old = [], self._logs
        self._set_features()
        for index in range(len(self._rings)):
            self._set_addresses(index)
        del old  # kept alive until vhost was told

    def send(self, frame: bytes) -> None:
        """As if the guest had sent it."""
        self._tap.send(frame)

    def drain(self) -> int:
        """Throw away what waits in the tap."""
        return self._ahead.drain()

    def clear(self) -> None:
        """What goes ahead was for the last driver."""
        self._ahead.clear()

    # --- what goes ahead --------------------------------------------------------------------------
    def hold(self) -> None:
        """Give vhost no receive ring at the next start."""
        self._ahead.hold()

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """Into the ring, which vhost has to lend for it if it has it."""
        refused = self._ahead.put(frames)
        self._served()
        return refused

    def release(self) -> int:
        """vhost's turn."""
        dropped = self._ahead.release()
        self._served()
        return dropped

    def take(self, limit: int) -> list[bytes]:
        """What waits."""
        return self._ahead.take(limit)

    def _served(self) -> None:
        try:
            self._receive()
        except (OSError, GuestError) as error:
            self._offend(f"receive ring: {error}")

    def _receive(self) -> None:
        """Place what goes ahead; when nothing does any more, the ring is vhost's."""
        if not self._rings:
            return
        ring = self._rings[0]
        if self._ahead.frames:
            if self._receiving:
                self._take_back(ring)
            self._place(ring)
        if self._ahead.frames:
            if not self._starved:
                self._starved = True
                self._loop.watch(ring.kick, self._room)
        elif not self._ahead.held and not self._receiving:
            self._feed_no_more()
            self._device.set_base(0, ring.queue.last_avail)
            self._device.set_backend(0, self._tap.fd)
            self._receiving = True

    def _place(self, ring: Ring) -> None:
        merge = bool(self._negotiated & _MRG_RXBUF)
        while self._ahead.frames:
            frame = self._ahead.next()
            if frame is not None and not place(ring.queue, frame, merge):
                self._ahead.give_back(frame)
                break
        notify(ring)

    def _room(self) -> None:
        """The guest put buffers into a ring that had too few."""
        with self._lock:
            if self._rings and self._starved:
                clear(self._rings[0].kick)
                self._served()

    def _feed_no_more(self) -> None:
        if self._starved:
            self._starved = False
            self._loop.unwatch(self._rings[0].kick)

    def _take_back(self, ring: Ring) -> None:
        if self._receiving:
            self._receiving = False
            self._device.set_backend(0, -1)
            self._learn(0, ring.queue)

    def _learn(self, index: int, queue: Virtqueue) -> None:
        """Where the kernel was in a ring."""
        queue.last_avail = self._device.base(index)
        queue.resync_used()

    def close(self) -> None:
        """Stop, and give vhost and the tap back."""
        if not self._closed:
            self._closed = True
            self.stop()
            self._device.close()
            self._tap.close()

    def _set_features(self) -> None:
        self._device.set_features(self._negotiated | (F_LOG_ALL if self._logs else 0))

    def _set_log_base(self) -> None:
        self._device.set_log(address_of(self._logs[0]))

    def _set_addresses(self, index: int) -> None:
        queue = self._rings[index].queue
        desc, used, avail = (
            address_of(self._memory.view(address, 1))
            for address in (queue.desc, queue.used, queue.avail)
        )
        self._device.set_addresses(index, (desc, used, avail), bool(self._logs), queue.used)
