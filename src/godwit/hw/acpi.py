"""ACPI tables (ACPI 6.5, chapter 5) that describe CPUs, PCI and the power button to a stock kernel.

Without the tables Debian's kernel, which has no MP tables (MPPARSE is off), finds no local APIC and
no MSI, and virtio-pci fails to probe.
"""

from __future__ import annotations

import os
from struct import pack

from . import aml, layout
from .memory import HOLE_START, GuestMemory

RSDP_ADDRESS = 0xE0000
_TABLES_ADDRESS = 0xE0040
#: The generation's number and event (:mod:`.generation`) and pvpanic's port (:mod:`.pvpanic`),
#: which this module does not import: a guest's first instructions wait for it.
GENERATION, GENERATION_EVENT, PANIC_PORT = 0xEF000, 5, 0x505
_LOCAL_APIC = 0xFEE00000
_IO_APIC = 0xFEC00000
#: Addresses for PCI devices: below the I/O APIC, above RAM.
PCI_RANGE = (HOLE_START, _IO_APIC - 1)

_OEM = (b"GODWIT", b"GODWITVM", 1, b"GDWT", 1)

# FADT flags (table 5.10): WBINVD works, C1 works, no sleep button, reset register works.
_FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 10
# IA-PC boot flags (table 5.11): legacy devices (the UART); no VGA, no CMOS clock; 8042 absent.
_BOOT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5


def write_tables(memory: GuestMemory, cpus: int, informs: bool = False) -> None:
    """Put the tables into the BIOS area, the RSDP at :data:`RSDP_ADDRESS`.

    With ``informs`` the DSDT has pvpanic and the generation, whose number is written, too.
    """
    address = _TABLES_ADDRESS
    placed: dict[bytes, int] = {}

    def place(table: bytes, align: int = 16) -> int:
        nonlocal address
        address = -(-address // align) * align
        at = address
        memory.write(at, table)
        placed[table[:4]] = at
        address += len(table)
        return at

    facs = place(pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2), align=64)
    dsdt = place(_table(b"DSDT", 2, _dsdt(informs)))
    fadt = place(_table(b"FACP", 6, _fadt(facs, dsdt, informs)))
    madt = place(_table(b"APIC", 5, _madt(cpus)))
    xsdt = place(_table(b"XSDT", 1, pack("<QQ", fadt, madt)))
    memory.write(RSDP_ADDRESS, _rsdp(xsdt))
    if informs:
        memory.write(GENERATION, os.urandom(16))


def _sum(data: bytes) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, *_OEM)
    table = bytearray(header + body)
    table[9] = _sum(bytes(table))
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    first = bytearray(pack("<8sB6sBI", b"RSD PTR ", 0, _OEM[0], 2, 0))
    first[8] = _sum(bytes(first))
    whole = bytearray(bytes(first) + pack("<IQB3x", 36, xsdt, 0))
    whole[32] = _sum(bytes(whole))
    return bytes(whole)


def _register(port: int, bits: int) -> bytes:
    """Return a generic address structure in I/O space (5.2.3.2), all zeros for port 0."""
    return pack("<BBBBQ", 1, bits, 0, 0, port) if port else bytes(12)


def _fadt(facs: int, dsdt: int, informs: bool) -> bytes:
    event, control = layout.PM1_EVENT, layout.PM1_CONTROL
    events, length = (layout.GPE0, 4) if informs else (0, 0)
    body = pack("<IIBBHIBBBB", facs, dsdt, 0, 0, layout.SCI_GSI, 0, 0, 0, 0, 0)
    # PM1a/b event, PM1a/b control, PM2 control, PM timer, GPE0/1, and their lengths.
    body += pack("<IIIIIIII", event, 0, control, 0, 0, 0, events, 0)
    body += pack("<BBBBBBBB", 4, 2, 0, 0, length, 0, 0, 0)
    # C2/C3 latency beyond the limit (absent), flush, duty, RTC alarms.
    body += pack("<HHHHBBBBBHBI", 101, 1001, 0, 0, 0, 0, 0, 0, 0, _BOOT_FLAGS, 0, _FADT_FLAGS)
    body += _register(layout.RESET_PORT, 8) + pack("<BHB", 6, 0, 5)
    body += pack("<QQ", 0, dsdt)
    body += _register(event, 32) + _register(0, 0) + _register(control, 16) + _register(0, 0)
    body += _register(0, 0) * 2 + _register(events, 8 * length)  # PM2, PM timer, GPE0
    body += _register(0, 0) * 3  # GPE1, sleep control, sleep status
    return body + pack("<8s", b"GODWIT")


def _madt(cpus: int) -> bytes:
    body = pack("<II", _LOCAL_APIC, 1)
    for cpu in range(cpus):
        body += pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += pack("<BBBBII", 1, 12, 0, 0, _IO_APIC, 0)
    # The SCI is level-triggered, active high: flags 0xD (5.2.12.5).
    return body + pack("<BBBBIH", 2, 10, 0, layout.SCI_GSI, layout.SCI_GSI, 0x0D)


def _interrupt_route(slot: int) -> bytes:
    """Return the route of INTA to a pin of the I/O APIC, without a link device (6.2.13)."""
    function = aml.integer(slot << 16 | 0xFFFF)
    pin, source = aml.integer(0), aml.integer(0)
    return aml.package(function, pin, source, aml.integer(layout.intx_gsi(slot)))


def _informers() -> tuple[bytes, bytes]:
    """Return the devices below the system bus, and the method of the generation's event."""
    panic = aml.device(
        "PEVT",
        aml.name("_HID", aml.text("QEMU0001")),
        aml.name("_STA", aml.integer(0xF)),
        aml.name("_CRS", aml.resources(aml.io_port(PANIC_PORT, 1))),
    )
    generation = aml.device(
        "VGEN",
        aml.name("_HID", aml.text("GDWT0001")),
        aml.name("_CID", aml.text("VM_Gen_Counter")),
        aml.name("_DDN", aml.text("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(GENERATION), aml.integer(0))),
    )
    event = aml.method(f"_E{GENERATION_EVENT:02X}", aml.notify("\\_SB.VGEN", 0x80))
    return panic + generation, aml.scope("\\_GPE", event)


def _dsdt(informs: bool) -> bytes:
    first, last = PCI_RANGE
    host_bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_range(0, 0),
                aml.io_port(0xCF8, 8),
                aml.io_range(0, 0xCF7),
                aml.io_range(0xD00, 0xFFFF),
                aml.memory_range(first, last),
            ),
        ),
        aml.name("_PRT", aml.package(*(_interrupt_route(slot) for slot in range(1, 32)))),
    )
    uart = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io_port(0x3F8, 8), aml.irq(4))),
    )
    sleep = aml.integer(layout.SLEEP_TYPE_S5)
    s5 = aml.name("\\_S5", aml.package(sleep, sleep, aml.integer(0), aml.integer(0)))
    devices, events = _informers() if informs else (b"", b"")
    return aml.scope("\\_SB", host_bridge, uart, devices) + events + s5
