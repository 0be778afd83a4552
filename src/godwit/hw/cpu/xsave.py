"""The layout of the XSAVE area (Intel SDM volume 1, chapter 13, and CPUID leaf 0xD)."""

from __future__ import annotations

from typing import NamedTuple

from godwit.host.kvm.cpuid import Entry

LEAF = 0xD
#: x87 and SSE are in every XSAVE area, at places of their own.
ALWAYS = 3
#: The legacy region and the header, bytes.
_FIRST = 512 + 64
_IN_XSS, _ALIGNED = 1, 2  # of ECX of a component's leaf
_NAMES = {
    0: "x87",
    1: "SSE",
    2: "AVX",
    3: "MPX bounds",
    4: "MPX configuration",
    5: "AVX-512 opmasks",
    6: "AVX-512 upper halves",
    7: "AVX-512 upper registers",
    8: "processor trace",
    9: "PKRU",
    10: "PASID",
    11: "CET user",
    12: "CET supervisor",
    13: "HDC",
    14: "user interrupts",
    15: "LBR",
    16: "HWP",
    17: "AMX tile configuration",
    18: "AMX tiles",
    19: "APX registers",
}


class Component(NamedTuple):
    """The place of a component in the XSAVE area, in bytes."""

    size: int
    offset: int
    flags: int

    def __str__(self) -> str:
        where = "" if self.flags & _IN_XSS else f" at {self.offset}"
        return f"{self.size} bytes{where}"


class Layout(NamedTuple):
    """The layout of a CPU's XSAVE area."""

    #: Components that XCR0 can enable, and those for IA32_XSS; a bit for each.
    user: int
    supervisor: int
    components: dict[int, Component]


def layout(entries: list[Entry]) -> Layout:
    """Return the layout in CPUID leaf 0xD."""
    leaves = {entry[1]: entry[3:] for entry in entries if entry[0] == LEAF}
    main, more = leaves.get(0, (0, 0, 0, 0)), leaves.get(1, (0, 0, 0, 0))
    user, supervisor = main[3] << 32 | main[0], more[3] << 32 | more[2]
    return Layout(
        user,
        supervisor,
        {
            number: Component(*leaves[number][:3])
            for number in range(2, 63)
            if (user | supervisor) >> number & 1 and number in leaves
        },
    )


def name(number: int) -> str:
    """Return the name of a component."""
    return _NAMES.get(number, f"component {number}")


def restricted(entries: list[Entry], user: int, supervisor: int) -> list[Entry]:
    """Return CPUID entries with these XSAVE components alone, and the sizes of those."""
    old = layout(entries)
    user, supervisor = user & old.user, supervisor & old.supervisor
    kept = {n: c for n, c in old.components.items() if (user | supervisor) >> n & 1}
    standard = max((c.offset + c.size for n, c in kept.items() if user >> n & 1), default=_FIRST)
    compact = _FIRST
    for _, component in sorted(kept.items()):
        if component.flags & _ALIGNED:
            compact = compact + 63 & ~63
        compact += component.size
    found = []
    for entry in entries:
        function, index, flags, eax, ebx, ecx, edx = entry
        if function != LEAF:
            found.append(entry)
        elif index == 0:
            standard = standard if user else 0
            eax, edx = user & 0xFFFFFFFF, user >> 32
            found.append((function, index, flags, eax, standard, standard, edx))
        elif index == 1:
            ebx = compact if ebx else 0
            ecx, edx = supervisor & 0xFFFFFFFF, supervisor >> 32
            found.append((function, index, flags, eax, ebx, ecx, edx))
        elif index in kept:
            found.append(entry)
    return found
