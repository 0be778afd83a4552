"""The backends of a virtio NIC: vhost-net in the kernel, or a loop in this process."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from godwit.hw.virtio.queue import Virtqueue

F_MRG_RXBUF = 1 << 15


class Ring(NamedTuple):
    """A data queue with its eventfds, as a backend needs them."""

    queue: Virtqueue
    kick: int  # eventfd: the guest notified
    call: int  # eventfd: interrupt the guest; -1 for none


class Backend(Protocol):
    """A carrier of frames between a tap and two virtqueues, called under the device's lock.

    Frames for the guest come from the NIC's rx backlog, which asks the tap. A backend that writes
    guest memory by itself has :class:`godwit.hw.capabilities.LogsDirtyPages`.
    """

    #: virtio-net feature bits that this backend and its tap can carry.
    features: int

    def prepare(self, features: int) -> None:
        """Set up early what a start with these features will need.

        Raises:
            OSError: the kernel refused.
        """

    def start(self, features: int, rx: Ring, tx: Ring) -> None:
        """Serve both of the rings.

        Raises:
            GuestError: a ring that cannot be served.
        """

    def stop(self) -> None:
        """Serve the rings no more, and bring the queues' positions up to date.

        Stopping twice is harmless.
        """

    def set_call(self, index: int, fd: int) -> None:
        """Interrupt by another eventfd for ring ``index`` (0 rx, 1 tx), or by none (-1)."""

    def close(self) -> None:
        """Give everything but the tap back."""
