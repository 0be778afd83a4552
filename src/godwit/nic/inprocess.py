"""The in-process backend: the same road as vhost-net's, walked by Python in the event loop.

For hosts without vhost-net, and for NIC models that are no virtio devices.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from ..errors import GuestError
from ..loop import Loop
from ..virtio.queue import Chain, Virtqueue
from . import offloads
from .backend import Accepts, Ring
from .tap import MAX_FRAME, Tap
from .tapreader import BUDGET, TapReader

_MRG_RXBUF = 1 << 15


class InProcessBackend:
    """A tap served by this process. See :class:`.backend.Backend` for the methods."""

    def __init__(
        self,
        tap: Tap,
        loop: Loop,
        lock: threading.RLock,
        accepts: Accepts,
        offend: Callable[[str], None],
    ) -> None:
        self._tap = tap
        self._loop = loop
        self._lock = lock
        self._reader = TapReader(tap, loop, accepts, self._receive_frame)
        self._offend = offend
        self.features = offloads.offered(tap.offloads) | _MRG_RXBUF
        self._rx: Ring | None = None
        self._tx: Ring | None = None
        self._merge = False

    def prepare(self, features: int) -> None:
        """Have the tap's offloads set: the kernel tells all who stand on it. Raises OSError."""
        self._tap.set_offloads(offloads.tap_flags(features))

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Watch both rings and the tap."""
        try:
            self._tap.set_offloads(offloads.tap_flags(features))
        except OSError as error:
            raise GuestError(f"the tap refused the offloads: {error}") from error
        self._merge = bool(features & _MRG_RXBUF)
        self._rx, self._tx = rx, tx
        self._loop.watch(rx.kick, self._rx_kicked)
        self._loop.watch(tx.kick, self._tx_kicked)
        self._reader.start(self._receive)

    def stop(self) -> None:
        """Watch nothing; a frame that found no room waits for :meth:`start`, as the tap's do."""
        for ring in (self._rx, self._tx):
            if ring is not None:
                self._loop.unwatch(ring.kick)
        self._reader.stop()
        self._rx = self._tx = None

    def set_call(self, index: int, fd: int) -> None:
        """Have ring ``index`` interrupt by another eventfd."""
        if self._rx is not None and self._tx is not None:
            if index == 0:
                self._rx = self._rx._replace(call=fd)
            else:
                self._tx = self._tx._replace(call=fd)

    def start_log(self) -> None:
        """Nothing to do: guest memory marks what this process writes."""

    def take_log(self) -> bytes | None:
        """None: guest memory has it."""
        return None

    def stop_log(self) -> None:
        """Nothing to do."""

    def send(self, frame: bytes) -> None:
        """As if the guest had sent it."""
        self._tap.send(frame)

    def drain(self) -> int:
        """Throw away what waits in the tap, and what was taken from it."""
        return self._reader.drain()

    def close(self) -> None:
        """Stop, and give the tap back."""
        self.stop()
        self._tap.close()

    # --- the event loop's side --------------------------------------------------------------------
    def _tx_kicked(self) -> None:
        with self._lock:
            ring = self._tx
            if ring is None:
                return
            _clear(ring.kick)
            self._guarded(lambda: self._transmit(ring))

    def _transmit(self, ring: Ring) -> None:
        for _ in range(BUDGET):
            chain = ring.queue.pop()
            if chain is None:
                break
            self._send_chain(chain)
            ring.queue.push(chain, 0)
        else:
            os.eventfd_write(ring.kick, 1)  # more waits; others first
        _notify(ring)

    def _send_chain(self, chain: Chain) -> None:
        if chain.readable_size() > MAX_FRAME:
            raise GuestError(f"a frame of {chain.readable_size()} bytes")
        try:
            os.writev(self._tap.fd, chain.readable)
        except OSError:
            # The tap is down or its queue is full, or the header makes no sense: a NIC drops the
            # frame, and so do we.
            pass

    def _rx_kicked(self) -> None:
        with self._lock:
            if self._rx is not None:
                _clear(self._rx.kick)
                self._reader.start(self._receive)
                self._guarded(self._deliver_held)

    def _receive(self) -> None:
        with self._lock:
            if self._rx is not None:
                self._guarded(self._receive_some)

    def _receive_some(self) -> None:
        if self._reader.turn() and self._rx is not None:
            _notify(self._rx)

    def _deliver_held(self) -> None:
        if self._reader.holds and self._reader.deliver_held() and self._rx is not None:
            _notify(self._rx)

    def _receive_frame(self, frame: bytes) -> bool:
        return self._rx is not None and self._deliver(self._rx.queue, frame)

    def _deliver(self, queue: Virtqueue, frame: bytes) -> bool:
        """Put one frame into as many buffers as it needs; False when the ring has too few."""
        chains: list[tuple[Chain, int]] = []
        left = memoryview(frame)
        while left or not chains:
            chain = queue.pop()
            if chain is None or (chains and not self._merge):
                for _ in range(len(chains) + (chain is not None)):
                    queue.unpop()
                # A frame that never fits is dropped: longer than a buffer, if they are not merged,
                # or than all that the ring can hold at once.
                return chain is not None or len(chains) == queue.size
            taken = 0
            for part in chain.writable:
                size = min(len(part), len(left))
                part[:size] = left[:size]
                taken += size
                left = left[size:]
            if taken == 0:
                raise GuestError("a receive buffer without room")
            chains.append((chain, taken))
        first = chains[0][0].writable
        _put_u16(first, 10, len(chains))  # num_buffers (5.1.6.3)
        for chain, taken in chains:
            queue.push(chain, taken)
        return True

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except GuestError as error:
            self._offend(str(error))


def _put_u16(parts: list[memoryview], offset: int, value: int) -> None:
    """Store a u16 at ``offset`` of scattered parts."""
    for byte in value.to_bytes(2, "little"):
        at = offset
        for part in parts:
            if at < len(part):
                part[at] = byte
                break
            at -= len(part)
        else:
            raise GuestError("a receive buffer shorter than the packet header")
        offset += 1


def _notify(ring: Ring) -> None:
    if ring.queue.should_notify() and ring.call >= 0:
        os.eventfd_write(ring.call, 1)


def _clear(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
