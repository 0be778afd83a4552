"""CPUID without some features, and without what needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from godwit.host.kvm.cpuid import Entry

from . import xsave
from .features import AMD_COPIES, DERIVED, EDX, NAMES, PLACES, Register, bits_of, features, has

_WITH_XSAVE = "xsaveopt xsavec xgetbv1 xsaves xfd avx mpx pku amx_tile apxf"
_WITH_AVX = "avx2 fma f16c xop fma4 vaes vpclmulqdq avx_vnni avx_ifma avx_vnni_int8 sm3 sm4 sha512"
#: A feature -> the one that it is nothing without (Intel SDM volume 1, 13.3, 14.3, 15.2).
_NEEDS = {
    **dict.fromkeys(_WITH_XSAVE.split(), "xsave"),
    **dict.fromkeys(_WITH_AVX.split(), "avx"),
    **dict.fromkeys(("avx_vnni_int16", "avx_ne_convert"), "avx2"),
    **{name: "avx512f" for name in PLACES if name.startswith("avx512") and name != "avx512f"},
    "avx512f": "avx2",
    "avx10": "avx512f",
    **{name: "amx_tile" for name in PLACES if name.startswith("amx_") and name != "amx_tile"},
    "shstk": "xsaves",
    "ibt": "xsaves",
    "arch_lbr": "xsaves",
    # The timer counts by the TSC: a guest that may not rely on its rate has no use for it.
    "tsc-deadline": "tsc",
}
#: The XSAVE components, each with the features of which one has to be there.
_COMPONENTS = {
    2: ("avx",),
    3: ("mpx",),
    4: ("mpx",),
    5: ("avx512f",),
    6: ("avx512f",),
    7: ("avx512f",),
    8: ("intel_pt",),
    9: ("pku",),
    10: ("enqcmd",),
    11: ("shstk", "ibt"),
    12: ("shstk",),
    14: ("uintr",),
    15: ("arch_lbr",),
    17: ("amx_tile",),
    18: ("amx_tile",),
    19: ("apxf",),
}
#: Leaves that describe one feature.
FEATURE_OF_LEAF = {
    0x12: "sgx",
    0x14: "intel_pt",
    0x19: "keylocker",
    0x1D: "amx_tile",
    0x1E: "amx_tile",
    0x1C: "arch_lbr",
    0x24: "avx10",
    0x80000022: "perfmon_v2",
}


def with_bits(entries: list[Entry], keep: Mapping[Register, int]) -> list[Entry]:
    """Return CPUID entries with only the feature bits in ``keep``, consistent."""
    found = []
    for function, index, flags, *registers in entries:
        values = [
            _kept(value, keep.get(register, 0) if register in NAMES else None, register)
            for value, register in _by_register(function, index, registers)
        ]
        found.append((function, index, flags, values[0], values[1], values[2], values[3]))
    return _consistent(found)


def without(entries: list[Entry], names: Collection[str]) -> list[Entry]:
    """Return CPUID entries without the features of these names, consistent."""
    gone = bits_of(*names)
    if (1, 0, EDX) in gone:  # AMD repeats some
        copies = gone.get((0x80000001, 0, EDX), 0) | gone[1, 0, EDX] & AMD_COPIES
        gone[0x80000001, 0, EDX] = copies
    all_bits = dict.fromkeys(NAMES, 0xFFFFFFFF)
    return with_bits(entries, {**all_bits, **{r: ~bits for r, bits in gone.items()}})


def _consistent(entries: list[Entry]) -> list[Entry]:
    bits = dict(features(entries))
    while True:
        lone = [n for n, need in _NEEDS.items() if has(bits, n) and not has(bits, need)]
        if not lone:
            break
        for register, value in bits_of(*lone).items():
            bits[register] &= ~value
    found = []
    for function, index, flags, *registers in entries:
        if function in FEATURE_OF_LEAF and not has(bits, FEATURE_OF_LEAF[function]):
            registers = [0, 0, 0, 0]
        values = [
            _kept(value, bits.get(register), register)
            for value, register in _by_register(function, index, registers)
        ]
        found.append((function, index, flags, values[0], values[1], values[2], values[3]))
    return _with_components(found, bits)


def _by_register(function: int, index: int, registers: list[int]) -> Iterator[tuple[int, Register]]:
    for which, value in enumerate(registers):
        yield value, (function, index, which)


def _kept(value: int, bits: int | None, register: Register) -> int:
    """Return a register with these feature bits, and with bits derived from other things."""
    if bits is None:
        return value
    return value & (bits | DERIVED.get(register, 0))


def _with_components(entries: list[Entry], bits: Mapping[Register, int]) -> list[Entry]:
    layout = xsave.layout(entries)
    if not layout.user:
        return entries
    kept = xsave.ALWAYS if has(bits, "xsave") else 0
    for number in layout.components:
        needed = _COMPONENTS.get(number)
        if kept and (needed is None or any(has(bits, name) for name in needed)):
            kept |= 1 << number
    return xsave.restricted(entries, kept, kept)
