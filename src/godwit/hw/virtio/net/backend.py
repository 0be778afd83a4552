"""What moves a virtio NIC's frames: vhost-net in the kernel, or a loop in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from godwit.hw.virtio.queue import Virtqueue


class Ring(NamedTuple):
    """A data queue as a backend needs it."""

    queue: Virtqueue
    kick: int  # eventfd: the guest notified
    call: int  # eventfd: interrupt the guest; -1 for none


class Backend(Protocol):
    """Moves frames between a tap and two virtqueues. Called under the device's lock."""

    #: virtio-net feature bits that this backend and its tap can carry.
    features: int

    def prepare(self, features: int) -> None:
        """It will be started with these features. Raises OSError."""

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Serve both rings. Raises GuestError on rings that cannot be served."""

    def stop(self) -> None:
        """Serve no more; the queues' positions are up to date afterwards. Harmless twice."""

    def set_call(self, index: int, fd: int) -> None:
        """The interrupt of ring ``index`` (0 rx, 1 tx) goes to another eventfd; -1: to none."""

    def start_log(self) -> None:
        """Log the pages that the backend writes behind the VMM's back."""

    def take_log(self) -> bytes | None:
        """The bitmap (bit per 4 KiB page, little endian) since the last call; None: no such log."""

    def stop_log(self) -> None:
        """Log no more."""

    def send(self, frame: bytes) -> None:
        """Put a frame on the network as if the guest had sent it. Raises OSError."""

    def drain(self) -> int:
        """Throw away what waits in the tap; how many frames. Only while stopped."""

    # Around a move: see godwit.hw.nic.nic.Nic.
    def clear(self) -> None:
        """The device was reset: throw away what goes ahead. Only while stopped."""

    def hold(self) -> None:
        """From the next start on, give the guest nothing from the tap until :meth:`release`."""

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """Give the guest these, header included, before what the tap has; how many were refused."""

    def release(self) -> int:
        """All that goes ahead was put; how many frames of the tap's were dropped as repeated."""

    def take(self, limit: int) -> list[bytes]:
        """What waits for the guest, at most so many frames, header included. Only while stopped."""

    def close(self) -> None:
        """Give everything back."""


#: Whether a frame is for the guest; the in-process backend asks.
Accepts = Callable[[memoryview], bool]
