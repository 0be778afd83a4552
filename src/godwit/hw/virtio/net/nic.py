"""virtio-net as a NIC of the machine: the device, its PCI transport and its backend together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from godwit.errors import GuestError, StreamError
from godwit.host.net.tap import Tap
from godwit.hw.nic.nic import Parts
from godwit.hw.nic.rx_filter_info import FilterView
from godwit.hw.setup_hints import Foresight
from godwit.hw.virtio.pci import TransportState, VirtioPci
from godwit.spec.config import QUEUE_SIZE, NicConfig

from .backend import Backend
from .device import NetState, VirtioNet
from .userspace import InProcessBackend
from .vhost import VhostBackend


class VirtioNicState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="virtio-net"):
    """The saved state."""

    transport: TransportState
    net: NetState


class VirtioNic:
    """See :class:`.model.Nic`."""

    model = "virtio-net"
    version = 1

    def __init__(self, config: NicConfig, parts: Parts) -> None:
        tap = Tap(config.tap)

        def backend(device: VirtioNet) -> Backend:
            def offend(message: str) -> None:
                device.on_offence(message)

            if config.vhost:
                return VhostBackend(tap, parts.memory, parts.loop, device.lock, offend)
            return InProcessBackend(tap, parts.loop, device.lock, device.accepts, offend)

        self.tap_fd = tap.fd
        announce = config.guest_announce
        try:
            self.device = VirtioNet(
                config.id,
                config.mac,
                parts.memory,
                parts.loop,
                backend,
                mtu=config.mtu,
                queue_size=config.queue_size or QUEUE_SIZE,
                guest_announce=parts.guest_announce if announce is None else announce,
            )
        except BaseException:
            tap.close()
            raise
        self.function = VirtioPci(
            self.device,
            parts.vm,
            parts.routes,
            parts.bar,
            lambda message: parts.on_offence(config.id, message),
        )

    # --- NicModel ---------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """The NIC's id."""
        return self.device.name

    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        return self.device.mac

    def announce(self) -> bool:
        """Have the guest announce itself; False when it declines."""
        return self.device.announce()

    def rx_filter(self) -> FilterView:
        """What the driver asked for on the control queue."""
        return self.device.filter_view()

    def send_from_host(self, frame: bytes) -> None:
        """As if the guest had sent it. Raises OSError."""
        self.device.send_from_host(frame)

    # --- Nic --------------------------------------------------------------------------------------
    @property
    def on_ack(self) -> Callable[[], None]:
        """Told of each acknowledged announcement."""
        return self.device.on_ack

    @on_ack.setter
    def on_ack(self, listener: Callable[[], None]) -> None:
        self.device.on_ack = listener

    @property
    def on_filter(self) -> Callable[[], None]:
        """Told of each change of the filter."""
        return self.device.on_filter

    @on_filter.setter
    def on_filter(self, listener: Callable[[], None]) -> None:
        self.device.on_filter = listener

    @property
    def offered(self) -> int:
        """Features on offer."""
        return self.device.offered

    @property
    def negotiated(self) -> int:
        """Features in use."""
        return self.device.negotiated

    def foresight(self) -> Foresight:
        """Where it is notified, and its MSI-X table."""
        return self.function.foresight()

    def foresee(self, negotiated: int, foresight: Foresight | None) -> None:
        """Set the tap's offloads, the ioeventfds and the routes up ahead."""
        # A guess that the kernel refuses is none: the state that comes will be refused, or not.
        with suppress(OSError, GuestError):
            self.device.backend.prepare(negotiated)
            if foresight is not None:
                self.function.foresee(foresight)

    def pause(self) -> None:
        """Move no frames."""
        self.function.pause()

    def resume(self) -> None:
        """Move frames."""
        self.function.resume()

    def reset(self) -> None:
        """Power-on."""
        self.function.reset()

    def close(self) -> None:
        """Give everything back."""
        self.function.close()
        self.device.backend.close()

    def start_log(self) -> None:
        """Log what the backend writes."""
        with self.device.lock:
            self.device.backend.start_log()

    def take_log(self) -> bytes | None:
        """What it wrote."""
        with self.device.lock:
            return self.device.backend.take_log()

    def stop_log(self) -> None:
        """Log no more."""
        with self.device.lock:
            self.device.backend.stop_log()

    def drain(self) -> int:
        """Throw away what waits in the tap."""
        with self.device.lock:
            return self.device.backend.drain()

    def hold(self) -> None:
        """The tap has to wait."""
        with self.device.lock:
            self.device.backend.hold()

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """Before the tap's."""
        with self.device.lock:
            return self.device.backend.put_ahead(frames)

    def release(self) -> int:
        """The tap's turn."""
        with self.device.lock:
            return self.device.backend.release()

    def take(self, limit: int) -> list[bytes]:
        """What waits."""
        with self.device.lock:
            return self.device.backend.take(limit)

    def save(self) -> VirtioNicState:
        """The state."""
        return VirtioNicState(self.function.save_transport(), self.device.save_net())

    def load(self, state: msgspec.Struct) -> None:
        """Take over a saved state. Raises StreamError."""
        if not isinstance(state, VirtioNicState):
            raise StreamError(f"{self.name}: the state of another model")
        try:
            self.function.load_transport(state.transport)
            self.device.load_net(state.net)
        except StreamError as error:
            raise StreamError(f"{self.name}: {error}") from error
