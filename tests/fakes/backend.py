"""A NIC's backend that carries no frames and notes its calls."""

from __future__ import annotations

from godwit.hw.virtio.net import offloads
from godwit.hw.virtio.net.backend import F_MRG_RXBUF, Ring

#: The features of a tap on a present kernel with vhost-net.
FEATURES = (
    offloads.CSUM
    | offloads.GUEST_CSUM
    | offloads.GUEST_TSO4
    | offloads.GUEST_TSO6
    | offloads.HOST_TSO4
    | offloads.HOST_TSO6
    | F_MRG_RXBUF
)


class FakeBackend:
    """A :class:`godwit.hw.virtio.net.backend.Backend` that notes its calls."""

    def __init__(self, features: int = FEATURES) -> None:
        self.features = features
        self.running = False
        self.closed = False
        self.starts = 0
        self.negotiated = self.prepared = 0
        self.rings: tuple[Ring, Ring] | None = None
        self.calls: dict[int, int] = {}
        #: Raised by the next :meth:`start`.
        self.error: Exception | None = None

    def prepare(self, features: int) -> None:
        """Note the features to prepare for."""
        self.prepared = features

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Note the features and the rings, or raise :attr:`error`."""
        if self.error is not None:
            raise self.error
        self.running = True
        self.starts += 1
        self.negotiated = features
        self.rings = (rx, tx)
        self.calls = {0: rx.call, 1: tx.call}

    def stop(self) -> None:
        """Note that the rings are at rest."""
        self.running = False
        self.rings = None

    def set_call(self, index: int, fd: int) -> None:
        """Note a ring's eventfd for interrupts."""
        self.calls[index] = fd

    def close(self) -> None:
        """Note that the backend is closed."""
        self.stop()
        self.closed = True
