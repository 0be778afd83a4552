"""The platform of a PC as a stock kernel needs it: RAM, buses, PCI, serial, ACPI, Linux boot."""
