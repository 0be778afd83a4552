"""A NIC's backend that moves nothing and notes what it is told."""

from __future__ import annotations

from collections.abc import Iterable

from godwit.hw.virtio.net import offloads
from godwit.hw.virtio.net.backend import Ring

_MRG_RXBUF = 1 << 15
#: As a tap of a present kernel with vhost-net.
FEATURES = (
    offloads.CSUM
    | offloads.GUEST_CSUM
    | offloads.GUEST_TSO4
    | offloads.GUEST_TSO6
    | offloads.HOST_TSO4
    | offloads.HOST_TSO6
    | _MRG_RXBUF
)


class FakeBackend:
    """A :class:`godwit.hw.virtio.net.backend.Backend`."""

    def __init__(self, features: int = FEATURES) -> None:
        self.features = features
        self.running = False
        self.closed = False
        self.starts = 0
        self.negotiated = self.prepared = 0
        self.rings: tuple[Ring, Ring] | None = None
        self.calls: dict[int, int] = {}
        self.sent: list[bytes] = []
        self.held = False
        self.ahead: list[bytes] = []
        #: What :meth:`take` gives.
        self.waiting: list[bytes] = []
        self.logging = False
        self.log: bytes | None = None
        #: Raised by the next :meth:`start`.
        self.error: Exception | None = None

    def prepare(self, features: int) -> None:
        """Note it."""
        self.prepared = features

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Note it, or raise :attr:`error`."""
        if self.error is not None:
            raise self.error
        self.running = True
        self.starts += 1
        self.negotiated = features
        self.rings = (rx, tx)
        self.calls = {0: rx.call, 1: tx.call}

    def stop(self) -> None:
        """Note it."""
        self.running = False
        self.rings = None

    def set_call(self, index: int, fd: int) -> None:
        """Note it."""
        self.calls[index] = fd

    def start_log(self) -> None:
        """Note it."""
        self.logging = True

    def take_log(self) -> bytes | None:
        """:attr:`log`, once."""
        taken, self.log = self.log, None
        return taken

    def stop_log(self) -> None:
        """Note it."""
        self.logging = False

    def send(self, frame: bytes) -> None:
        """Keep the frame in :attr:`sent`."""
        self.sent.append(frame)

    def drain(self) -> int:
        """Nothing ever waits."""
        return 0

    def clear(self) -> None:
        """Throw away :attr:`ahead`."""
        self.ahead.clear()

    def hold(self) -> None:
        """Note it."""
        self.held = True

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """Keep them in :attr:`ahead`."""
        self.ahead += frames
        return 0

    def release(self) -> int:
        """Note it."""
        self.held = False
        return 0

    def take(self, limit: int) -> list[bytes]:
        """From :attr:`waiting`."""
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    def close(self) -> None:
        """Note it."""
        self.stop()
        self.closed = True
