"""The comparison of what a guest was told with what a host can give, in sentences for people.

Every function is pure. Lists of names are bounded: the CPUID may be a hostile source's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from godwit.host.kvm.cpuid import Entry

from . import xsave
from .features import DEPRECATIONS, EAX, EBX, EDX, KVM_FEATURES, features, names_of
from .features import Register as _Register
from .msrs import named

#: A TSC that differs by no more is the same: KVM's own tolerance, tsc_tolerance_ppm
#: (arch/x86/kvm/x86.c).
TSC_PPM = 250
_MOST_NAMES = 20

#: Numbers of which a guest may be told as much as the host has: register, first bit, bits, name.
SIZES: tuple[tuple[_Register, int, int, str], ...] = (
    ((0x80000008, 0, EAX), 0, 8, "physical address bits"),
    ((0x80000008, 0, EAX), 8, 8, "linear address bits"),
    ((0xA, 0, EAX), 0, 8, "as version of performance monitoring"),
    ((0xA, 0, EAX), 8, 8, "performance counters"),
    ((0xA, 0, EAX), 16, 8, "bits in a performance counter"),
    ((0xA, 0, EDX), 0, 5, "fixed performance counters"),
    ((0xA, 0, EDX), 5, 8, "bits in a fixed performance counter"),
    ((0x80000022, 0, EBX), 0, 4, "core performance counters"),
)
#: Bits of the MSR ARCH_CAPABILITIES (Intel SDM volume 4, table 2-2).
_CAPABILITIES = {
    **dict(enumerate(["RDCL_NO", "IBRS_ALL", "RSBA", "SKIP_L1DFL_VMENTRY", "SSB_NO", "MDS_NO"])),
    **dict(enumerate(["IF_PSCHANGE_MC_NO", "TSX_CTRL", "TAA_NO"], 6)),
    **dict(enumerate(["SBDR_SSDP_NO", "FBSDP_NO", "PSDP_NO"], 13)),
    **dict(enumerate(["GDS_CTRL", "GDS_NO", "RFDS_NO", "RFDS_CLEAR"], 25)),
    17: "FB_CLEAR",
    19: "RRSBA",
    20: "BHI_NO",
    24: "PBRSB_NO",
    62: "ITS_NO",
}
#: Of those, RSBA and RRSBA: to have them is worse.
_WORSE = 1 << 2 | 1 << 19
#: Leaves that describe a thing which a guest uses as described, or not at all.
EXACT = {
    0x12: "SGX",
    0x14: "processor trace",
    0x1D: "AMX tiles",
    0x1E: "AMX multiplication",
    0x24: "AVX10",
}


def lacks(
    told: list[Entry], offered: list[Entry], who: str = "the guest was told", whose: str = "this"
) -> list[str]:
    """Return a sentence for each kind of thing in ``told`` and not in ``offered``.

    Both are the CPUID of a first vCPU. ``who`` begins a sentence, ``whose`` CPU lacks the thing.
    """
    vendors = vendor(told), vendor(offered)
    if vendors[0] != vendors[1]:
        return [
            f"{who} that its CPU is of {vendors[0]}, {whose} CPU is of {vendors[1]}: no guest can "
            "change between vendors, with any --cpu"
        ]
    missing = list(_missing(told, offered))
    of_kvm = [name for register, name in missing if register[0] == KVM_FEATURES]
    # Each once: AMD repeats some in another leaf.
    of_cpu = [*dict.fromkeys(name for register, name in missing if register[0] != KVM_FEATURES)]
    found = []
    for names, where in ((of_cpu, f"{whose} CPU"), (of_kvm, f"{whose} host's KVM")):
        if names:
            found.append(f"{who} {listed(names)}, {where} has {_none(names)}")
    found += _xsave_differences(told, offered, who, whose)
    found += _smaller(told, offered, who, whose)
    found += _other_leaves(told, offered, who, whose)
    return found


def lacks_capabilities(told: int, here: int) -> list[str]:
    """Return a sentence about what a guest does not mitigate and the CPU here needs, if any."""
    missing = told & ~here & ~_WORSE | here & ~told & _WORSE
    if not missing:
        return []
    names = [_CAPABILITIES.get(bit, f"bit {bit}") for bit in range(64) if missing >> bit & 1]
    return [
        f"the guest was told {told:#x} in the MSR ARCH_CAPABILITIES, this CPU has {here:#x}, which "
        f"differs in {listed(names)}: the guest would not mitigate what this CPU needs"
    ]


def lacks_msrs(told: Iterable[int], settable: Iterable[int]) -> list[str]:
    """Return a sentence about the MSRs of a guest's state KVM lacks here, if there are some."""
    missing = sorted(set(told) - set(settable))
    if not missing:
        return []
    names = [named(index) for index in missing]
    return [f"the guest's state has MSR {listed(names)}, this host's KVM has {_none(names)}"]


def same_rate(khz: int, other: int) -> bool:
    """Return True if two TSC rates are within KVM's tolerance."""
    return abs(khz - other) * 1_000_000 <= TSC_PPM * khz


def vendor(entries: list[Entry]) -> str:
    """Return the vendor's name in CPUID leaf 0, printable."""
    _, ebx, ecx, edx = _leaf(entries, 0)
    name = b"".join(value.to_bytes(4, "little") for value in (ebx, edx, ecx))
    return "".join(chr(byte) if 32 < byte < 127 else "?" for byte in name)


def listed(names: Sequence[str]) -> str:
    """Return names as a list for people, of a bounded length."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _none(names: Sequence[str]) -> str:
    return "none" if len(names) == 1 else "none of them"


def _leaf(entries: list[Entry], function: int, index: int = 0) -> tuple[int, int, int, int]:
    for entry in entries:
        if entry[:2] == (function, index):
            return entry[3:]
    return 0, 0, 0, 0


def _missing(told: list[Entry], offered: list[Entry]) -> Iterator[tuple[_Register, str]]:
    ours = features(offered)
    for register, bits in features(told).items():
        missing = bits & ~ours.get(register, 0) & ~DEPRECATIONS.get(register, 0)
        for name in names_of(register, missing):
            yield register, name


def _xsave_differences(
    told: list[Entry], offered: list[Entry], who: str, whose: str
) -> Iterator[str]:
    theirs, ours = xsave.layout(told), xsave.layout(offered)
    missing = theirs.user & ~ours.user | theirs.supervisor & ~ours.supervisor
    if missing:
        names = [xsave.name(number) for number in range(64) if missing >> number & 1]
        yield f"{who} XSAVE state {listed(names)}, {whose} CPU has {_none(names)}"
    for number, place in theirs.components.items():
        here = ours.components.get(number)
        if here is not None and here != place:
            yield (
                f"{who} XSAVE state {xsave.name(number)} of {place}, {whose} CPU has it in {here}"
            )


def _smaller(told: list[Entry], offered: list[Entry], who: str, whose: str) -> Iterator[str]:
    for (function, index, which), first, width, name in SIZES:
        theirs, ours = (
            _leaf(entries, function, index)[which] >> first & (1 << width) - 1
            for entries in (told, offered)
        )
        if theirs > ours:
            yield f"{who} {theirs} {name}, {whose} CPU has {ours}"
    # Events that leaf 0xA calls unavailable: a bit that is clear was promised.
    if _leaf(told, 0xA)[EAX] & 0xFF:
        promised = ~_leaf(told, 0xA)[EBX] & (1 << (_leaf(told, 0xA)[EAX] >> 24)) - 1
        lost = promised & _leaf(offered, 0xA)[EBX]
        if lost:
            yield f"{who} the performance events {lost:#x} of leaf 0xA, {whose} CPU has none"


def _other_leaves(told: list[Entry], offered: list[Entry], who: str, whose: str) -> Iterator[str]:
    ours = {entry[:2]: entry[3:] for entry in offered}
    differing = {
        entry[0]
        for entry in told
        if entry[0] in EXACT and any(entry[3:]) and ours.get(entry[:2]) != entry[3:]
    }
    for function in sorted(differing):
        yield f"{who} {EXACT[function]} as CPUID {function:X} has it, {whose} CPU has other values"
