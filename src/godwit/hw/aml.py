"""The few AML encodings a small DSDT needs (ACPI 6.5, chapter 20)."""

from __future__ import annotations

from struct import pack


def pkg_length(body: bytes) -> bytes:
    """Put PkgLength (20.2.4), which counts its own bytes as well, in front of ``body``."""
    if len(body) + 1 < 0x40:
        return bytes((len(body) + 1,)) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << (4 + 8 * extra):
            lead = extra << 6 | (total & 0xF)
            return bytes((lead,)) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"AML package of {len(body)} bytes")


def name(path: str, value: bytes) -> bytes:
    """Return the encoding of ``Name (path, value)``."""
    return b"\x08" + _name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Return the encoding of ``Scope (path) {...}``."""
    return b"\x10" + pkg_length(_name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Return the encoding of ``Device (path) {...}``."""
    return b"\x5b\x82" + pkg_length(_name_string(path) + b"".join(terms))


def method(path: str, *terms: bytes) -> bytes:
    """Return the encoding of ``Method (path) {...}``, without arguments."""
    return b"\x14" + pkg_length(_name_string(path) + b"\0" + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """Return the encoding of ``Notify (path, value)``."""
    return b"\x86" + _path(path) + integer(value)


def text(value: str) -> bytes:
    """Return the encoding of a string constant."""
    return b"\x0d" + value.encode("ascii") + b"\0"


def package(*elements: bytes) -> bytes:
    """Return the encoding of ``Package () {...}``."""
    return b"\x12" + pkg_length(bytes((len(elements),)) + b"".join(elements))


def integer(value: int) -> bytes:
    """Return an integer constant in its shortest form."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value}")


def eisa_id(text: str) -> bytes:
    """Return an EISA id such as ``PNP0A03`` as a DWord (19.3.4)."""
    a, b, c = (ord(char) - 0x40 for char in text[:3])
    number = a << 26 | b << 21 | c << 16 | int(text[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


def resources(*descriptors: bytes) -> bytes:
    """Return ``ResourceTemplate () {...}`` as a Buffer, end tag included (6.4)."""
    body = b"".join(descriptors) + b"\x79\x00"
    return b"\x11" + pkg_length(integer(len(body)) + body)


def io_port(first: int, count: int) -> bytes:
    """Return an I/O port descriptor with a 16-bit decode (6.4.2.5)."""
    return b"\x47" + pack("<BHHBB", 1, first, first, 1, count)


def irq(line: int) -> bytes:
    """Return an IRQ descriptor for edges, active high (6.4.2.1)."""
    return b"\x22" + pack("<H", 1 << line)


def bus_range(first: int, last: int) -> bytes:
    """Return a ``WordBusNumber`` descriptor (6.4.3.5.3)."""
    return b"\x88" + pack("<HBBBHHHHH", 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1)


def io_range(first: int, last: int) -> bytes:
    """Return a ``WordIO`` descriptor of an entire range, produced by the bridge."""
    return b"\x88" + pack("<HBBBHHHHH", 13, 1, 0x0C, 3, 0, first, last, 0, last - first + 1)


def memory_range(first: int, last: int) -> bytes:
    """Return a ``DWordMemory`` descriptor, read-write, not cacheable, produced by the bridge."""
    return b"\x87" + pack("<HBBBIIIII", 23, 0, 0x0C, 1, 0, first, last, 0, last - first + 1)


def _path(path: str) -> bytes:
    """Return a path of several names, from the root (20.2.2)."""
    segments = path.lstrip("\\").split(".")
    names = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if len(segments) == 1:
        return b"\\" + names
    prefix = b"\x2e" if len(segments) == 2 else bytes((0x2F, len(segments)))
    return b"\\" + prefix + names


def _name_string(path: str) -> bytes:
    root = path.startswith("\\")
    return (b"\\" if root else b"") + path.lstrip("\\").ljust(4, "_").encode()
