"""The userspace backend (``vhost=off``): vhost-net's work, done by Python in the event loop.

For hosts without vhost-net.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from godwit.errors import GuestError
from godwit.host.eventfd import drain
from godwit.host.loop import Loop
from godwit.host.net.tap import MAX_FRAME, Tap
from godwit.hw.device import guarded
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.nic.tap_reader import Accepts, TapReader
from godwit.hw.virtio.budget import Budget
from godwit.hw.virtio.chain import Chain

from . import offloads
from .backend import F_MRG_RXBUF, Ring
from .rx_ring import notify, place

#: Returns the parts of a frame that are sent, or none.
Outgoing = Callable[[Chain], Sequence[bytes | memoryview]]


class UserspaceBackend:
    """A tap served by this process: a :class:`.backend.Backend`."""

    def __init__(
        self,
        tap: Tap,
        backlog: RxBacklog,
        loop: Loop,
        lock: threading.RLock,
        accepts: Accepts,
        on_guest_error: Callable[[str], None],
        outgoing: Outgoing = lambda chain: chain.readable,
    ) -> None:
        self._tap = tap
        self._loop = loop
        self._lock = lock
        self._reader = TapReader(tap, backlog, loop, accepts, self._receive_frame)
        self._outgoing = outgoing
        self._on_guest_error = on_guest_error
        self.features = offloads.offered(tap.offloads) | F_MRG_RXBUF
        self._rx: Ring | None = None
        self._tx: Ring | None = None
        self._merge = False

    def prepare(self, features: int) -> None:
        """Set the tap's offloads early, as the kernel then notifies all users of the tap.

        Raises:
            OSError: the tap refused the offloads.
        """
        self._tap.set_offloads(offloads.tap_flags(features))

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Watch both rings and the tap."""
        try:
            self._tap.set_offloads(offloads.tap_flags(features))
        except OSError as error:
            raise GuestError(f"the tap refused the offloads: {error}") from error
        self._merge = bool(features & F_MRG_RXBUF)
        self._rx, self._tx = rx, tx
        self._loop.watch(rx.kick, self._rx_kicked)
        self._loop.watch(tx.kick, self._tx_kicked)
        self._reader.start(self._receive)

    def stop(self) -> None:
        """Watch rings and tap no more.

        A frame that found no space waits for :meth:`start`, as the tap's frames do.
        """
        for ring in (self._rx, self._tx):
            if ring is not None:
                self._loop.unwatch(ring.kick)
        self._reader.stop()
        self._rx = self._tx = None

    def set_call(self, index: int, fd: int) -> None:
        """Interrupt by another eventfd for ring ``index``."""
        if self._rx is not None and self._tx is not None:
            if index == 0:
                self._rx = self._rx._replace(call=fd)
            else:
                self._tx = self._tx._replace(call=fd)

    def close(self) -> None:
        """Stop, as there is nothing else to give back."""
        self.stop()

    # --- the event loop's side --------------------------------------------------------------------
    def _tx_kicked(self) -> None:
        with self._lock:
            ring = self._tx
            if ring is None:
                return
            drain(ring.kick)
            with guarded(self._on_guest_error):
                self._transmit(ring)

    def _transmit(self, ring: Ring) -> None:
        budget = Budget()
        while budget.left:
            chain = ring.queue.pop()
            if chain is None:
                break
            budget.spend(chain)
            self._send_chain(chain)
            ring.queue.push(chain, 0)
        else:
            os.eventfd_write(ring.kick, 1)  # more waits; others first
        notify(ring)

    def _send_chain(self, chain: Chain) -> None:
        if chain.readable_size() > MAX_FRAME:
            raise GuestError(f"a frame of {chain.readable_size()} bytes")
        parts = self._outgoing(chain)
        if not parts:
            return
        try:
            os.writev(self._tap.fd, parts)
        except OSError:
            # The tap is down or its queue is full, or the header makes no sense: a NIC drops the
            # frame, and so do we.
            pass

    def _rx_kicked(self) -> None:
        with self._lock:
            if self._rx is not None:
                drain(self._rx.kick)
                self._reader.start(self._receive)
                if self._reader.waiting:
                    self._receive_some()

    def _receive(self) -> None:
        with self._lock:
            if self._rx is not None:
                self._receive_some()

    def _receive_some(self) -> None:
        with guarded(self._on_guest_error):
            if self._reader.turn() and self._rx is not None:
                notify(self._rx)

    def _receive_frame(self, frame: bytes) -> bool:
        return self._rx is not None and place(self._rx.queue, frame, self._merge)
