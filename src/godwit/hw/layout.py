"""The places of the fixed devices, which the ACPI tables describe before the devices are made.

ACPI 6.5, 4.8.3 'PM1 Event / Control registers'; the reset control register at 0xCF9 is Intel's (ICH
data sheets); 0xFE to port 0x64 pulses the reset line of an 8042.
"""

from __future__ import annotations

PM1_EVENT = 0x600
PM1_CONTROL = 0x604
#: General purpose events, block 0: status and enable (ACPI 6.5, 4.8.4.1).
GPE0 = 0x608
RESET_PORT = 0xCF9
KEYBOARD_COMMAND = 0x64
SCI_GSI = 9
SLEEP_TYPE_S5 = 5

#: The I/O APIC's pins that PCI slots share: those that no PC of old has a use for.
INTX_GSIS = range(16, 24)


def intx_gsi(slot: int) -> int:
    """Return the I/O APIC's pin of INTA of the device in ``slot``, as the DSDT's _PRT has it."""
    return INTX_GSIS[slot % len(INTX_GSIS)]
