"""The CPU all of some hosts can give: what ``godwit cpu baseline`` makes of descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from struct import unpack_from

from godwit.errors import ConfigError
from godwit.host.kvm.cpuid import Entry

from . import xsave
from .compare import EXACT, SIZES, same_rate, vendor
from .consistent import FEATURE_OF_LEAF, with_bits, without
from .description import Cpu
from .features import NAMES, Register, features

_BRAND = range(0x80000002, 0x80000005)
_NO_BRAND = b"Godwit baseline".ljust(48, b"\0")
_HIGHEST = (0, 0x40000000, 0x80000000)

_Registers = tuple[int, int, int, int]


def baseline(cpus: Sequence[Cpu]) -> Cpu:
    """Return what all CPUs can give a guest.

    A guest is not told to rely on the rate of the TSC if the rates differ and not all KVMs can
    scale, nor of ARCH_CAPABILITIES if the values differ.

    Raises:
        ConfigError: the CPUs are of several vendors, or lay out XSAVE's area differently.
    """
    entries = reduce(intersection, (cpu.cpuid for cpu in cpus))
    rates = [cpu.tsc_khz for cpu in cpus]
    scaling = all(cpu.tsc_scaling for cpu in cpus)
    if not scaling and not same_rate(min(rates), max(rates)):
        entries = without(entries, ("invtsc", "tsc-deadline"))
    capabilities = {cpu.arch_capabilities for cpu in cpus}
    if len(capabilities) > 1:
        entries = without(entries, ("arch_capabilities",))
    return Cpu(
        cpuid=entries,
        tsc_khz=min(rates),
        tsc_scaling=scaling,
        msrs=sorted(set[int].intersection(*(set(cpu.msrs) for cpu in cpus))),
        arch_capabilities=min(capabilities) if len(capabilities) == 1 else 0,
    )


def intersection(one: list[Entry], other: list[Entry]) -> list[Entry]:
    """Return the CPUID both CPUs can give, in whichever order the two are named.

    Feature bits are the common ones, and numbers the smaller ones. In what is neither more nor less
    (caches, family and model), the CPU with the smaller values is followed.

    Raises:
        ConfigError: the vendors, or the layout of XSAVE's area, differ.
    """
    _check(one, other)
    ours, theirs = _by_leaf(one), _by_leaf(other)
    brand = all(ours.get((f, 0)) == theirs.get((f, 0)) for f in _BRAND)
    both = features(one), features(other)
    found: list[Entry] = []
    for (function, index), (flags, own) in sorted(ours.items()):
        if (function, index) not in theirs:
            continue
        flags, values = flags & theirs[function, index][0], theirs[function, index][1]
        if function in _BRAND and not brand:
            merged = unpack_from("<IIII", _NO_BRAND, 16 * _BRAND.index(function))
        else:
            merged = _merged(function, index, own, values)
        found.append((function, index, flags, merged[0], merged[1], merged[2], merged[3]))
    keep: dict[Register, int] = {
        register: bits & both[1].get(register, 0) for register, bits in both[0].items()
    }
    layouts = xsave.layout(one), xsave.layout(other)
    found = xsave.restricted(
        found,
        layouts[0].user & layouts[1].user,
        layouts[0].supervisor & layouts[1].supervisor,
    )
    unlike = {
        function
        for function, index in ours.keys() | theirs.keys()
        if function in EXACT and ours.get((function, index)) != theirs.get((function, index))
    }
    return without(with_bits(found, keep), {FEATURE_OF_LEAF[function] for function in unlike})


def _by_leaf(entries: list[Entry]) -> dict[tuple[int, int], tuple[int, _Registers]]:
    return {entry[:2]: (entry[2], entry[3:]) for entry in entries}


def _check(one: list[Entry], other: list[Entry]) -> None:
    vendors = sorted((vendor(one), vendor(other)))
    if vendors[0] != vendors[1]:
        raise ConfigError(
            f"CPUs of {vendors[0]} and {vendors[1]} have no baseline: a guest cannot change "
            "between vendors; make one for the hosts of each"
        )
    ours, theirs = xsave.layout(one).components, xsave.layout(other).components
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise ConfigError(
                f"XSAVE state {xsave.name(number)} is of {ours[number]} on one host and of "
                f"{theirs[number]} on another; leave its feature out of both descriptions"
            )


def _merged(function: int, index: int, own: _Registers, other: _Registers) -> _Registers:
    if function == xsave.LEAF:
        return _smallest(own, other)  # the components follow
    if function in EXACT:
        return own if own == other else (0, 0, 0, 0)
    merged = list(min(own, other))
    for which in range(4):
        register = function, index, which
        if register in NAMES:
            merged[which] = own[which] | other[which]  # masked below
        elif function in _HIGHEST and not which:
            merged[which] = min(own[which], other[which])
    for (where, sub, which), first, width, _ in SIZES:
        if (where, sub) == (function, index):
            mask = (1 << width) - 1 << first
            smaller = min(own[which] & mask, other[which] & mask)
            merged[which] = merged[which] & ~mask | smaller
    if function == 0xA:  # events that are not there
        merged[1] = own[1] | other[1]
    return merged[0], merged[1], merged[2], merged[3]


def _smallest(own: _Registers, other: _Registers) -> _Registers:
    return (
        min(own[0], other[0]),
        min(own[1], other[1]),
        min(own[2], other[2]),
        min(own[3], other[3]),
    )
