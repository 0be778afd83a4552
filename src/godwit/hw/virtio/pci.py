"""The PCI transport, modern only (virtio 1.2, 4.1): capabilities, common configuration, MSI-X.

One 16 KiB BAR: common configuration at 0, ISR at 0x400, device configuration at 0x800, MSI-X table
at 0x1000, pending bits at 0x1800, notifications at 0x2000, four bytes a queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from struct import pack, pack_into
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from godwit.errors import GuestError, StreamError
from godwit.hw.capabilities import HasSetupHints, SetupHints
from godwit.hw.device import Device, Slot
from godwit.hw.irq import Msix, MsixState
from godwit.hw.pci import PciFunction, PciState
from godwit.spec.saved import U64

from . import common
from . import device as v
from .cfg_access import CfgAccess
from .common import CommonConfig, CommonState
from .device import VirtioDevice
from .notify import STRIDE, Notifications
from .queue import QueueState

BAR_SIZE = 0x4000
_COMMON, _ISR, _DEVICE, _TABLE, _PENDING, _NOTIFY = 0, 0x400, 0x800, 0x1000, 0x1800, 0x2000
_CAP_MSIX, _CAP_VENDOR = 0x11, 0x09
_KINDS = ((1, _COMMON, common.SIZE), (3, _ISR, 1), (4, _DEVICE, 0x100))

_T = TypeVar("_T")


class TransportState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The transport's share of a virtio device's saved state."""

    pci: PciState
    msix: MsixState
    common: CommonState
    negotiated: U64
    isr: Annotated[int, msgspec.Meta(ge=0, le=3)]
    #: The configuration access capability: a driver may stand between setting and using it.
    cfg_access: Annotated[bytes, msgspec.Meta(min_length=CfgAccess.SIZE, max_length=CfgAccess.SIZE)]
    queues: Annotated[list[QueueState], msgspec.Meta(max_length=64)]


class VirtioState(msgspec.Struct, Generic[_T], frozen=True, forbid_unknown_fields=True):
    """The saved state of a virtio device: the transport's share, and the device's own."""

    transport: TransportState
    device: _T


class VirtioPci(PciFunction, Device, HasSetupHints):
    """A virtio device behind PCI: the machine's device, whatever the virtio device is.

    All entries into the device take its lock here.
    """

    def __init__(self, device: VirtioDevice, slot: Slot) -> None:
        number = 0x1040 + device.device_id
        super().__init__(0x1AF4, number, device.class_code, (0x1AF4, 0x1100), revision=1)
        self.device = device
        self.kind, self.id, self.version = device.kind, device.id, device.version  # type: ignore[misc]
        self.State = VirtioState[device.State]  # type: ignore[misc,name-defined]
        self._on_guest_error = slot.on_guest_error
        device.transport = self
        device.on_guest_error = self._guest_error
        self.add_bar(BAR_SIZE, slot.bar)
        count = len(device.queues)
        self.msix = Msix(slot.vm, slot.routes, count + 1)
        self._msix_at = self.add_capability(
            _CAP_MSIX, pack("<HII", count, _TABLE, _PENDING), b"\x00\xc0"
        )
        for kind, offset, length in _KINDS:
            self._capability(kind, offset, length)
        self._capability(2, _NOTIFY, STRIDE * count, pack("<I", STRIDE))
        at = self._capability(5, 0, 0, bytes(4), CfgAccess.MASK)
        self._cfg_access = CfgAccess(self.config, at, BAR_SIZE)
        self._notifications = Notifications(slot.vm, count)
        self._common = CommonConfig(device, self.msix.count, self._set_status)
        self._isr = 0
        self._paused = True
        self._resetting = False
        slot.pci.add(slot.number, self)

    def _capability(
        self, kind: int, offset: int, length: int, tail: bytes = b"", mask: bytes = b""
    ) -> int:
        body = pack("<BBBBBBII", 16 + len(tail), kind, 0, 0, 0, 0, offset, length) + tail
        return self.add_capability(_CAP_VENDOR, body, mask)

    def properties(self) -> Mapping[str, str | int | None]:
        """Return the properties of the virtio device."""
        return self.device.properties()

    def parts(self) -> Sequence[object]:
        """Return the transport and the device's parts."""
        return (self, *self.device.parts())

    # --- what the device asks of its transport ----------------------------------------------------
    def signal_queue(self, index: int) -> None:
        """Raise the interrupt of a queue."""
        self._isr |= 1
        self.msix.signal(self.device.queues[index].vector)

    def signal_config(self) -> None:
        """Raise the configuration interrupt, and begin a new generation."""
        self._common.changed()
        self._isr |= 2
        self.msix.signal(self._common.config_vector)

    def queue_fd(self, index: int) -> int:
        """Return the eventfd of a queue's vector, or -1 without one."""
        vector = self.device.queues[index].vector
        return self.msix.fds[vector] if vector < self.msix.count else -1

    def kick_fd(self, index: int) -> int:
        """Return the eventfd the guest's notifications of a queue signal."""
        return self._notifications.fds[index]

    @property
    def driver_ok(self) -> bool:
        """True while the driver is running, and the device has not given up on the driver."""
        return self._common.status & (v.DRIVER_OK | v.NEEDS_RESET) == v.DRIVER_OK

    # --- the life of the VM -----------------------------------------------------------------------
    def pause(self) -> None:
        """Take no more work from the guest.

        The irqfds stay: to take one away costs the kernel a grace period. An interrupt KVM
        delivers by a work item may miss the APIC's state that way; :meth:`resume` raises the
        interrupt again, and the device its pending announcement: there is no other.
        """
        with self.device.lock:
            if self._paused:
                return
            self._paused = True
            if self.driver_ok:
                self.device.stop()

    def paused(self, timeout: float) -> bool:
        """Wait for the work in flight, at most ``timeout`` seconds, and return if all is done."""
        return self.device.stopped(timeout)

    def resume(self) -> None:
        """Serve the guest again, if paused."""
        with self.device.lock:
            if not self._paused:
                return
            self._paused = False
            self.msix.attach()
            if self.driver_ok:
                self._start()
                # A notification or interrupt may have been on its way when the VM stopped, here or
                # at a migration's source; both sides take a spurious one lightly.
                for index, queue in enumerate(self.device.queues):
                    if queue.enabled:
                        self._notifications.kick(index)
                        self.msix.signal(queue.vector)
            elif self._common.status & v.NEEDS_RESET:
                self.msix.signal(self._common.config_vector)

    def reset(self) -> None:
        """Return to the state after power-on."""
        with self.device.lock:
            self._reset_device()
            self.msix.reset()
            self.reset_config()

    def close(self) -> None:
        """Give the descriptors and the device's resources back."""
        with self.device.lock:
            self._notifications.close()
            self.msix.close()
        self.device.close()

    # --- setup hints ------------------------------------------------------------------------------
    def hints(self) -> SetupHints:
        """Return the address of the notifications, the MSI-X table and the features."""
        with self.device.lock:
            return SetupHints(
                self.bar or 0, self._notified(), self.msix.table, self.device.negotiated
            )

    def prepare(self, hints: SetupHints) -> None:
        """Set up what the driver's features need, the ioeventfds and the routes."""
        # A guess that the kernel refuses is none: the state that comes will be refused, or not.
        with self.device.lock, suppress(OSError, GuestError):
            self.device.prepare(hints.features)
            count = len(self.device.queues)
            if hints.bar and all(index < count for index in hints.queues):
                self._notifications.register(hints.bar + _NOTIFY, hints.queues)
            self.msix.prepare(hints.table)

    # --- saved state ------------------------------------------------------------------------------
    def save(self) -> VirtioState[Any]:
        """Return the transport's state and the device's own."""
        with self.device.lock:
            return VirtioState(self._save_transport(), self.device.save())

    def load(self, state: VirtioState[Any]) -> None:
        """Take over the transport's state and the device's own.

        Raises:
            StreamError: the device cannot be in the state; the message names the field.
        """
        with self.device.lock:
            self._load_transport(state.transport)
            self.device.load(state.device)

    def _save_transport(self) -> TransportState:
        return TransportState(
            self.save_config(),
            self.msix.save(),
            self._common.save(),
            self.device.negotiated,
            self._isr,
            self._cfg_access.save(),
            [queue.save() for queue in self.device.queues],
        )

    def _load_transport(self, state: TransportState) -> None:
        device = self.device
        if state.negotiated & ~device.offered:
            raise StreamError(
                f"negotiated: the guest uses features {state.negotiated & ~device.offered:#x} "
                "that are not offered here"
            )
        # What the register path refuses to a driver (3.1.1, 6.1), a peer does not get either.
        status = state.common.status
        # A driver that tried it has a device that needs its reset, and migrates with that.
        broken = status & v.NEEDS_RESET
        if status & v.DRIVER_OK and not status & v.FEATURES_OK and not broken:
            raise StreamError("common.status: DRIVER_OK without FEATURES_OK")
        agreed = status & v.FEATURES_OK or state.negotiated
        if agreed and not state.negotiated & v.F_VERSION_1:
            raise StreamError("negotiated: without VERSION_1")
        if len(state.queues) != len(device.queues):
            raise StreamError(f"queues: {len(state.queues)}, but {len(device.queues)} here")
        device.negotiated = state.negotiated
        self._common.load(state.common)
        self._isr = state.isr
        try:
            self.msix.load(state.msix)
            for queue, saved in zip(device.queues, state.queues, strict=True):
                queue.load(saved)
                if saved.ready and self.driver_ok:
                    queue.enable(state.negotiated)
        except (GuestError, ValueError) as error:
            raise StreamError(f"queues, msix: {error}") from error
        self.load_config(state.pci)
        self._cfg_access.load(state.cfg_access)
        # What was prepared and is not so must not stay, in the way of another device perhaps. What
        # is missing is registered at the start, when no device's is in the way.
        if self.driver_ok and self.bar is not None:
            self._notifications.keep(self.bar + _NOTIFY, self._notified())
        else:
            self._notifications.unregister()

    # --- configuration space ----------------------------------------------------------------------
    def read_config(self, offset: int, size: int) -> int:
        """Read configuration space: control from MSI-X, the access capability from BAR 0."""
        if offset < self._msix_at + 4 and offset + size > self._msix_at + 2:
            pack_into("<H", self.config, self._msix_at + 2, self.msix.control())
        if offset == self._cfg_access.data:
            at, length = self._cfg_access.target()
            if length:
                return self.read(at, length) & (1 << 8 * min(size, length)) - 1
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write configuration space in the way that :meth:`read_config` reads."""
        super().write_config(offset, size, value)
        if offset <= self._msix_at + 3 < offset + size:
            control = self.config[self._msix_at + 2 : self._msix_at + 4]
            with self.device.lock:
                self.msix.set_control(int.from_bytes(control, "little"))
        if offset == self._cfg_access.data:
            at, length = self._cfg_access.target()
            if length:
                self.write(at, length, value & (1 << 8 * length) - 1)

    def bar_moved(self) -> None:
        """Move the notification addresses along, if not paused."""
        with self.device.lock:
            if self._paused:
                return
            if self.device.started:
                self._register_notifications()
            else:
                self._notifications.unregister()

    def _register_notifications(self) -> None:
        if self.bar is None:
            self._notifications.unregister()
        else:
            self._notifications.register(self.bar + _NOTIFY, self._notified())

    def _notified(self) -> list[int]:
        return [index for index, queue in enumerate(self.device.queues) if queue.enabled]

    # --- the BAR ----------------------------------------------------------------------------------
    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads in the BAR."""
        with self.device.lock:
            if offset < _ISR:
                return self._common.read(offset) & (1 << 8 * size) - 1
            if offset < _DEVICE:
                value, self._isr = self._isr, 0  # reading ISR clears it (4.1.4.5)
                return value
            if offset < _TABLE:
                at = offset - _DEVICE
                return int.from_bytes(self.device.config()[at : at + size], "little")
            if offset < _PENDING:
                return self.msix.read_table(offset - _TABLE, size)
            if offset < _NOTIFY:
                return self.msix.read_pending(offset - _PENDING, size)
            return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes in the BAR: the device knows its writable bytes."""
        with self.device.lock:
            if self._resetting:
                return  # what is in flight is waited for, and the lock given away meanwhile
            if offset < _ISR:
                self._common.write(offset, size, value)
            elif _DEVICE <= offset < _TABLE:
                data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                with self.device.guarded("configuration"):
                    self.device.write_config(offset - _DEVICE, data)
            elif _TABLE <= offset < _PENDING:
                self.msix.write_table(offset - _TABLE, size, value)
            elif offset >= _NOTIFY:
                self._notifications.kick((offset - _NOTIFY) // STRIDE)

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset_device()
            return
        registers = self._common
        rising = value & ~registers.status
        if rising & v.FEATURES_OK and not self._accept_features():
            value &= ~v.FEATURES_OK
        registers.status |= value & v.DRIVER_BITS
        if rising & v.DRIVER_OK:
            if not registers.status & v.FEATURES_OK:
                self._guest_error("the driver is ready, but negotiated no features")
            elif not self._paused:
                self._enable_queues()

    def _accept_features(self) -> bool:
        device, wanted = self.device, self._common.driver_features
        if wanted & ~device.offered or not wanted & v.F_VERSION_1:
            return False
        device.negotiated = wanted
        return True

    def _enable_queues(self) -> None:
        with self.device.guarded():
            for queue in self.device.queues:
                if queue.ready:
                    queue.enable(self.device.negotiated)
            self._register_notifications()
            self.device.start()

    def _start(self) -> None:
        self._register_notifications()
        with self.device.guarded():
            self.device.start()

    def _reset_device(self) -> None:
        """Reset device and registers, once nothing of the driver's is in flight (2.4.1)."""
        self.device.stop()
        self._resetting = True
        try:
            while not self.device.stopped(1.0):
                pass  # a worker may still write to the memory that the driver gave it
        finally:
            self._resetting = False
        self._notifications.unregister()
        self.device.negotiated = 0
        for queue in self.device.queues:
            queue.reset()
        self.device.reset()
        self._common.clear()
        self._isr = 0

    def _guest_error(self, message: str) -> None:
        """Stop the device for a guest error, and ask for its reset. The VM lives."""
        if self.need_reset():
            self._on_guest_error(self.id, message)

    def need_reset(self) -> bool:
        """Stop the device until its driver resets it (2.1.1), and return False if so before."""
        self.device.stop()
        if self._common.status & v.NEEDS_RESET:
            return False
        self._common.status |= v.NEEDS_RESET
        if self._common.status & v.DRIVER_OK:
            self.signal_config()
        return True
