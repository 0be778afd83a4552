"""Unlike hosts' CPUs, as KVM shows them (KVM_GET_SUPPORTED_CPUID), cut to what matters."""

from __future__ import annotations

from collections.abc import Collection

from godwit.host.kvm.cpuid import Entry
from godwit.hw.cpu.features import bits_of

from .kvm import MSRS, FakeCpu

_V3 = (
    "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 "
    "x2apic syscall nx lm sse3 ssse3 cx16 sse4.1 sse4.2 popcnt lahf_lm avx avx2 bmi1 bmi2 f16c fma "
    "abm movbe xsave hypervisor aes pclmulqdq rdrand arat kvmclock kvmclock2 kvm_pv_eoi rdtscp "
    "spec_ctrl"
)
_AVX512 = "avx512f avx512dq avx512bw"


def entries(
    names: str,
    *,
    vendor: bytes = b"GenuineIntel",
    signature: int = 0x000506E3,
    user: int = 7,
    physical: int = 46,
    opmasks_at: int = 1088,
    counters: int = 0,
    without: Collection[str] = (),
) -> list[Entry]:
    """Return CPUID with these features, and XSAVE components as ``user`` has a bit each."""
    bits = bits_of(*(name for name in names.split() if name not in without))
    name = [int.from_bytes(vendor[at : at + 4], "little") for at in (0, 8, 4)]
    found: list[Entry] = [
        (0, 0, 0, 0xD, name[0], name[1], name[2]),
        (1, 0, 0, signature, 0x800, 0, 0),
        (4, 0, 1, 0x121, 0x1C0003F, 0x3F, 0),
        (6, 0, 0, 0, 0, 0, 0),
        (7, 0, 1, 0, 0, 0, 0),
        (0xA, 0, 0, counters and (7 << 24 | 48 << 16 | counters << 8 | 2), 0, 0, 0),
        (0xB, 0, 1, 0, 0, 0, 0),
        (0xD, 0, 1, user, 0, 0, 0),
        (0xD, 1, 1, 0, 0, 0, 0),
        (0xD, 2, 1, 256, 576, 0, 0),
        (0xD, 5, 1, 64, opmasks_at, 0, 0),
        (0xD, 6, 1, 512, opmasks_at + 64, 0, 0),
        (0xD, 7, 1, 1024, opmasks_at + 576, 0, 0),
        (0x40000000, 0, 0, 0x40000001, 0, 0, 0),
        (0x40000001, 0, 0, 0, 0, 0, 0),
        (0x80000000, 0, 0, 0x80000008, 0, 0, 0),
        (0x80000001, 0, 0, 0, 0, 0, 0),
        *((leaf, 0, 0, 0x41414141, 0, 0, 0) for leaf in range(0x80000002, 0x80000005)),
        (0x80000007, 0, 0, 0, 0, 0, 0),
        (0x80000008, 0, 0, 48 << 8 | physical, 0, 0, 0),
    ]
    return [_with_bits(entry, bits) for entry in found if entry[0] != 0xD or _there(entry, user)]


def _there(entry: Entry, user: int) -> bool:
    return entry[1] < 2 or bool(user >> entry[1] & 1)


def _with_bits(entry: Entry, bits: dict[tuple[int, int, int], int]) -> Entry:
    function, index, flags, *registers = entry
    a, b, c, d = (
        value | bits.get((function, index, which), 0) for which, value in enumerate(registers)
    )
    return function, index, flags, a, b, c, d


#: Hosts of one vendor: the second has less.
SKYLAKE = FakeCpu(
    entries(f"{_V3} {_AVX512} pdcm invtsc smep", user=0xE7, counters=4),
    tsc_khz=2_000_000,
    tsc_scaling=False,
    msrs=(*MSRS, 0x48, 0x345, 0xC0000103, 0x40000020),
)
HASWELL = FakeCpu(
    entries(f"{_V3} invtsc", signature=0x000306C3, physical=39),
    tsc_khz=2_000_000,
    tsc_scaling=False,
    msrs=(*MSRS, 0x48, 0xC0000103),
)
EPYC = FakeCpu(
    entries(f"{_V3} smep", vendor=b"AuthenticAMD", signature=0x00800F12, physical=48),
    tsc_khz=2_000_000,
    msrs=(*MSRS, 0x48, 0xC0000103),
)
