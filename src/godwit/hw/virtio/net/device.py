"""virtio-net (virtio 1.2, 5.1): configuration, the control queue, and the guest announcement.

The data queues belong to the backend. The control queue is served here, from the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from struct import Struct

import msgspec

from godwit.errors import GuestError, StreamError
from godwit.host.eventfd import drain
from godwit.host.loop import Loop
from godwit.host.net.tap import HEADER, MAX_FRAME, Tap, mtu_problem
from godwit.hw.capabilities import Counts, LogsDirtyPages
from godwit.hw.device import Slot
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.nic import Nic, RxFilterInfo
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.virtio.chain import Chain
from godwit.hw.virtio.device import VirtioDevice
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.queue import Virtqueue
from godwit.spec.config import QUEUE_SIZE, DeviceConfig, NicConfig
from godwit.spec.saved import Mac

from .backend import Backend, Ring
from .control import (
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_CTRL_VLAN,
    F_GUEST_ANNOUNCE,
    Control,
)
from .rxfilter import RxFilter, RxFilterState

F_MTU = 1 << 3
F_MAC = 1 << 5
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17

_OWN_FEATURES = (
    F_MAC | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR
)

S_LINK_UP = 1
S_ANNOUNCE = 2

RX, TX, CTRL = 0, 1, 2
_CTRL_QUEUE_SIZE = 64
_CONFIG = Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu

#: Makes the backend of a NIC that is being made.
MakeBackend = Callable[["VirtioNet"], Backend]


class NetState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of the network device, beside its transport's."""

    mac: Mac
    announce_pending: bool
    filter: RxFilterState


class VirtioNet(VirtioDevice, Nic, Counts):
    """The network device, which owns its tap, and closes the tap."""

    kind = "virtio-net"
    State = NetState
    device_id = 1
    class_code = 0x020000

    def __init__(
        self,
        id: str,
        mac: bytes,
        tap: Tap,
        memory: GuestMemory,
        loop: Loop,
        make_backend: MakeBackend,
        *,
        mtu: int | None = None,
        queue_size: int = QUEUE_SIZE,
        guest_announce: bool = True,
    ) -> None:
        sizes = queue_size, queue_size, _CTRL_QUEUE_SIZE
        super().__init__(id, _OWN_FEATURES, [Virtqueue(memory, size) for size in sizes])
        self.control = Control(mac)
        self._mtu = mtu
        self._queue_size = queue_size
        self._loop = loop
        self._tap = tap
        self.tap, self.tap_fd = tap.name, tap.fd
        self.rx_backlog = RxBacklog(tap, self.lock)
        self.backend = make_backend(self)
        self._offered |= self.backend.features
        if mtu is not None:
            self._offered |= F_MTU
        if guest_announce:
            self._offered |= F_GUEST_ANNOUNCE
        self._announcements = 0
        self.on_ack: Callable[[], None] = lambda: None
        self.on_filter: Callable[[], None] = lambda: None

    def properties(self) -> Mapping[str, str | int | None]:
        """Return the configured MAC address, MTU and queue size."""
        return {
            "mac": self.control.configured_mac.hex(":"),
            "mtu": self._mtu,
            "queue-size": self._queue_size,
        }

    def parts(self) -> Sequence[object]:
        """Return the device and its backend."""
        return (self, self.backend)

    def counters(self) -> Mapping[str, int]:
        """Return how many control requests, announcements and acknowledgements there were."""
        return {
            "control-requests": self.control.requests,
            "announcements": self._announcements,
            "acknowledgements": self.control.acknowledgements,
        }

    def be_copy(self) -> None:
        """Refuse a copy whose frames the kernel carries, unseen by a gate.

        Raises:
            StreamError: the backend is vhost-net.
        """
        if isinstance(self.backend, LogsDirtyPages):
            raise StreamError(
                f"{self.id}: a copy's frames have to pass this process; give the NIC vhost=off"
            )

    # --- Nic --------------------------------------------------------------------------------------
    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        return self.control.mac

    def problems(self) -> list[str]:
        """Return a complaint if the tap's MTU is below the one the guest was told."""
        problem = None if self._mtu is None else mtu_problem(self.tap, self._mtu)
        return [] if problem is None else [problem]

    def announce(self) -> bool:
        """Ask the guest to announce itself (5.1.6.5.4), or return False if the guest cannot.

        Never before DRIVER_OK: kernels without be5dcaed694e deadlock in their probe.
        """
        with self.lock:
            if not self.negotiated & F_GUEST_ANNOUNCE or not self.started:
                return False
            if not self.queues[CTRL].enabled:
                return False  # there would be no way to acknowledge it
            self.control.announce_pending = True
            self._announcements += 1
            self.transport.signal_config()
            return True

    def send_from_host(self, frame: bytes) -> None:
        """Send a frame as if the guest had.

        Raises:
            OSError: the tap did not take the frame.
        """
        if self.gate is None or self.gate(frame, None):
            self._tap.send(frame)

    def rx_filter(self) -> RxFilterInfo:
        """Return what the driver asked for on the control queue."""
        with self.lock:
            return self.control.filter.view(self.mac, bool(self.negotiated & F_CTRL_VLAN))

    @property
    def announce_pending(self) -> bool:
        """True while an announcement waits for its acknowledgement."""
        return self.control.announce_pending

    def accepts(self, frame: memoryview) -> bool:
        """Return whether the driver's filter takes ``frame``, for the userspace backend."""
        return self.control.filter.accepts(frame, self.mac, bool(self.negotiated & F_CTRL_VLAN))

    def outgoing(self, chain: Chain) -> Sequence[bytes | memoryview]:
        """Return the parts of a frame of the guest's, or none if the frame may not leave.

        Of a frame that is looked at, a copy: the guest may change its memory behind the look.
        """
        if self.gate is None:
            return chain.readable
        data = chain.read(MAX_FRAME)
        return [data] if len(data) > HEADER and self.lets_out(data) else []

    # --- VirtioDevice -----------------------------------------------------------------------------
    def config(self) -> bytes:
        """Return the configuration, which the guest cannot write: CTRL_MAC_ADDR sets the MAC."""
        status = S_LINK_UP | (S_ANNOUNCE if self.announce_pending else 0)
        return _CONFIG.pack(self.mac, status, 1, self._mtu or 0)

    def prepare(self, features: int) -> None:
        """Have the backend prepare for these features."""
        self.backend.prepare(features)

    def start(self) -> None:
        """Hand the rings to the backend and serve the control queue."""
        if self.started:
            return
        if not (self.queues[RX].enabled and self.queues[TX].enabled):
            raise GuestError("the driver is ready, but set up no receive or transmit queue")
        self.backend.start(self.negotiated, self._ring(RX), self._ring(TX))
        self.started = True
        if self.queues[CTRL].enabled:
            self._loop.watch(self.transport.kick_fd(CTRL), self._control_kicked)
        if self.announce_pending:
            self.transport.signal_config()  # it survived a migration or a stop: raise it again

    def stop(self) -> None:
        """Take the rings back from the backend."""
        if self.started:
            self.started = False
            self._loop.unwatch(self.transport.kick_fd(CTRL))
            self.backend.stop()

    def reset(self) -> None:
        """Forget what the driver set."""
        self.rx_backlog.clear()
        self.control.reset()

    def vector_changed(self, index: int) -> None:
        """Interrupt by another eventfd for a data queue."""
        if index in (RX, TX):
            self.backend.set_call(index, self.transport.queue_fd(index))

    def close(self) -> None:
        """Give the backend's resources and the tap back."""
        with self.lock:
            self.backend.close()
            self._tap.close()

    def _ring(self, index: int) -> Ring:
        transport = self.transport
        return Ring(self.queues[index], transport.kick_fd(index), transport.queue_fd(index))

    # --- saved state ------------------------------------------------------------------------------
    def save(self) -> NetState:
        """Return the device's state, while paused."""
        return NetState(self.mac, self.announce_pending, self.control.filter.save())

    def load(self, state: NetState) -> None:
        """Take over a saved state, while paused, after the transport's.

        Raises:
            StreamError: the device cannot be in the state; the message names the field.
        """
        if state.mac[0] & 1:
            raise StreamError(f"mac: {state.mac.hex(':')} is a multicast address")
        if state.announce_pending and not self.negotiated & F_GUEST_ANNOUNCE:
            raise StreamError("announce_pending: the guest did not negotiate GUEST_ANNOUNCE")
        self.control.mac = state.mac
        self.control.announce_pending = state.announce_pending
        self.control.filter = RxFilter.load(state.filter)

    # --- the control queue ------------------------------------------------------------------------
    def _control_kicked(self) -> None:
        with self.lock:
            if not self.started:
                return
            drain(self.transport.kick_fd(CTRL))
            control = self.control
            before = control.filter.copy(), control.mac
            acknowledged = control.acknowledgements
            with self.guarded("control queue"):
                if control.serve(self.queues[CTRL], self.negotiated):
                    os.eventfd_write(self.transport.kick_fd(CTRL), 1)
                if self.queues[CTRL].should_notify():
                    self.transport.signal_queue(CTRL)
            changed = (control.filter, control.mac) != before
            acknowledged = control.acknowledgements - acknowledged
        for _ in range(acknowledged):
            self.on_ack()
        if changed:
            self.on_filter()


def make(config: DeviceConfig, slot: Slot) -> VirtioPci:
    """Return a virtio NIC on its tap, behind PCI.

    Raises:
        HostError: the tap or vhost-net is missing.
    """
    assert isinstance(config, NicConfig)
    tap = Tap(config.tap, config.mtu)
    announce = config.guest_announce
    try:
        device = VirtioNet(
            config.id,
            config.mac,
            tap,
            slot.memory,
            slot.loop,
            _vhost(tap, slot) if config.vhost else _userspace(tap, slot),
            mtu=config.mtu,
            queue_size=config.queue_size or QUEUE_SIZE,
            guest_announce=slot.machine.guest_announce if announce is None else announce,
        )
    except BaseException:
        tap.close()
        raise
    return VirtioPci(device, slot)


def _vhost(tap: Tap, slot: Slot) -> MakeBackend:
    from .vhost import VhostBackend  # a guest does not wait for the other backend's code

    return lambda net: VhostBackend(
        tap, net.rx_backlog, slot.memory, slot.loop, net.lock, lambda m: net.on_guest_error(m)
    )


def _userspace(tap: Tap, slot: Slot) -> MakeBackend:
    from .userspace import UserspaceBackend

    return lambda net: UserspaceBackend(
        tap,
        net.rx_backlog,
        slot.loop,
        net.lock,
        net.accepts,
        lambda m: net.on_guest_error(m),
        net.outgoing,
    )
