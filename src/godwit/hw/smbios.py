"""SMBIOS tables (DMTF DSP0134, 3.6): the machine in words, and strings of the operator's.

Type 0 (firmware), 1 (system), 11 (OEM strings: systemd reads its credentials from there,
systemd.io/CREDENTIALS) and 127 (end). Linux looks for the entry point at each sixteenth byte from
0xF0000 to 0xFFFFF (drivers/firmware/dmi_scan.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack

from godwit.errors import ConfigError
from godwit.spec.config import SystemInfo

from .memory import GuestMemory

ENTRY_POINT = 0xF0000
_TABLES = 0xF0020
_END = 0x100000

#: BIOS characteristics (7.1.1): bit 3, not supported; extension byte 2 (7.1.2.2): a virtual
#: machine, without UEFI.
_CHARACTERISTICS, _IS_VIRTUAL = 1 << 3, 1 << 4
_WAKE_POWER_SWITCH = 6  # 7.2.2


def write_tables(memory: GuestMemory, info: SystemInfo, version: str) -> None:
    """Put the tables into the BIOS area.

    Raises:
        ConfigError: the strings do not fit; the message names the limit.
    """
    tables = _bios() + _system(info, version)
    if info.strings:
        tables += _structure(11, 3, pack("<B", len(info.strings)), info.strings)
    tables += _structure(127, 4, b"", ())
    most = _END - _TABLES
    if len(tables) > most:
        raise ConfigError(
            f"the SMBIOS tables have {len(tables)} bytes, of {most}; give shorter --oem-string"
        )
    memory.write(_TABLES, tables)
    memory.write(ENTRY_POINT, _entry_point(len(tables)))


def _entry_point(length: int) -> bytes:
    """Return the 64-bit entry point (5.2.2)."""
    entry = bytearray(pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 6, 0, 1, 0, length, _TABLES))
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry)


def _structure(kind: int, handle: int, body: bytes, strings: Sequence[str]) -> bytes:
    """Return a structure: header, formatted part, and the strings behind (6.1.3)."""
    text = b"".join(string.encode() + b"\0" for string in strings) or b"\0"
    return pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"


def _bios() -> bytes:
    # Vendor, version, segment, release date, ROM size, characteristics, extension bytes, releases
    # of BIOS and of an embedded controller (none), extended ROM size (7.1).
    body = pack("<BBHBBQ", 1, 2, 0xF000, 3, 0, _CHARACTERISTICS)
    body += pack("<BBBBBBH", 0, _IS_VIRTUAL, 0, 0, 255, 255, 0)
    return _structure(0, 1, body, ("Godwit", "1", "11/26/2026"))


def _system(info: SystemInfo, version: str) -> bytes:
    strings = [info.manufacturer, info.product, version]
    serial = 0
    if info.serial:
        strings.append(info.serial)
        serial = len(strings)
    uuid = info.uuid or bytes(16)
    # The first three fields of a UUID are little-endian (7.2.1).
    uuid = uuid[3::-1] + uuid[5:3:-1] + uuid[7:5:-1] + uuid[8:]
    body = pack("<BBBB16sBBB", 1, 2, 3, serial, uuid, _WAKE_POWER_SWITCH, 0, 0)
    return _structure(1, 2, body, strings)
