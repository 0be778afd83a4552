"""virtio-vsock (virtio 1.2, 5.10): the kernel serves two of the rings, this process the events.

The guest's CID is known to the whole kernel, so one VM alone may have it. Connections do not
migrate: the host's end at the source is reset when the CID is given up, and the guest's end by an
event where the guest goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Annotated

import msgspec

from godwit.errors import GuestError, HostError, StreamError
from godwit.host.eventfd import drain
from godwit.host.loop import Loop
from godwit.host.vhost import LOG_PAGE
from godwit.host.vhost_vsock import DEVICE, FIRST_CID, LAST_CID, VhostVsock
from godwit.hw.capabilities import (
    Counts,
    HasIdentity,
    LogsDirtyPages,
    OwnsHostState,
    Relocatable,
    ReservesAhead,
    Unmovable,
)
from godwit.hw.device import Slot
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.device import TRANSPORT_FEATURES, VirtioDevice
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.queue import Virtqueue
from godwit.spec.config import DeviceConfig, VsockConfig

from .rings import Rings

_EVENT = 2
_QUEUE_SIZE = 128  # as QEMU's (hw/virtio/vhost-vsock.c)
_F_SEQPACKET = 1 << 1
_CONFIG = Struct("<Q")  # guest_cid
_RESET_EVENT = bytes(4)  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0 (5.10.6.7)
#: Devices that are opened at the start, as a VM in its sandbox can open none: one for each time
#: that the CID is given up, and the guest goes on here all the same.
_SPARES = 4
_EXHAUSTED = (
    f"the CID was given up {_SPARES} times for migrations that failed, and cannot be again; "
    "restart the VM"
)
#: How many CIDs are tried, and where the first of them lies: at random, so that guests of two hosts
#: seldom have the same, and may come to one host.
_TRIES, _BEGIN, _END = 64, 1 << 10, 1 << 31


class VsockState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of a vsock: the CID, which the guest has read."""

    cid: Annotated[int, msgspec.Meta(ge=FIRST_CID, le=LAST_CID)] | None


class VirtioVsock(
    VirtioDevice,
    OwnsHostState,
    Unmovable,
    ReservesAhead,
    Relocatable,
    HasIdentity,
    LogsDirtyPages,
    Counts,
):
    """The socket device with a CID, or with any free one (None).

    ``open_device`` opens one of the kernel's devices.

    Raises:
        HostError: vhost-vsock is missing.
    """

    kind = "virtio-vsock"
    State = VsockState
    device_id = 19
    identity = frozenset({"cid"})
    last = True  # with the CID the connections are lost
    class_code = 0x078000  # communication, as QEMU's (hw/virtio/vhost-vsock-pci.c)

    def __init__(
        self,
        id: str,
        cid: int | None,
        memory: GuestMemory,
        loop: Loop,
        open_device: Callable[[], VhostVsock],
    ) -> None:
        super().__init__(id, 0, [Virtqueue(memory, _QUEUE_SIZE) for _ in range(3)])
        self._memory = memory
        self._loop = loop
        self._any_cid = cid is None
        self.cid = cid
        self._spares: list[VhostVsock] = []
        self._rings = Rings(self, loop, memory)
        self._device: VhostVsock | None = None
        self._has_cid = False
        self._copied = False
        self._reset_due = False
        self._resets = 0
        self._supported = 0
        try:
            for _ in range(1 + _SPARES):
                self._spares.append(open_device())
            self._use_another()
        except BaseException:
            self.close()
            raise
        assert self._device is not None
        self._supported = self._device.features()
        self._offered |= self._supported & _F_SEQPACKET

    def properties(self) -> Mapping[str, str | int | None]:
        """Return the CID, or None before one is chosen."""
        return {"cid": self.cid}

    def counters(self) -> Mapping[str, int]:
        """Return how often the guest was notified of lost connections."""
        return {"resets": self._resets}

    # --- the CID ----------------------------------------------------------------------------------
    def follow(self, properties: Mapping[str, str | int | None]) -> None:
        """Take over the source's CID, if any will do here."""
        cid = properties.get("cid")
        if self._any_cid and isinstance(cid, int) and FIRST_CID <= cid <= LAST_CID:
            with self.lock:
                self.cid = cid

    def be_copy(self) -> None:
        """Keep the CID of here: the guest reads it again after the reset of its connections."""
        self._copied = True

    def reserve(self, same_host: bool) -> None:
        """Take the CID now, unless the source is on this very host.

        Raises:
            HostError: another guest has the CID.
        """
        if not same_host:
            with self.lock:
                self._take_cid()

    def sync(self) -> None:
        """Do nothing: giving up a CID takes no time worth doing ahead."""

    def release(self) -> None:
        """Give the CID up, by which the host's connections are reset.

        Raises:
            HostError: the CID could not be taken back.
        """
        with self.lock:
            if self._device is None or not self._has_cid:
                return
            if not self._spares:
                raise HostError(_EXHAUSTED)
            self._device.close()
            self._device, self._has_cid = None, False

    def unmovable(self, into_file: bool) -> str | None:
        """Refuse a CID that could not be taken back if the guest had to stay."""
        with self.lock:
            exhausted = self._device is not None and not self._spares
        return f"{self.id}: {_EXHAUSTED}" if exhausted else None

    def acquire(self) -> None:
        """Take the CID, or a free one where any will do.

        Raises:
            HostError: another guest has the CID.
        """
        with self.lock:
            if self._device is None:
                self._use_another()
                self._reset_due = True  # the host's ends of the connections are gone
            self._take_cid()

    def _use_another(self) -> None:
        device = self._spares.pop()
        self._device = device
        try:
            device.own()
            device.set_memory((r.start, r.size, r.host) for r in self._memory.regions)
        except OSError as error:
            raise HostError(f"{DEVICE}: {error}") from error

    def _take_cid(self) -> None:
        assert self._device is not None
        try:
            if self.cid is not None:
                taken = self._device.set_cid(self.cid)
            else:
                taken = self._take_any(self._device)
        except OSError as error:
            raise HostError(f"{DEVICE}: CID {self.cid}: {error}") from error
        if not taken:
            raise HostError(
                f"CID {self.cid} is another guest's on this host; end that one, or choose another "
                "(cid=auto finds a free one)"
            )
        self._has_cid = True

    def _take_any(self, device: VhostVsock) -> bool:
        first = _BEGIN + int.from_bytes(os.urandom(4), "little") % (_END - _BEGIN)
        for cid in range(first, first + _TRIES):
            if device.set_cid(cid):
                self.cid = cid
                return True
        return False

    # --- VirtioDevice -----------------------------------------------------------------------------
    def config(self) -> bytes:
        """Return the configuration: the guest's CID."""
        return _CONFIG.pack(self.cid or 0)

    def start(self) -> None:
        """Hand both rings to the kernel, and notify the guest of lost connections."""
        if self.started:
            return
        if not all(queue.enabled for queue in self.queues):
            raise GuestError("the driver is ready, but set up not all three queues")
        if self._device is None:
            raise GuestError("the CID was given up")
        ours = TRANSPORT_FEATURES | _F_SEQPACKET
        self._rings.start(self._device, self.negotiated & self._supported & ours)
        self.started = True
        if self._reset_due:
            self._loop.watch(self.transport.kick_fd(_EVENT), self._event_kicked)
            self._send_reset()

    def stop(self) -> None:
        """Take the rings back from the kernel.

        An event without a buffer waits for the next start.
        """
        if self.started:
            self.started = False
            self._loop.unwatch(self.transport.kick_fd(_EVENT))
            self._rings.stop()

    def reset(self) -> None:
        """Forget the event: a driver has no connections at first."""
        self._reset_due = False

    def vector_changed(self, index: int) -> None:
        """Interrupt by another eventfd for a ring of the kernel's."""
        if index != _EVENT:
            self._rings.set_call(index)

    def close(self) -> None:
        """Give the kernel's devices back."""
        with self.lock:
            self._rings.close()
            devices = [*self._spares, *([self._device] if self._device is not None else [])]
            self._spares, self._device = [], None
            for device in devices:
                device.close()

    def save(self) -> VsockState:
        """Return the CID, while paused."""
        return VsockState(self.cid)

    def load(self, state: VsockState) -> None:
        """Take over the CID, while paused.

        Raises:
            StreamError: the guest has another CID than is configured here.
        """
        if self._copied:
            return
        if self._any_cid:
            self.follow({"cid": state.cid})
        if state.cid != self.cid:
            raise StreamError(f"cid: {state.cid} in the stream, {self.cid} here")

    # --- the event queue --------------------------------------------------------------------------
    def relocated(self) -> None:
        """Have the guest reset connections whose other ends stayed behind (5.10.6.7)."""
        with self.lock:
            self._reset_due = True

    def _event_kicked(self) -> None:
        with self.lock:
            if self.started and self._reset_due:
                drain(self.transport.kick_fd(_EVENT))
                self._send_reset()

    def _send_reset(self) -> None:
        """Put the event into a buffer of the guest's, if there is one by now."""
        queue = self.queues[_EVENT]
        with self.guarded("event queue"):
            chain = queue.pop()
            if chain is None:
                return
            if chain.readable or chain.writable_size() < len(_RESET_EVENT):
                raise GuestError("an event needs a buffer of four bytes to write to, and no other")
            left = memoryview(_RESET_EVENT)
            for part in chain.writable:
                count = min(len(part), len(left))
                part[:count] = left[:count]
                left = left[count:]
            queue.push(chain, len(_RESET_EVENT))
            self._reset_due = False
            self._resets += 1
            self._loop.unwatch(self.transport.kick_fd(_EVENT))
            if queue.should_notify():
                self.transport.signal_queue(_EVENT)

    # --- the dirty log ----------------------------------------------------------------------------
    def start_log(self) -> None:
        """Have buffers pass through this process, which sees what is written."""
        with self.lock, self.guarded("receive queue"):
            self._rings.set_copying(True)

    def take_log(self) -> bytes:
        """Return the pages that the kernel writes without a log, as a bitmap: a used ring's.

        The receive queue's own marks are in the log of guest memory.
        """
        pages = self._memory.regions[-1].end // LOG_PAGE
        bitmap = bytearray(-(-pages // 64) * 8)
        with self.lock:
            for address, length in self._rings.written():
                for page in range(address // LOG_PAGE, (address + length - 1) // LOG_PAGE + 1):
                    bitmap[page // 8] |= 1 << page % 8
        return bytes(bitmap)

    def stop_log(self) -> None:
        """Have the kernel serve the guest's own ring again."""
        with self.lock, self.guarded("receive queue"):
            self._rings.set_copying(False)


def make(config: DeviceConfig, slot: Slot) -> VirtioPci:
    """Return a vsock behind PCI.

    Raises:
        HostError: vhost-vsock is missing.
    """
    assert isinstance(config, VsockConfig)
    device = VirtioVsock(config.id, config.cid, slot.memory, slot.loop, VhostVsock)
    return VirtioPci(device, slot)
