"""The common configuration registers of the PCI transport (virtio 1.2, 4.1.4.3)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from godwit.spec.saved import U8, U16, U32, U64

from .device import DRIVER_OK, FEATURES_OK, VirtioDevice

SIZE = 0x38  # struct virtio_pci_common_cfg up to queue_device
NO_VECTOR = 0xFFFF

_QUEUE_ADDRESSES = ((0x20, "desc"), (0x28, "avail"), (0x30, "used"))


class CommonState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved registers of the common configuration.

    A driver may stand between any two accesses when the VM stops.
    """

    status: U8
    generation: U8
    config_vector: U16
    feature_select: U32
    driver_feature_select: U32
    driver_features: U64
    queue_select: U16


class CommonConfig:
    """The common registers, with ``set_status(value)`` called for each write of the status."""

    def __init__(
        self, device: VirtioDevice, vectors: int, set_status: Callable[[int], None]
    ) -> None:
        self._device = device
        self._vectors = vectors
        self._set_status = set_status
        self._generation = 0
        self._seen: bytes | None = None
        self.clear()

    def clear(self) -> None:
        """Clear the registers as after a device reset. The generation goes on."""
        self.status = 0
        self.config_vector = NO_VECTOR
        self.driver_features = 0
        self._feature_select = self._driver_feature_select = self._queue_select = 0

    def changed(self) -> None:
        """Begin a new generation: the configuration will be announced as changed."""
        self._generation = self._generation + 1 & 0xFF
        self._seen = self._device.config()

    def save(self) -> CommonState:
        """Return the state of the registers, while paused."""
        return CommonState(
            self.status,
            self._generation,
            self.config_vector,
            self._feature_select,
            self._driver_feature_select,
            self.driver_features,
            self._queue_select,
        )

    def load(self, state: CommonState) -> None:
        """Take over a saved state."""
        self.status = state.status
        self._generation = state.generation
        self.config_vector = self._vector(state.config_vector)
        self._feature_select = state.feature_select
        self._driver_feature_select = state.driver_feature_select
        self.driver_features = state.driver_features
        self._queue_select = state.queue_select
        self._seen = None

    def read(self, offset: int) -> int:
        """Return the register at ``offset``, perhaps wider than asked for, or 0 where none is."""
        queues = self._device.queues
        if offset == 0x15:
            return self._current_generation()
        if offset < 0x18:
            return {
                0x00: self._feature_select,
                0x04: _word(self._device.offered, self._feature_select),
                0x08: self._driver_feature_select,
                0x0C: _word(self.driver_features, self._driver_feature_select),
                0x10: self.config_vector,
                0x12: len(queues),
                0x14: self.status,
                0x16: self._queue_select,
            }.get(offset, 0)
        if self._queue_select >= len(queues):
            return 0
        queue = queues[self._queue_select]
        return {
            0x18: queue.size,
            0x1A: queue.vector,
            0x1C: int(queue.ready),
            0x1E: self._queue_select,  # queue_notify_off
            0x20: queue.desc,
            0x24: queue.desc >> 32,
            0x28: queue.avail,
            0x2C: queue.avail >> 32,
            0x30: queue.used,
            0x34: queue.used >> 32,
        }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the guest's write, which leaves what is read-only, or fixed by now, as it is."""
        if offset == 0x00:
            self._feature_select = value & 0xFFFFFFFF
        elif offset == 0x08:
            self._driver_feature_select = value & 0xFFFFFFFF
        elif offset == 0x0C:
            if self._driver_feature_select < 2 and not self.status & FEATURES_OK:
                shift = 32 * self._driver_feature_select
                self.driver_features &= ~(0xFFFFFFFF << shift)
                self.driver_features |= (value & 0xFFFFFFFF) << shift
        elif offset == 0x10:
            self.config_vector = self._vector(value & 0xFFFF)
        elif offset == 0x14:
            self._set_status(value & 0xFF)
        elif offset == 0x16:
            self._queue_select = value & 0xFFFF
        elif self._queue_select < len(self._device.queues):
            self._write_queue(offset, size, value)

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        index = self._queue_select
        queue = self._device.queues[index]
        if offset == 0x1A:
            queue.vector = self._vector(value & 0xFFFF)
            if self._device.started:
                self._device.vector_changed(index)
            return
        if queue.ready or self.status & DRIVER_OK:
            return  # the rest is fixed once the queue is enabled (4.1.4.3.2)
        if offset == 0x18:
            queue.size = value & 0xFFFF
        elif offset == 0x1C:
            queue.ready = value & 0xFFFF == 1
        else:
            for at, field in _QUEUE_ADDRESSES:
                if at <= offset < at + 8:
                    shift = 8 * (offset - at)
                    mask = (1 << 8 * size) - 1
                    old = getattr(queue, field)
                    new = (old & ~(mask << shift) | (value & mask) << shift) & (1 << 64) - 1
                    setattr(queue, field, new)

    def _vector(self, value: int) -> int:
        return value if value < self._vectors else NO_VECTOR

    def _current_generation(self) -> int:
        """Return a new generation if the configuration changed since the last look (4.1.4.3.1).

        A driver that reads the generation before and after the configuration sees every change:
        those that come with an interrupt, and those its own control commands make.
        """
        now = self._device.config()
        if self._seen is not None and now != self._seen:
            self._generation = self._generation + 1 & 0xFF
        self._seen = now
        return self._generation


def _word(value: int, select: int) -> int:
    return value >> 32 * select & 0xFFFFFFFF if select < 2 else 0
