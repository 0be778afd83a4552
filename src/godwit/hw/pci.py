"""A PCI bus: configuration mechanism #1, configuration spaces, a memory BAR and an I/O BAR each.

PCI Local Bus 3.0, 3.2.2.3.2 (0xCF8/0xCFC) and chapter 6 (configuration space).
"""

from __future__ import annotations

import threading
from struct import pack_into

import msgspec

from godwit.spec.saved import U8, U16, U32

from .bus import BusDevice, MmioBus, PortBus
from .device import Device

CONFIG_ADDRESS = 0xCF8

COMMAND, STATUS = 0x04, 0x06
BAR0 = 0x10
_BARS_END = 0x28
CAPABILITY_POINTER = 0x34
INTERRUPT_PIN = 0x3D
_COMMAND_IO = 1 << 0
_COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_OFF = 1 << 10
STATUS_INTERRUPT = 1 << 3
_STATUS_CAPABILITIES = 1 << 4


class PciState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of a configuration space the guest can change."""

    command: U16
    bar0: U32
    line: U8


class PciFunction:
    """Configuration space of a function, in which only bits of the write mask ever change.

    A subclass answers its BAR's accesses with ``read`` and ``write`` (see :class:`BusDevice`).
    """

    def __init__(
        self, vendor: int, device: int, class_code: int, subsystem: tuple[int, int], revision: int
    ) -> None:
        self.config = bytearray(256)
        self._mask = bytearray(256)
        self._capabilities = 0x40
        self._last_capability = CAPABILITY_POINTER
        pack_into("<HH", self.config, 0, vendor, device)
        pack_into("<I", self.config, 8, class_code << 8 | revision)
        pack_into("<HH", self.config, 0x2C, *subsystem)
        self._mask[COMMAND] = _COMMAND_MEMORY | COMMAND_MASTER
        self._mask[COMMAND + 1] = COMMAND_INTX_OFF >> 8
        self._mask[0x3C] = 0xFF  # interrupt line: scratch for the guest
        self._bus: PciBus | None = None
        self._bar_size = 0
        self._bar_home = 0
        self._bar_mapped: int | None = None
        self._io: _IoBar | None = None

    def add_bar(self, size: int, address: int) -> None:
        """Add BAR 0, 32-bit memory of ``size`` bytes, placed as firmware would."""
        self._bar_size = size
        self._bar_home = address
        pack_into("<I", self.config, BAR0, address)
        pack_into("<I", self._mask, BAR0, -size & 0xFFFFFFFF)

    def add_io_bar(self, index: int, size: int, port: int, device: BusDevice) -> None:
        """Add BAR ``index``: ``size`` ports that ``device`` answers, placed as firmware would."""
        at = BAR0 + 4 * index
        self._io = _IoBar(at, size, port, device)
        pack_into("<I", self.config, at, port | 1)
        pack_into("<I", self._mask, at, -size & 0xFFFFFFFF)
        self._mask[COMMAND] |= _COMMAND_IO

    def add_capability(self, kind: int, body: bytes, mask: bytes = b"") -> int:
        """Append a capability and return its offset. ``mask`` has the writable bits of ``body``."""
        at = self._capabilities
        self.config[self._last_capability] = at
        self.config[at : at + 2 + len(body)] = bytes((kind, 0)) + body
        self._mask[at + 2 : at + 2 + len(mask)] = mask
        self._last_capability = at + 1
        self._capabilities = at + (2 + len(body) + 3) // 4 * 4
        self.config[STATUS] |= _STATUS_CAPABILITIES
        return at

    @property
    def bar(self) -> int | None:
        """The address of BAR 0 now, or None while memory decoding is off."""
        return self._bar_mapped

    def read_config(self, offset: int, size: int) -> int:
        """Return what the guest reads in configuration space."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take the guest's write of configuration space."""
        for i in range(size):
            at = offset + i
            mask = self._mask[at]
            self.config[at] = self.config[at] & ~mask | value >> 8 * i & mask
        if offset < _BARS_END and offset + size > COMMAND:
            self._remap()
            self._remap_io()

    def reset_config(self) -> None:
        """Restore what firmware leaves: decoding off, the BARs at their first places."""
        if self._io is not None:
            self.write_config(self._io.at, 4, self._io.home)
        self._set_state(PciState(0, self._bar_home, 0))

    def save_config(self) -> PciState:
        """Return the registers the guest can change."""
        return PciState(self.read_config(COMMAND, 2), self.read_config(BAR0, 4), self.config[0x3C])

    def load_config(self, state: PciState) -> None:
        """Take over a saved state as if the guest wrote the registers, so masks hold."""
        self._set_state(state)

    def _set_state(self, state: PciState) -> None:
        self.write_config(BAR0, 4, state.bar0)
        self.write_config(COMMAND, 2, state.command)
        self.write_config(0x3C, 1, state.line)

    def _remap(self) -> None:
        on = self.config[COMMAND] & _COMMAND_MEMORY
        wanted = self.read_config(BAR0, 4) & 0xFFFFFFF0 if on and self._bar_size else None
        if wanted == self._bar_mapped or self._bus is None:
            return
        self._bus.mmio.unmap(self)
        self._bar_mapped = None
        if wanted is not None and self._bus.mmio.map(wanted, self._bar_size, self):
            self._bar_mapped = wanted
        self.bar_moved()

    def _remap_io(self) -> None:
        io, bus = self._io, self._bus
        if io is None or bus is None or bus.ports is None:
            return
        on = self.config[COMMAND] & _COMMAND_IO
        wanted = self.read_config(io.at, 4) & ~3 if on else None
        if wanted == io.mapped:
            return
        if io.mapped is not None:
            bus.ports.unmap(io.mapped, io.size)
            io.mapped = None
        # Ports of the platform's own devices stay theirs.
        if wanted is not None and bus.ports.claim(wanted, io.size, io.device):
            io.mapped = wanted

    def bar_moved(self) -> None:
        """React to a new place of BAR 0, or to none. Subclasses move their ioeventfds."""

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads in BAR 0."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the guest's write in BAR 0."""


class _IoBar:
    """An I/O BAR: its offset in configuration space, its size, and its ports now."""

    def __init__(self, at: int, size: int, home: int, device: BusDevice) -> None:
        self.at = at
        self.size = size
        self.home = home
        self.device = device
        self.mapped: int | None = None


class PciBusState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of the host bridge."""

    #: The address register: a vCPU may stop between its two accesses.
    address: U32


class PciBus(Device):
    """Bus 0 and its host bridge, which answers the eight ports from 0xCF8.

    ``ports`` is the bus for I/O BARs, if they have one.
    """

    kind = "pci-host"
    State = PciBusState

    def __init__(self, mmio: MmioBus, ports: PortBus | None = None) -> None:
        self.id = "pci0"
        self.mmio = mmio
        self.ports = ports
        self._functions: dict[int, PciFunction] = {}
        self._address = 0
        self._lock = threading.Lock()
        # The host bridge that Linux expects to see first: Intel's 440FX.
        self.add(0, PciFunction(0x8086, 0x1237, 0x060000, (0, 0), 2))

    def add(self, slot: int, function: PciFunction) -> None:
        """Plug ``function`` in as device ``slot`` (0 to 31)."""
        self._functions[slot] = function
        function._bus = self

    def read(self, offset: int, size: int) -> int:
        """Read the address at 0xCF8, or at 0xCFC the configuration space the address names."""
        with self._lock:
            if offset < 4:
                return self._address >> 8 * offset & (1 << 8 * size) - 1
            function, register = self._selected(offset)
            if function is None or register + size > 256:
                return (1 << 8 * size) - 1
            return function.read_config(register, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the registers that :meth:`read` reads."""
        with self._lock:
            if offset == 0 and size == 4:
                self._address = value
            elif offset >= 4:
                function, register = self._selected(offset)
                if function is not None and register + size <= 256:
                    function.write_config(register, size, value)

    def reset(self) -> None:
        """Set the address register to zero."""
        self._address = 0

    def save(self) -> PciBusState:
        """Return the address register's value."""
        return PciBusState(self._address)

    def load(self, state: PciBusState) -> None:
        """Take over a saved address register."""
        self._address = state.address

    def _selected(self, offset: int) -> tuple[PciFunction | None, int]:
        address = self._address
        if not address >> 31 or address >> 8 & 0xFF07:  # enabled; bus and function are 0
            return None, 0
        return self._functions.get(address >> 11 & 31), (address & 0xFC) + offset - 4
