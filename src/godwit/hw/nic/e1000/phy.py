"""The PHY, Marvell's 88E1011, behind MDIC (SDM chapter 8, 13.4 MDIC, and IEEE 802.3 clause 22).

The link is up at 1000 Mb/s full duplex, and has been negotiated: a tap has no cable.
"""

from __future__ import annotations

from godwit.errors import StreamError

_COUNT = 32
_ADDRESS = 1
_WRITE, _READ = 1, 2
_READY, _INTERRUPT, _ERROR = 1 << 28, 1 << 29, 1 << 30

_RESET, _RESTART = 1 << 15, 1 << 9  # of the control register

#: After a reset. What is not here reads as 0.
_VALUES = {
    0: 0x1140,  # control: autonegotiation, full duplex, 1000 Mb/s
    1: 0x796D,  # status: link up, negotiation complete, extended status
    2: 0x0141,  # id 0x01410C20: M88E1011_I_PHY_ID (e1000_hw.h)
    3: 0x0C20,
    4: 0x01E1,  # advertised: 10 and 100 Mb/s, both duplex modes
    5: 0x41E1,  # the partner's: the same, no pause frames
    6: 0x0001,
    9: 0x0300,  # advertised: 1000 Mb/s
    10: 0x7C00,  # the partner's: 1000 Mb/s, receivers are fine
    15: 0x3000,  # extended status: 1000BASE-T
    16: 0x0068,  # 88E1011: PHY specific control
    17: 0xAC00,  # 88E1011: 1000 Mb/s, full duplex, resolved, link
    20: 0x0D60,  # 88E1011: extended specific control
}
_WRITABLE = (0, 4, 7, 9, 16, 18, 20, 24, 29, 30)


class Phy:
    """The 32 registers of the PHY."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set the registers as after power-on."""
        self._registers = [_VALUES.get(index, 0) for index in range(_COUNT)]

    def access(self, mdic: int) -> tuple[int, bool]:
        """Do the access of a write to MDIC, and return MDIC afterwards and whether to interrupt."""
        operation, address, index = mdic >> 26 & 3, mdic >> 21 & 31, mdic >> 16 & 31
        result = mdic & ~(_READY | _ERROR) | _READY
        if address != _ADDRESS or operation not in (_READ, _WRITE):
            result |= _ERROR
        elif operation == _READ:
            result = result & ~0xFFFF | self._registers[index]
        else:
            self._write(index, mdic & 0xFFFF)
        return result, bool(mdic & _INTERRUPT)

    def _write(self, index: int, value: int) -> None:
        if index not in _WRITABLE:
            return
        if index == 0:
            value &= ~(_RESET | _RESTART)  # both are done at once
        self._registers[index] = value

    def save(self) -> list[int]:
        """Return the registers of the PHY."""
        return list(self._registers)

    def load(self, registers: list[int]) -> None:
        """Take over the saved registers.

        Raises:
            StreamError: a register a driver cannot write has another value than here.
        """
        for index, value in enumerate(registers):
            if index not in _WRITABLE and value != _VALUES.get(index, 0):
                raise StreamError(f"phy: register {index} is {value:#x}, which it cannot be")
        self._registers[:] = registers
