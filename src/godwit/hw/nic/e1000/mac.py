"""The controller behind its registers (SDM chapter 13), without PCI and without a tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from godwit.errors import StreamError
from godwit.hw.device import guarded
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.nic import RxFilterInfo

from . import regs
from .eeprom import Eeprom
from .offload import Context
from .phy import Phy
from .receive import Receiver
from .rxfilter import RxFilter
from .state import MacState
from .statistics import Statistics
from .transmit import Transmitter


class Wires(NamedTuple):
    """The functions by which the controller acts on its surroundings."""

    #: Send a frame with its virtio_net_hdr.
    send: Callable[[bytes], None]
    #: Set the interrupt line; called when the level may have changed.
    interrupt: Callable[[bool], None]
    #: Look at the receiver: turned on or off, or with space for more.
    receive: Callable[[], None]
    #: Send the frames that wait.
    transmit: Callable[[], None]
    #: Report the rule that the guest broke.
    guest_error: Callable[[str], None]
    #: Report that the receive filter changed.
    filter: Callable[[], None]


class Mac:
    """The controller, which is not thread-safe, as the NIC's lock covers each access."""

    def __init__(self, memory: GuestMemory, mac: bytes, wires: Wires) -> None:
        self._wires = wires
        self._registers = regs.power_on()
        self.eeprom = Eeprom(mac)
        self.phy = Phy()
        self.filter = RxFilter(mac)
        self.statistics = Statistics()
        self.receiver = Receiver(memory, self._registers, self.filter, self.statistics)
        self.transmitter = Transmitter(memory, self._registers, self.statistics, wires.send)
        #: True from a guest error until the guest resets the controller.
        self.broken = False
        self._readers: dict[int, Callable[[], int]] = {
            regs.CTRL_DUP: lambda: self._registers[regs.CTRL],
            regs.STATUS: lambda: regs.STATUS_FD | regs.STATUS_LU | regs.STATUS_SPEED_1000,
            regs.EECD: self.eeprom.read_eecd,
            regs.ICR: self._take_causes,
            regs.ICS: lambda: 0,
            regs.IMC: lambda: 0,
        }
        self._writers: dict[int, Callable[[int], None]] = {
            regs.CTRL: self._control,
            regs.CTRL_DUP: self._control,
            regs.EECD: self.eeprom.write_eecd,
            regs.EERD: self._eerd,
            regs.MDIC: self._mdic,
            regs.ICR: lambda value: self._set_causes(self._registers[regs.ICR] & ~value),
            regs.ICS: self.raise_causes,
            regs.IMS: lambda value: self._set_mask(self._registers[regs.IMS] | value),
            regs.IMC: lambda value: self._set_mask(self._registers[regs.IMS] & ~value),
            regs.RCTL: self._receive_control,
            regs.RDT: lambda value: self._store_and(regs.RDT, value, wires.receive),
            regs.TCTL: lambda value: self._store_and(regs.TCTL, value, wires.transmit),
            regs.TDT: lambda value: self._store_and(regs.TDT, value, wires.transmit),
        }

    # --- what the guest does ----------------------------------------------------------------------
    def read(self, offset: int) -> int:
        """Return the register at ``offset``, a multiple of four, as the guest reads it."""
        reader = self._readers.get(offset)
        if reader is not None:
            return reader()
        if offset in self._registers:
            return self._registers[offset]
        if 0 <= offset - regs.STATISTICS < 4 * regs.STATISTICS_COUNT:
            return self.statistics.read(offset)
        found = self.filter.table(offset)
        return found[0][found[1]] if found else 0

    def write(self, offset: int, value: int) -> None:
        """Take the guest's write of the register at ``offset``, a multiple of four."""
        writer = self._writers.get(offset)
        if writer is not None:
            writer(value)
        elif offset in self._registers:
            self._registers[offset] = value & regs.REGISTERS[offset].mask
        elif found := self.filter.table(offset):
            self.filter.write(*found, value)
            self._wires.filter()

    def _store_and(self, offset: int, value: int, notify: Callable[[], None]) -> None:
        self._registers[offset] = value & regs.REGISTERS[offset].mask
        notify()

    def _receive_control(self, value: int) -> None:
        self._store_and(regs.RCTL, value, self._wires.receive)
        self._wires.filter()

    def _control(self, value: int) -> None:
        if value & regs.CTRL_RST:
            self.reset()
            return
        if value & regs.CTRL_PHY_RST:
            self.phy.reset()
        self._registers[regs.CTRL] = value & regs.REGISTERS[regs.CTRL].mask

    def _eerd(self, value: int) -> None:
        self._registers[regs.EERD] = self.eeprom.read_by_eerd(value)

    def _mdic(self, value: int) -> None:
        self._registers[regs.MDIC], interrupt = self.phy.access(value)
        if interrupt:
            self.raise_causes(regs.ICR_MDAC)

    def reset(self) -> None:
        """Reset all but the PCI configuration, by CTRL.RST or at power-on."""
        self._registers.update(regs.power_on())
        for part in (self.eeprom, self.phy, self.filter, self.statistics, self.transmitter):
            part.reset()
        self.broken = False
        self._interrupt()
        self._wires.receive()

    # --- interrupts -------------------------------------------------------------------------------
    @property
    def interrupting(self) -> bool:
        """True while a cause that is not masked waits."""
        return bool(self._registers[regs.ICR] & self._registers[regs.IMS])

    def raise_causes(self, causes: int) -> None:
        """Note interrupt causes in ICR."""
        self._set_causes(self._registers[regs.ICR] | causes)

    def _take_causes(self) -> int:
        causes = self._registers[regs.ICR]
        self._set_causes(0)  # cleared by reading
        return causes

    def _set_causes(self, causes: int) -> None:
        self._registers[regs.ICR] = causes & regs.ICR_ALL
        self._interrupt()

    def _set_mask(self, mask: int) -> None:
        self._registers[regs.IMS] = mask & regs.ICR_ALL
        self._interrupt()

    def _interrupt(self) -> None:
        self._wires.interrupt(self.interrupting)

    # --- frames -----------------------------------------------------------------------------------
    @property
    def receiving(self) -> bool:
        """True while the receiver is on."""
        return bool(self._registers[regs.RCTL] & regs.RCTL_EN) and not self.broken

    def accepts(self, frame: memoryview) -> bool:
        """Return whether the guest wants ``frame``."""
        return self.receiver.accepts(frame)

    def received(self) -> None:
        """Notify the guest of delivered frames."""
        low = regs.ICR_RXDMT0 if self.receiver.is_low() else 0
        self.raise_causes(regs.ICR_RXT0 | low)

    def transmit(self) -> bool:
        """Send some of the frames that wait, and return whether more can be sent at once."""
        if self.broken or not self._registers[regs.TCTL] & regs.TCTL_EN:
            return False
        causes, more = 0, False
        with guarded(self.guest_error):
            causes, more = self.transmitter.run()
        if causes:
            self.raise_causes(causes)
        return more

    def guest_error(self, message: str) -> None:
        """Report a broken rule, and carry no frames until the guest resets the controller.

        The VM goes on.
        """
        if not self.broken:
            self.broken = True
            self._wires.receive()
            self._wires.guest_error(message)

    def view_filter(self) -> RxFilterInfo:
        """Return the receive filter in words."""
        return self.filter.view(self._registers[regs.RCTL])

    # --- saved state ------------------------------------------------------------------------------
    def save(self) -> MacState:
        """Return the state of the controller."""
        named = {regs.REGISTERS[at].name: value for at, value in self._registers.items()}
        contexts = [(context.lower, context.upper) for context in self.transmitter.contexts]
        return MacState(
            registers=named,
            filter=self.filter.save(),
            statistics=self.statistics.save(),
            phy=self.phy.save(),
            eeprom=self.eeprom.save(),
            contexts=contexts,
            broken=self.broken,
        )

    def load(self, state: MacState) -> None:
        """Take over a saved state.

        Raises:
            StreamError: the controller cannot be in the state; the message names the field.
        """
        known = {register.name: at for at, register in regs.REGISTERS.items()}
        if state.registers.keys() != known.keys():
            odd = ", ".join(sorted(state.registers.keys() ^ known.keys()))
            raise StreamError(f"registers: not the ones of this controller ({odd})")
        for name, value in state.registers.items():
            if value & ~regs.REGISTERS[known[name]].mask:
                raise StreamError(f"registers: {name} is {value:#x}, which it cannot be")
        self.phy.load(state.phy)
        self.eeprom.load(state.eeprom)
        self.filter.load(state.filter)
        self.statistics.load(state.statistics)
        self._registers.update((known[name], value) for name, value in state.registers.items())
        self.transmitter.contexts = [Context(*halves) for halves in state.contexts]
        self.broken = state.broken
