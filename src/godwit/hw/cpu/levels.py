"""The named baselines x86-64-v2 and x86-64-v3: the same CPU on every host of the level.

The levels are the psABI's (x86-64 psABI supplement, 3.1.1 'Processor Architecture'). What a stock
kernel needs beside is what QEMU's qemu64 and kvm64 have (target/i386/cpu.c): paging, APIC, machine
checks, MTRRs. Everything else is masked, the mitigations of the host's CPU among it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from struct import unpack_from

from godwit.errors import HostError
from godwit.host.kvm.cpuid import Entry

from .compare import listed, vendor
from .consistent import with_bits
from .features import AMD_COPIES, EDX, Register, bits_of, features, names_of

_BOOT = (
    "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse "
    "sse2 x2apic hypervisor syscall nx lm"
)
_V2 = f"{_BOOT} sse3 ssse3 cx16 sse4.1 sse4.2 popcnt lahf_lm"
_V3 = f"{_V2} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
#: The names of the levels, each with the features that a host must have.
LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3}
#: Kept where the host has them: a guest that finds them finds the same in them. KVM's are those of
#: Linux 5.8.
_KEPT = (
    "arat kvmclock kvm_nopiodelay kvmclock2 kvm_steal_time kvm_pv_eoi kvm_pv_unhalt "
    "kvm_pv_tlb_flush kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvmclock_stable"
)
#: Leaves that are left; the others are of features that are not.
_LEAVES = frozenset(
    (
        *(0, 1, 2, 4, 6, 7, 0xB, 0xD, 0x40000000, 0x40000001),
        *range(0x80000000, 0x80000009),
    )
)
#: The highest leaf that is left, by the function that has it.
_HIGHEST = {0: 0xD, 0x40000000: 0x40000001, 0x80000000: 0x80000008}
_BRAND = range(0x80000002, 0x80000005)
#: CPUs of the level, as leaf 1 EAX: Nehalem and Haswell, as QEMU's models have them, and the first
#: EPYC. A guest's kernel chooses its workarounds by them, so they are not older than the CPUs.
_SIGNATURES = {
    ("GenuineIntel", "x86-64-v2"): 0x000106A3,
    ("GenuineIntel", "x86-64-v3"): 0x000306C4,
    ("AuthenticAMD", "x86-64-v2"): 0x00800F12,
    ("AuthenticAMD", "x86-64-v3"): 0x00800F12,
}
#: 512 GiB: what CPUs with nested paging have at the least, but for the first of them.
_PHYSICAL_BITS = 39
_LINEAR_BITS = 48


def level(entries: list[Entry], name: str, off: Collection[str] = ()) -> list[Entry]:
    """Return the first vCPU's CPUID, masked to a level and with the level's own identity.

    ``off``: features of the level to do without.

    Raises:
        HostError: the host lacks what the level asks for.
    """
    asked = [feature for feature in LEVELS[name].split() if feature not in off]
    _check(entries, name, bits_of(*asked))
    keep = bits_of(*asked, *_KEPT.split())
    keep[0x80000001, 0, EDX] |= AMD_COPIES & keep[1, 0, EDX]
    signature = _SIGNATURES.get((vendor(entries), name))
    found = [
        _identified(entry, name, signature)
        for entry in entries
        if entry[0] in _LEAVES and (entry[0] != 7 or entry[1] == 0)
    ]
    return with_bits(found, keep)


def _check(entries: list[Entry], name: str, required: Mapping[Register, int]) -> None:
    own = features(entries)
    missing = [
        feature
        for register, bits in required.items()
        for feature in names_of(register, bits & ~own.get(register, 0))
    ]
    if missing:
        raise HostError(
            f"--cpu {name} asks for {listed(missing)}, which this host's CPU lacks; choose another "
            "baseline, or leave features out with NAME=off"
        )
    for function, _, _, eax, *_ in entries:
        if function == 0x80000008 and eax & 0xFF < _PHYSICAL_BITS:
            raise HostError(
                f"--cpu {name} asks for {_PHYSICAL_BITS} physical address bits, and this host's "
                f"CPU has {eax & 0xFF}; make a baseline with 'godwit cpu baseline'"
            )


def _identified(entry: Entry, name: str, signature: int | None) -> Entry:
    """Return an entry without what tells one CPU of a level from another, but its caches."""
    function, index, flags, eax, ebx, ecx, edx = entry
    if function in _HIGHEST:
        eax = min(eax, _HIGHEST[function])
    elif function == 1:
        # Of EBX the brand index goes.
        eax, ebx = signature or eax, ebx & ~0xFF
    elif function == 0x80000001:
        eax, ebx = (signature or eax) if eax else 0, 0
    elif function == 7:
        eax = 0
    elif function in (6, 0x40000001, 0x80000007):
        # The features are masked by who calls.
        ebx = ecx = 0
    elif function in _BRAND:
        brand = f"Godwit {name}".encode().ljust(48, b"\0")
        eax, ebx, ecx, edx = unpack_from("<IIII", brand, 16 * _BRAND.index(function))
    elif function == 0x80000008:
        eax, edx = _LINEAR_BITS << 8 | _PHYSICAL_BITS, 0
    return function, index, flags, eax, ebx, ecx, edx
