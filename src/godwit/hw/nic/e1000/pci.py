"""The controller on the PCI bus (SDM chapter 4): registers in BAR 0, and again behind two ports.

Linux resets an 82540EM through the ports, for the chip cannot answer that write on the memory side
(e1000_reset_hw).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from godwit.hw import pci
from godwit.hw.pci import PciFunction

from . import regs
from .mac import Mac

VENDOR, DEVICE = 0x8086, 0x100E
_SUBSYSTEM = (0x8086, 0x001E)  # PRO/1000 MT Desktop Adapter
_REVISION = 2
_IO_BAR, _IO_SIZE = 2, 64
_IO_BAR_AT = pci.BAR0 + 4 * _IO_BAR
_IOADDR, _IODATA = 0, 4


class E1000Pci(PciFunction):
    """Configuration space, BARs and INTA. ``poke`` is called when DMA may have become possible."""

    def __init__(
        self,
        mac: Mac,
        lock: threading.RLock,
        bar: int,
        port: int,
        intx: Callable[[bool], None],
        poke: Callable[[], None],
    ) -> None:
        super().__init__(VENDOR, DEVICE, 0x020000, _SUBSYSTEM, _REVISION)
        self._mac = mac
        self._lock = lock
        self._intx = intx
        self._poke = poke
        self._io_address = 0
        self._level = False
        self.add_bar(regs.BAR_SIZE, bar)
        self.add_io_bar(_IO_BAR, _IO_SIZE, port, _Ports(self))
        self.config[pci.INTERRUPT_PIN] = 1  # INTA

    @property
    def may_dma(self) -> bool:
        """True while the guest lets the function read and write guest memory."""
        return bool(self.read_config(pci.COMMAND, 2) & pci.COMMAND_MASTER)

    def update_line(self, always: bool = False) -> None:
        """Set INTA to the controller's level, with ``always`` even if unchanged."""
        wanted = self._mac.interrupting
        status = self.config[pci.STATUS] & ~pci.STATUS_INTERRUPT
        self.config[pci.STATUS] = status | (pci.STATUS_INTERRUPT if wanted else 0)
        if self.read_config(pci.COMMAND, 2) & pci.COMMAND_INTX_OFF:
            wanted = False
        if always or wanted != self._level:
            self._level = wanted
            self._intx(wanted)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write configuration space, of which the command register rules line and DMA."""
        super().write_config(offset, size, value)
        if offset < pci.STATUS + 2 and offset + size > pci.COMMAND:
            with self._lock:
                self.update_line()
                self._poke()

    # --- BAR 0 ------------------------------------------------------------------------------------
    def read(self, offset: int, size: int) -> int:
        """Return a register, which is read whole. Any other access gives 0."""
        if size != 4 or offset & 3:
            return 0
        with self._lock:
            return self._mac.read(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register, which is written whole. Any other access is lost."""
        if size == 4 and not offset & 3:
            with self._lock:
                self._mac.write(offset, value)

    # --- the I/O BAR ------------------------------------------------------------------------------
    def read_port(self, offset: int, size: int) -> int:
        """Return IOADDR, or the register that IOADDR names."""
        if offset == _IOADDR and size == 4:
            return self._io_address
        if offset == _IODATA and self._io_address < regs.BAR_SIZE:
            return self.read(self._io_address, size)
        return 0

    def write_port(self, offset: int, size: int, value: int) -> None:
        """Write IOADDR, or the register that IOADDR names."""
        if offset == _IOADDR and size == 4:
            self._io_address = value
        elif offset == _IODATA and self._io_address < regs.BAR_SIZE:
            self.write(self._io_address, size, value)

    def save_io(self) -> tuple[int, int]:
        """Return the I/O BAR and IOADDR."""
        return self.read_config(_IO_BAR_AT, 4), self._io_address

    def load_io(self, bar: int, address: int) -> None:
        """Take over the I/O BAR and IOADDR, before the rest of the configuration."""
        self.write_config(_IO_BAR_AT, 4, bar)
        self._io_address = address

    def reset_io(self) -> None:
        """Set IOADDR as after power-on."""
        self._io_address = 0


class _Ports:
    """The I/O BAR's side of the function, a :class:`godwit.hw.bus.BusDevice`."""

    def __init__(self, function: E1000Pci) -> None:
        self._function = function

    def read(self, offset: int, size: int) -> int:
        """Return the value for an ``in``."""
        return self._function.read_port(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Do an ``out`` to the ports."""
        self._function.write_port(offset, size, value)
