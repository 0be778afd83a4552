"""What every virtio device has: features, status, queues; and what the transport gives it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from godwit.errors import GuestError

from .queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue

F_VERSION_1 = 1 << 32
TRANSPORT_FEATURES = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
#: What a driver may set; NEEDS_RESET is the device's.
DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


class Transport(Protocol):
    """What a device may ask of its transport."""

    def signal_queue(self, index: int) -> None:
        """Raise the interrupt of a queue."""

    def signal_config(self) -> None:
        """Raise the interrupt that says 'configuration changed'."""

    def queue_fd(self, index: int) -> int:
        """The eventfd that raises the interrupt of a queue; -1 when it has no vector."""

    def kick_fd(self, index: int) -> int:
        """The eventfd that the guest's notifications of a queue signal."""


class VirtioDevice:
    """Base of the devices. The transport calls it under :attr:`lock`."""

    device_id = 0
    class_code = 0

    def __init__(self, features: int, queues: list[Virtqueue]) -> None:
        self.lock = threading.RLock()
        self.offered = features | TRANSPORT_FEATURES
        self.negotiated = 0
        self.queues = queues
        self.started = False
        self.transport: Transport
        #: Told of a guest's offence: ``(message)``.
        self.on_offence: Callable[[str], None] = lambda message: None

    def config(self) -> bytes:
        """The device-specific configuration space, as the guest reads it now."""
        return b""

    def start(self) -> None:
        """The driver is ready (DRIVER_OK): begin to serve. Raises GuestError on bad rings."""

    def stop(self) -> None:
        """Serve nothing any more; ring positions are in the queues afterwards."""

    def reset(self) -> None:
        """Forget the driver; called after :meth:`stop`."""

    def notified(self, index: int) -> None:
        """The guest notified queue ``index`` and no eventfd took it."""

    def vector_changed(self, index: int) -> None:
        """The interrupt vector of a queue changed while the device runs."""


def checked(device: VirtioDevice, work: Callable[[], None]) -> bool:
    """Do ``work``; a guest's offence is reported, and False."""
    try:
        work()
    except GuestError as error:
        device.on_offence(str(error))
        return False
    return True
