"""The EEPROM: its words, and the two ways to read them (SDM 5.3 to 5.6, 13.4 EECD and EERD).

Drivers read words through EERD, or, as Linux does with this controller, clock a Microwire command
into EECD bit by bit. Words cannot be written: the MAC address is the host's to give.
"""

from __future__ import annotations

from godwit.errors import StreamError

from .state import EepromState

_WORDS = 64
_SUM = 0xBABA
_CHECKSUM_AT = 0x3F

_SK, _CS, _DI, _DO = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REQ, _GNT, _PRES = 1 << 6, 1 << 7, 1 << 8
_WRITABLE = _SK | _CS | _DI | 3 << 4 | _REQ

_EERD_START, _EERD_DONE = 1 << 0, 1 << 4

#: Start bit, two bits of opcode, six of address.
_COMMAND_BITS = 9
_READ = 0b110


def contents(mac: bytes) -> list[int]:
    """Return the 64 words of a NIC with this MAC address (SDM 5.6)."""
    words = [0] * _WORDS
    words[0:3] = [mac[i] | mac[i + 1] << 8 for i in (0, 2, 4)]
    words[0x08:0x0A] = 0xFFFF, 0xFFFF  # no printed board assembly number
    words[0x0A] = 0x4003  # initialization control 1: the signature; ids are in the next words
    words[0x0B], words[0x0C] = 0x001E, 0x8086  # subsystem id, subsystem vendor
    words[0x0D], words[0x0E] = 0x100E, 0x8086
    words[_CHECKSUM_AT] = _SUM - sum(words) & 0xFFFF
    return words


class Eeprom:
    """The chip and its two registers."""

    def __init__(self, mac: bytes) -> None:
        self._words = contents(mac)
        self.reset()

    def reset(self) -> None:
        """Forget the command that is under way."""
        self._eecd = 0
        self._command = self._output = 0
        self._presented = -1

    def read_by_eerd(self, value: int) -> int:
        """Return EERD's content after the guest wrote ``value`` there."""
        if not value & _EERD_START:
            return value & 0xFF00
        address = value >> 8 & 0xFF
        word = self._words[address] if address < _WORDS else 0xFFFF
        return word << 16 | address << 8 | _EERD_DONE

    def read_eecd(self) -> int:
        """Return EECD, with access granted at once and DO high while the chip is idle."""
        out = self._presented <= 0 or self._output >> 16 - self._presented & 1
        granted = _GNT if self._eecd & _REQ else 0
        return self._eecd | _PRES | granted | (_DO if out else 0)

    def write_eecd(self, value: int) -> None:
        """Write EECD: the chip samples DI at each rise of SK while CS is high."""
        before, self._eecd = self._eecd, value & _WRITABLE
        if not self._eecd & _CS:
            self._command, self._presented = 0, -1
        elif self._eecd & _SK and not before & _SK and before & _CS:
            self._clock(bool(value & _DI))

    def _clock(self, bit: bool) -> None:
        if self._presented >= 0:
            self._presented = min(self._presented + 1, 16)
            return
        # Zeros before the start bit leave the command at zero.
        self._command = (self._command << 1 | bit) & (1 << _COMMAND_BITS) - 1
        if self._command >> _COMMAND_BITS - 1:
            if self._command >> _COMMAND_BITS - 3 == _READ:
                self._output = self._words[self._command & _WORDS - 1]
                self._presented = 0
            else:
                self._command = 0  # writing and erasing: not with this one

    def save(self) -> EepromState:
        """Return the state of the chip."""
        return EepromState(self._eecd, self._command, self._output, self._presented)

    def load(self, state: EepromState) -> None:
        """Take over a saved state.

        Raises:
            StreamError: EECD has bits a driver cannot set.
        """
        if state.eecd & ~_WRITABLE:
            raise StreamError(f"eeprom.eecd: {state.eecd:#x} has bits that a driver cannot set")
        self._eecd, self._command = state.eecd, state.command
        self._output, self._presented = state.output, state.presented
