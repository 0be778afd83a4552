"""Register offsets and bits (SDM chapter 13, e1000_hw.h), and the registers of plain storage."""

from __future__ import annotations

from typing import NamedTuple

BAR_SIZE = 0x20000

CTRL, CTRL_DUP, STATUS = 0x0000, 0x0004, 0x0008
EECD, EERD, CTRL_EXT, MDIC = 0x0010, 0x0014, 0x0018, 0x0020
VET = 0x0038
ICR, ITR, ICS, IMS, IMC = 0x00C0, 0x00C4, 0x00C8, 0x00D0, 0x00D8
RCTL, TCTL = 0x0100, 0x0400
RDBAL, RDT = 0x2800, 0x2818
TDBAL, TDT = 0x3800, 0x3818
#: From a ring's base register on.
BAL, BAH, LEN, HEAD, TAIL = 0x00, 0x04, 0x08, 0x10, 0x18

CTRL_FD = 1 << 0
CTRL_RST = 1 << 26
CTRL_VME = 1 << 30
CTRL_PHY_RST = 1 << 31

STATUS_FD, STATUS_LU, STATUS_SPEED_1000 = 1 << 0, 1 << 1, 1 << 7

ICR_TXDW, ICR_TXQE = 1 << 0, 1 << 1
ICR_RXDMT0, ICR_RXT0, ICR_MDAC = 1 << 4, 1 << 7, 1 << 9
#: The causes that this controller has.
ICR_ALL = 0x1F2D7

RCTL_EN, RCTL_UPE, RCTL_MPE, RCTL_LPE = 1 << 1, 1 << 3, 1 << 4, 1 << 5
RCTL_RDMTS_SHIFT, RCTL_MO_SHIFT, RCTL_BSIZE_SHIFT = 8, 12, 16
RCTL_BAM, RCTL_VFE, RCTL_BSEX, RCTL_SECRC = 1 << 15, 1 << 18, 1 << 25, 1 << 26

TCTL_EN, TCTL_PSP = 1 << 1, 1 << 3

_ALL = 0xFFFF_FFFF


class Register(NamedTuple):
    """A register that keeps what is written, within ``mask``."""

    name: str
    mask: int = _ALL
    reset: int = 0


#: The registers that are saved, but for tables and counters. Reads of others give 0.
REGISTERS: dict[int, Register] = {
    CTRL: Register("CTRL", _ALL & ~(CTRL_RST | CTRL_PHY_RST), CTRL_FD),
    CTRL_EXT: Register("CTRL_EXT"),
    MDIC: Register("MDIC"),
    EERD: Register("EERD"),
    0x0028: Register("FCAL"),
    0x002C: Register("FCAH", 0xFFFF),
    0x0030: Register("FCT", 0xFFFF),
    VET: Register("VET", 0xFFFF, 0x8100),
    ICR: Register("ICR", ICR_ALL),
    ITR: Register("ITR", 0xFFFF),
    IMS: Register("IMS", ICR_ALL),
    RCTL: Register("RCTL", 0x07FF_FFFE),
    0x0170: Register("FCTTV", 0xFFFF),
    0x0178: Register("TXCW"),
    TCTL: Register("TCTL", 0x07FF_FFFA),
    0x0410: Register("TIPG", 0x3FFF_FFFF),
    0x0458: Register("AIT", 0xFFFF),
    0x0E00: Register("LEDCTL", _ALL, 0x0706_1302),
    0x1000: Register("PBA", 0xFFFF, 0x30),
    0x2160: Register("FCRTL", 0x8000_FFF8),
    0x2168: Register("FCRTH", 0x0000_FFF8),
    RDBAL + BAL: Register("RDBAL", _ALL & ~0xF),
    RDBAL + BAH: Register("RDBAH"),
    RDBAL + LEN: Register("RDLEN", 0xFFF80),
    RDBAL + HEAD: Register("RDH", 0xFFFF),
    RDT: Register("RDT", 0xFFFF),
    0x2820: Register("RDTR", 0xFFFF),
    0x2828: Register("RXDCTL"),
    0x282C: Register("RADV", 0xFFFF),
    0x2C00: Register("RSRPD", 0xFFF),
    TDBAL + BAL: Register("TDBAL", _ALL & ~0xF),
    TDBAL + BAH: Register("TDBAH"),
    TDBAL + LEN: Register("TDLEN", 0xFFF80),
    TDBAL + HEAD: Register("TDH", 0xFFFF),
    TDT: Register("TDT", 0xFFFF),
    0x3820: Register("TIDV", 0xFFFF),
    0x3828: Register("TXDCTL"),
    0x382C: Register("TADV", 0xFFFF),
    0x3830: Register("TSPMT"),
    0x5000: Register("RXCSUM", 0x7FF),
    0x5800: Register("WUC", 0xF),
    0x5808: Register("WUFC"),
    0x5820: Register("MANC"),
    0x5838: Register("IPAV"),
}

#: Tables: first offset, and how many registers.
MTA, MTA_COUNT = 0x5200, 128
RA, RA_COUNT = 0x5400, 32
VFTA, VFTA_COUNT = 0x5600, 128
STATISTICS, STATISTICS_COUNT = 0x4000, 64


def power_on() -> dict[int, int]:
    """Return the reset values of the registers."""
    return {offset: register.reset for offset, register in REGISTERS.items()}
