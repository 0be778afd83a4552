"""The base of all virtio devices (features, status, queues), and the interface of a transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from godwit.hw import device as hw_device
from godwit.hw.capabilities import Negotiates

from .queue import F_EVENT_IDX, F_INDIRECT_DESC, Virtqueue

F_VERSION_1 = 1 << 32
TRANSPORT_FEATURES = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
#: What a driver may set; NEEDS_RESET is the device's.
DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


class Transport(Protocol):
    """The functions of a transport a device may use."""

    def signal_queue(self, index: int) -> None:
        """Raise the interrupt of a queue."""

    def signal_config(self) -> None:
        """Raise the interrupt for a changed configuration."""

    def need_reset(self) -> bool:
        """Stop the device until its driver resets it (2.1.1), and return False if so before."""

    def queue_fd(self, index: int) -> int:
        """Return the eventfd that raises the interrupt of a queue, or -1 without a vector."""

    def kick_fd(self, index: int) -> int:
        """Return the eventfd the guest's notifications of a queue signal."""


class VirtioDevice(Negotiates):
    """The base of all virtio devices. The transport calls its methods under :attr:`lock`.

    Attributes:
        kind, id, version, State: as :class:`godwit.hw.device.Device` has them, for the device's own
            share of the saved state.
        lock: covers all entries into the device.
        queues: the virtqueues.
        started: the queues are served.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    State: ClassVar[type[msgspec.Struct]]
    #: The device type (virtio 1.2, chapter 5).
    device_id: ClassVar[int]
    #: The PCI class code.
    class_code: ClassVar[int]

    def __init__(self, id: str, features: int, queues: list[Virtqueue]) -> None:
        self.id = id
        self.lock = threading.RLock()
        self._offered = features | TRANSPORT_FEATURES
        self._negotiated = 0
        self.queues = queues
        self.started = False
        self.transport: Transport
        #: Receives the rule that the guest broke; the transport sets it.
        self.on_guest_error: Callable[[str], None] = lambda message: None

    @property
    def offered(self) -> int:
        """Feature bits the device offers."""
        return self._offered

    @property
    def negotiated(self) -> int:
        """Feature bits the driver accepted, or 0 before that."""
        return self._negotiated

    @negotiated.setter
    def negotiated(self, features: int) -> None:
        self._negotiated = features

    def properties(self) -> Mapping[str, str | int | None]:
        """Return what a destination must have alike: see :meth:`godwit.hw.device.Device`."""
        return {}

    def parts(self) -> Sequence[object]:
        """Return the objects in which capabilities are looked for."""
        return (self,)

    # --- device configuration ---------------------------------------------------------------------
    def config(self) -> bytes:
        """Return the device configuration as the guest reads it now."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a guest's write of the device configuration.

        Nothing is writable here; a device with writable fields overrides this, and checks offset,
        length and value of each write.
        """

    # --- life -------------------------------------------------------------------------------------
    def prepare(self, features: int) -> None:
        """Set up early what a driver with these features will need.

        Raises:
            OSError: the kernel refused.
        """

    def start(self) -> None:
        """Serve the queues, as the driver is ready (DRIVER_OK).

        Raises:
            GuestError: a ring that cannot be served.
        """

    def stop(self) -> None:
        """Take no more work from the queues, while work in flight may go on.

        Stopping twice is harmless. The queues' positions are up to date once :meth:`stopped`
        returns True.
        """

    def stopped(self, timeout: float) -> bool:
        """Wait until no work is in flight, at most ``timeout`` seconds, and return whether so.

        Called without :attr:`lock` at a pause, and with it at a reset: it is given away meanwhile.
        """
        return True

    def reset(self) -> None:
        """Forget the driver's settings, while stopped."""

    def vector_changed(self, index: int) -> None:
        """Signal a queue by its new vector: the driver changed it while the device runs."""

    def save(self) -> msgspec.Struct:
        """Return the device's own state, a :attr:`State`, while paused."""
        raise NotImplementedError

    def load(self, state: Any) -> None:
        """Take over the device's own state, while paused, after the transport's.

        Raises:
            StreamError: the device cannot be in the state; the message names the field.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give the host's resources back. Closing twice is harmless."""

    def guarded(self, where: str = "") -> hw_device.Guard:
        """Return what reports a guest error that is raised inside, and goes on behind the block."""
        return hw_device.guarded(self.on_guest_error, where)
