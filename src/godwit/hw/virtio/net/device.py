"""virtio-net (virtio 1.2, 5.1): configuration, the control queue, and its way to announce itself.

The data queues belong to the backend. The control queue is served here, from the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from struct import Struct
from typing import Annotated

import msgspec

from godwit.errors import GuestError, StreamError
from godwit.host.loop import Loop
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.rx_filter_info import FilterView
from godwit.hw.virtio.device import VirtioDevice
from godwit.hw.virtio.queue import Virtqueue

from .backend import Backend, Ring
from .control import ERR, OK, Control
from .rxfilter import RxFilter, RxFilterState

F_MTU = 1 << 3
F_MAC = 1 << 5
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17
F_CTRL_RX = 1 << 18
F_CTRL_VLAN = 1 << 19
F_CTRL_RX_EXTRA = 1 << 20
F_GUEST_ANNOUNCE = 1 << 21
F_CTRL_MAC_ADDR = 1 << 23

_OWN_FEATURES = (
    F_MAC | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR
)

S_LINK_UP = 1
S_ANNOUNCE = 2

RX, TX, CTRL = 0, 1, 2
_CONFIG = Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu


class NetState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved of the network device, beside its transport."""

    mac: Annotated[bytes, msgspec.Meta(min_length=6, max_length=6)]
    announce_pending: bool
    filter: RxFilterState


class VirtioNet(VirtioDevice):
    """The device. It is a :class:`godwit.hw.nic.nic.NicModel`.

    ``on_ack`` is told of each acknowledged announcement, from the event loop.
    """

    device_id = 1
    class_code = 0x020000

    def __init__(
        self,
        name: str,
        mac: bytes,
        memory: GuestMemory,
        loop: Loop,
        make_backend: Callable[[VirtioNet], Backend],
        *,
        mtu: int | None = None,
        queue_size: int = 256,
        guest_announce: bool = True,
    ) -> None:
        queues = [Virtqueue(memory, size) for size in (queue_size, queue_size, 64)]
        super().__init__(0, queues)
        self.name = name
        self.configured_mac = mac
        self._mac = mac
        self._mtu = mtu
        self._loop = loop
        self.backend = make_backend(self)
        self.offered |= self.backend.features | _OWN_FEATURES
        if mtu is not None:
            self.offered |= F_MTU
        if guest_announce:
            self.offered |= F_GUEST_ANNOUNCE
        self._announce_pending = False
        self.filter = RxFilter()
        self.on_ack: Callable[[], None] = lambda: None
        self.on_filter: Callable[[], None] = lambda: None

    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        return self._mac

    # --- NicModel ---------------------------------------------------------------------------------
    def announce(self) -> bool:
        """Ask the guest to announce itself (5.1.6.5.4); False when it cannot.

        Never before DRIVER_OK: kernels without be5dcaed694e deadlock in their probe.
        """
        with self.lock:
            if not self.negotiated & F_GUEST_ANNOUNCE or not self.started:
                return False
            if not self.queues[CTRL].enabled:
                return False  # there would be no way to acknowledge it
            self._announce_pending = True
            self.transport.signal_config()
            return True

    def send_from_host(self, frame: bytes) -> None:
        """As if the guest had sent it. Raises OSError."""
        self.backend.send(frame)

    @property
    def announce_pending(self) -> bool:
        """Whether an announcement waits for its acknowledgement."""
        return self._announce_pending

    def accepts(self, frame: memoryview) -> bool:
        """Whether the driver's filter takes ``frame``; the in-process backend asks."""
        return self.filter.accepts(frame, self._mac, bool(self.negotiated & F_CTRL_VLAN))

    def filter_view(self) -> FilterView:
        """The filter, for operators and the address book."""
        with self.lock:
            return self.filter.view(self._mac, bool(self.negotiated & F_CTRL_VLAN))

    # --- VirtioDevice -----------------------------------------------------------------------------
    def config(self) -> bytes:
        """Read-only for the guest, all of it: the MAC is set by CTRL_MAC_ADDR."""
        status = S_LINK_UP | (S_ANNOUNCE if self._announce_pending else 0)
        return _CONFIG.pack(self._mac, status, 1, self._mtu or 0)

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
        if self._announce_pending:
            self.transport.signal_config()  # it survived a migration or a stop: raise it again

    def stop(self) -> None:
        """Take the rings back."""
        if self.started:
            self.started = False
            self._loop.unwatch(self.transport.kick_fd(CTRL))
            self.backend.stop()

    def reset(self) -> None:
        """Forget what the driver set."""
        self.backend.clear()
        self._announce_pending = False
        self._mac = self.configured_mac
        self.filter = RxFilter()

    def vector_changed(self, index: int) -> None:
        """Interrupts of a data queue go elsewhere."""
        if index in (RX, TX):
            self.backend.set_call(index, self.transport.queue_fd(index))

    def _ring(self, index: int) -> Ring:
        transport = self.transport
        return Ring(self.queues[index], transport.kick_fd(index), transport.queue_fd(index))

    # --- saved state ------------------------------------------------------------------------------
    def save_net(self) -> NetState:
        """The state; paused."""
        return NetState(self._mac, self._announce_pending, self.filter.save())

    def load_net(self, state: NetState) -> None:
        """Take over a saved state; paused, and after the transport's.

        Raises:
            StreamError: names the field that cannot be.
        """
        if state.mac[0] & 1:
            raise StreamError(f"mac: {state.mac.hex(':')} is a multicast address")
        if state.announce_pending and not self.negotiated & F_GUEST_ANNOUNCE:
            raise StreamError("announce_pending: the guest did not negotiate GUEST_ANNOUNCE")
        self._mac = state.mac
        self._announce_pending = state.announce_pending
        self.filter = RxFilter.load(state.filter)

    # --- the control queue ------------------------------------------------------------------------
    def _control_kicked(self) -> None:
        with self.lock:
            if not self.started:
                return
            try:
                os.eventfd_read(self.transport.kick_fd(CTRL))
            except BlockingIOError:
                pass
            before = self.filter.copy(), self._mac
            try:
                acked = self.serve_control()
            except GuestError as error:
                self.on_offence(f"control queue: {error}")
                return
            changed = (self.filter, self._mac) != before
        for _ in range(acked):
            self.on_ack()
        if changed:
            self.on_filter()

    def serve_control(self) -> int:
        """Answer what waits on the control queue; how many announcements were acknowledged.

        Raises:
            GuestError: a request without room for its command or its answer.
        """
        queue = self.queues[CTRL]
        control = Control(self.filter, self.negotiated)
        acked = 0
        # A driver waits for each answer, so more than a ring's worth in one go is not honest work.
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if chain.readable_size() < 2 or not chain.writable_size():
                raise GuestError("a request needs a class, a command and a byte for the answer")
            request = chain.read(1 << 16)
            kind, command, data = request[0], request[1], request[2:]
            if kind == 3:
                status = self._acknowledge(command, data)
                acked += status == OK
            elif kind == 1 and command == 1:
                status = self._set_mac(data)
            else:
                status = control.execute(kind, command, data)
            next(part for part in chain.writable if len(part))[0] = status
            queue.push(chain, 1)
        else:
            os.eventfd_write(self.transport.kick_fd(CTRL), 1)
        if queue.should_notify():
            self.transport.signal_queue(CTRL)
        return acked

    def _acknowledge(self, command: int, data: bytes) -> int:
        """Class 3: the bit is cleared before the buffer is used (5.1.6.5.4.2)."""
        if command != 0 or data or not self._announce_pending:
            return ERR
        if not self.negotiated & F_GUEST_ANNOUNCE:
            return ERR
        self._announce_pending = False
        return OK

    def _set_mac(self, data: bytes) -> int:
        if not self.negotiated & F_CTRL_MAC_ADDR or len(data) != 6 or data[0] & 1:
            return ERR
        self._mac = bytes(data)
        return OK
