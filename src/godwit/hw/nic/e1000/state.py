"""The saved state of an e1000, part by part."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.hw.pci import PciState
from godwit.spec.saved import U16, U32, U64


class EepromState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The progress of a driver that clocks a command through EECD."""

    eecd: Annotated[int, msgspec.Meta(ge=0, lt=1 << 7)]
    #: Start bit, two bits of opcode, six of address: those that came so far.
    command: Annotated[int, msgspec.Meta(ge=0, lt=1 << 9)]
    output: U16
    #: Bits of ``output`` that the chip has presented; -1 while it takes a command.
    presented: Annotated[int, msgspec.Meta(ge=-1, le=16)]


class FilterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tables, register by register: RAL0, RAH0, RAL1 and so on, then MTA, then VFTA."""

    ra: Annotated[list[U32], msgspec.Meta(min_length=32, max_length=32)]
    mta: Annotated[list[U32], msgspec.Meta(min_length=128, max_length=128)]
    vfta: Annotated[list[U32], msgspec.Meta(min_length=128, max_length=128)]


class MacState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of the controller behind its registers."""

    #: By name, all of :data:`.regs.REGISTERS`.
    registers: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=16)], U32], msgspec.Meta(max_length=64)
    ]
    filter: FilterState
    statistics: Annotated[list[U32], msgspec.Meta(min_length=64, max_length=64)]
    phy: Annotated[list[U16], msgspec.Meta(min_length=32, max_length=32)]
    eeprom: EepromState
    #: The halves of the context descriptors for checksums and for segmentation.
    contexts: Annotated[list[tuple[U64, U64]], msgspec.Meta(min_length=2, max_length=2)]
    broken: bool


class E1000State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of the whole device."""

    pci: PciState
    #: The I/O BAR, and the register that its data port reaches.
    io_bar: U32
    io_address: U32
    mac: MacState
