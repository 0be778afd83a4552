"""ACPI tables: found the way a kernel finds them, and each field where the specification has it."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from godwit.hw import acpi, aml, layout
from godwit.hw.memory import GuestMemory


class Tables:
    """The tables of a machine with ``cpus`` vCPUs, from the RSDP on."""

    def __init__(self, memory: GuestMemory, cpus: int, informs: bool = False) -> None:
        self._memory = memory
        memory.write(0xE0000, bytes(0x20000))
        acpi.write_tables(memory, cpus, informs)
        self.rsdp = memory.read(0xE0000, 36)
        self.xsdt = self.table(struct.unpack_from("<Q", self.rsdp, 24)[0])
        entries = [at for (at,) in struct.iter_unpack("<Q", self.xsdt[36:])]
        self.by_name = {memory.read(at, 4): self.table(at) for at in entries}
        self.fadt = self.by_name[b"FACP"]
        self.madt = self.by_name[b"APIC"]
        self.dsdt = self.table(struct.unpack_from("<I", self.fadt, 40)[0])

    def table(self, at: int) -> bytes:
        """A table by its address, its sum checked."""
        assert 0xE0000 < at < 0x100000
        assert at % 16 == 0
        table = self._memory.read(at, struct.unpack("<I", self._memory.read(at + 4, 4))[0])
        assert sum(table) & 0xFF == 0
        return table


@pytest.fixture
def tables(memory: GuestMemory) -> Tables:
    return Tables(memory, 3)


def test_the_rsdp(tables: Tables) -> None:
    assert tables.rsdp[:8] == b"RSD PTR "
    assert sum(tables.rsdp[:20]) & 0xFF == sum(tables.rsdp) & 0xFF == 0
    assert tables.rsdp[15] == 2
    assert struct.unpack_from("<I", tables.rsdp, 20)[0] == 36


def test_the_xsdt_names_fadt_and_madt(tables: Tables) -> None:
    assert tables.xsdt[:4] == b"XSDT"
    assert set(tables.by_name) == {b"FACP", b"APIC"}
    assert tables.dsdt[:4] == b"DSDT"


def test_the_fadt(tables: Tables) -> None:
    fadt = tables.fadt
    assert (len(fadt), fadt[8]) == (276, 6)
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (0, dsdt)
    assert facs % 64 == 0
    assert struct.unpack_from("<H", fadt, 46)[0] == layout.SCI_GSI
    assert struct.unpack_from("<I", fadt, 48)[0] == 0  # no SMI command: ACPI mode is on
    event, _, control = struct.unpack_from("<III", fadt, 56)
    assert (event, control, fadt[88], fadt[89]) == (0x600, 0x604, 4, 2)
    assert struct.unpack_from("<BBBBQ", fadt, 148) == (1, 32, 0, 0, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 0, 0x604)
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & 1 << 10  # the reset register works
    assert not flags & (1 << 4 | 1 << 20)  # a fixed power button; not hardware-reduced
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 0, 0xCF9, 6)


def test_the_facs(memory: GuestMemory, tables: Tables) -> None:
    at = struct.unpack_from("<I", tables.fadt, 36)[0]
    facs = memory.read(at, 64)
    assert facs[:8] == b"FACS" + struct.pack("<I", 64)
    assert facs[32] == 2  # version, behind the 64-bit waking vector
    assert facs[8:32] == bytes(24)
    assert facs[33:] == bytes(31)


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_the_madt(memory: GuestMemory, cpus: int) -> None:
    madt = Tables(memory, cpus).madt
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    found: dict[int, list[bytes]] = {}
    at = 44
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        found.setdefault(kind, []).append(madt[at : at + length])
        at += length
    assert at == len(madt)
    assert [struct.unpack("<BBBBI", one)[2:] for one in found[0]] == [
        (i, i, 1) for i in range(cpus)
    ]
    assert [struct.unpack("<BBBBII", one)[4:] for one in found[1]] == [(0xFEC0_0000, 0)]
    (override,) = found[2]
    assert struct.unpack("<BBBBIH", override)[3:] == (9, 9, 0x0D)


def test_the_dsdt_has_the_bridge_the_uart_and_s5(tables: Tables) -> None:
    body = tables.dsdt[36:]
    for wanted in (
        b"\\_SB_",
        b"PCI0",
        b"_HID\x0c\x41\xd0\x0a\x03",  # EISAID("PNP0A03")
        b"_HID\x0c\x41\xd0\x05\x01",  # EISAID("PNP0501")
        b"\x08\\_S5_\x12",
        b"\x47\x01\xf8\x03\xf8\x03\x01\x08",  # IO (0x3F8, 8)
        b"\x22\x10\x00",  # IRQNoFlags {4}
    ):
        assert body.count(wanted) == 1, wanted
    window = struct.pack("<III", 0, 0xC000_0000, 0xFEBF_FFFF)
    assert body.count(window + struct.pack("<II", 0, 0x3EC0_0000)) == 1


def test_the_dsdt_routes_inta_of_every_slot(tables: Tables) -> None:
    body = tables.dsdt[36:]
    at = body.index(b"\x08_PRT\x12") + 6
    end, at = at + _pkg_length(body, at)[0], _pkg_length(body, at)[1]
    assert body[at] == 31
    at += 1
    for slot in range(1, 32):
        # Package (4) {slot << 16 | 0xFFFF, pin, no link device, the I/O APIC's pin}
        entry = struct.pack("<BI", 0x0C, slot << 16 | 0xFFFF) + bytes((0, 0, 0x0A, 16 + slot % 8))
        assert body[at : at + 3] == bytes((0x12, len(entry) + 2, 4))
        assert body[at + 3 : at + 3 + len(entry)] == entry
        assert layout.intx_gsi(slot) == 16 + slot % 8
        at += 3 + len(entry)
    assert at == end


def test_the_dsdt_is_terms_that_fill_it(tables: Tables) -> None:
    body = tables.dsdt[36:]
    assert body[0] == 0x10
    length, at = _pkg_length(body, 1)
    assert body[at : at + 5] == b"\\_SB_"
    rest = body[1 + length :]
    assert rest[:6] == b"\x08\\_S5_"
    length, at = _pkg_length(rest, 7)
    assert 7 + length == len(rest)
    assert rest[at:] == b"\x04\x0a\x05\x0a\x05\x00\x00"


def _pkg_length(data: bytes, at: int) -> tuple[int, int]:
    """(length, where what follows it begins), by 20.2.4."""
    extra = data[at] >> 6
    if not extra:
        return data[at] & 0x3F, at + 1
    value = data[at] & 0xF
    for i in range(extra):
        value |= data[at + 1 + i] << 4 + 8 * i
    return value, at + 1 + extra


@pytest.mark.parametrize("size", [0, 1, 62, 63, 64, 4093, 4094, 100_000, (1 << 20) - 4, 1 << 20])
def test_package_lengths(size: int) -> None:
    encoded = aml.pkg_length(bytes(size))
    length, at = _pkg_length(encoded, 0)
    assert length == len(encoded)
    assert len(encoded) - at == size


def test_a_package_too_long() -> None:
    with pytest.raises(ValueError, match="AML package"):
        aml.pkg_length(bytes(1 << 28))


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\0"),
        (1, b"\1"),
        (2, b"\x0a\2"),
        (0xFF, b"\x0a\xff"),
        (0x100, b"\x0b\0\1"),
        (0x1_0000, b"\x0c\0\0\1\0"),
        (1 << 32, b"\x0e\0\0\0\0\1\0\0\0"),
    ],
)
def test_integers(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


def test_an_integer_too_large() -> None:
    with pytest.raises(ValueError, match="AML integer"):
        aml.integer(1 << 64)


def test_names_are_padded() -> None:
    assert aml.name("AB", b"\1") == b"\x08AB__\1"
    assert aml.scope("\\_SB", b"x") == b"\x10\x07\\_SB_x"


def test_resources_end_with_their_tag_and_count_themselves() -> None:
    assert aml.resources(aml.irq(4)) == b"\x11\x08\x0a\x05\x22\x10\x00\x79\x00"
    for large in (aml.bus_range(0, 255), aml.io_range(0, 1), aml.memory_range(0, 1)):
        assert struct.unpack_from("<H", large, 1)[0] == len(large) - 3


# --- what the newest machine type adds ------------------------------------------------------------
def test_general_purpose_events_are_described_where_they_are(memory: GuestMemory) -> None:
    fadt = Tables(memory, 1, informs=True).fadt
    assert struct.unpack_from("<I", fadt, 80)[0] == layout.GPE0
    assert fadt[92] == 4
    assert struct.unpack_from("<BBBBQ", fadt, 220) == (1, 32, 0, 0, layout.GPE0)
    old = Tables(memory, 1).fadt
    assert (struct.unpack_from("<I", old, 80)[0], old[92]) == (0, 0)


def test_a_generation_is_a_random_number_of_each_boot(memory: GuestMemory) -> None:
    seen = set()
    for _ in range(3):
        Tables(memory, 1, informs=True)
        seen.add(bytes(memory.read(acpi.GENERATION, 16)))
    assert len(seen) == 3
    assert bytes(16) not in seen


@pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (acpica-tools)")
@pytest.mark.parametrize("informs", [False, True])
def test_iasl_finds_no_fault(memory: GuestMemory, tmp_path: Path, informs: bool) -> None:
    tables = Tables(memory, 2, informs)
    names = {"dsdt": tables.dsdt, "facp": tables.fadt, "apic": tables.madt, "xsdt": tables.xsdt}
    for name, table in names.items():
        (tmp_path / f"{name}.aml").write_bytes(table)
        taken_apart = subprocess.run(
            ["iasl", "-d", f"{name}.aml"], cwd=tmp_path, capture_output=True, text=True
        )
        assert taken_apart.returncode == 0, taken_apart.stderr
        done = subprocess.run(
            ["iasl", "-we", f"{name}.dsl"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 Errors, 0 Warnings" in done.stdout, done.stdout
