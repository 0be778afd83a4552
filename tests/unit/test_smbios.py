"""SMBIOS tables, by the specification and by dmidecode."""

from __future__ import annotations

import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from godwit.errors import ConfigError
from godwit.hw import smbios
from godwit.hw.memory import GuestMemory
from godwit.spec.config import SystemInfo, parse_smbios

UUID = "550e8400-e29b-41d4-a716-446655440000"
INFO = SystemInfo(
    serial="ds=nocloud",
    uuid=uuid.UUID(UUID).bytes,
    strings=("io.systemd.credential:ssh.authorized_keys.root=x", "second"),
)


def _written(memory: GuestMemory, info: SystemInfo) -> tuple[bytes, bytes]:
    """The entry point and the structures, as a kernel finds them."""
    smbios.write_tables(memory, info, "godwit-0.3")
    entry = bytes(memory.read(smbios.ENTRY_POINT, 24))
    assert entry[:5] == b"_SM3_"
    assert sum(entry) & 0xFF == 0
    assert (entry[6], entry[7], entry[8], entry[10]) == (24, 3, 6, 1)
    length, at = struct.unpack_from("<IQ", entry, 12)
    return entry, bytes(memory.read(at, length))


@pytest.mark.skipif(shutil.which("dmidecode") is None, reason="needs dmidecode")
def test_dmidecode_reads_what_the_operator_said(memory: GuestMemory, tmp_path: Path) -> None:
    entry, tables = _written(memory, INFO)
    moved = bytearray(entry[:16] + (32).to_bytes(8, "little"))
    moved[5] = 0
    moved[5] = -sum(moved) & 0xFF
    dump = tmp_path / "dump"
    dump.write_bytes(bytes(moved).ljust(32, b"\0") + tables)
    done = subprocess.run(
        ["dmidecode", "--from-dump", str(dump)], capture_output=True, text=True, check=True
    )
    for words in (
        "SMBIOS 3.6.0 present",
        "Manufacturer: Godwit",
        "Product Name: KVM Virtual Machine",
        "Version: godwit-0.3",
        "Serial Number: ds=nocloud",
        f"UUID: {UUID}",
        "System is a virtual machine",
        "String 1: io.systemd.credential:ssh.authorized_keys.root=x",
        "String 2: second",
    ):
        assert words in done.stdout
    assert "rong" not in done.stdout + done.stderr
    assert "nvalid" not in done.stdout + done.stderr


def test_the_structures_end_and_nothing_is_behind(memory: GuestMemory) -> None:
    _, tables = _written(memory, SystemInfo())
    kinds = []
    at = 0
    while at < len(tables):
        kinds.append(tables[at])
        end = tables.index(b"\0\0", at + tables[at + 1])
        at = end + 2
    assert kinds == [0, 1, 127]
    assert at == len(tables)


def test_strings_that_do_not_fit_are_refused(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="shorter --oem-string"):
        smbios.write_tables(memory, SystemInfo(strings=("x" * 30_000,) * 3), "v")


def test_the_machine_in_words() -> None:
    found = parse_smbios(f"serial=a b,uuid={UUID},product=p", ["x=y"])
    assert found == SystemInfo("Godwit", "p", "a b", uuid.UUID(UUID).bytes, ("x=y",))
    assert parse_smbios(None, []) == SystemInfo()


@pytest.mark.parametrize(
    ("text", "strings"),
    [
        ("x=1", []),
        ("serial", []),
        ("serial=", []),
        ("serial=a\nb", []),
        ("serial=a,serial=b", []),
        ("uuid=1234", []),
        ("uuid=" + "g" * 36, []),
        (None, [""]),
        (None, ["a\0b"]),
        (None, ["\udcff"]),
        (None, ["x" * 40_000]),
        (None, ["x"] * 256),
    ],
)
def test_words_that_are_none(text: str | None, strings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--smbios|--oem-string"):
        parse_smbios(text, strings)
