"""The named baselines, features that are switched off, and what CPUs have in common."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.errors import ConfigError, HostError
from godwit.host.kvm.cpuid import Entry, for_vcpu, guest_cpuid
from godwit.hw.cpu import xsave
from godwit.hw.cpu.baseline import baseline, intersection
from godwit.hw.cpu.choice import chosen
from godwit.hw.cpu.compare import lacks
from godwit.hw.cpu.consistent import without
from godwit.hw.cpu.description import Cpu
from godwit.hw.cpu.features import NAMES, PLACES, bits_of, features, has
from godwit.hw.cpu.levels import LEVELS, level
from godwit.spec.config import CpuConfig, parse_cpu
from tests.fakes.cpus import _V3, EPYC, HASWELL, SKYLAKE, entries

_HOSTS = (SKYLAKE, HASWELL, EPYC)
each = pytest.mark.parametrize("name", LEVELS)


def leaf(cpuid: list[Entry], function: int, index: int = 0) -> tuple[int, int, int, int]:
    return next((entry[3:] for entry in cpuid if entry[:2] == (function, index)), (0, 0, 0, 0))


@st.composite
def cpus(draw: st.DrawFn, required: str = "fpu tsc xsave avx") -> list[Entry]:
    """A CPU of one vendor with some features, and XSAVE components that some of them need."""
    some = draw(st.lists(st.sampled_from(sorted(PLACES)), max_size=40))
    user = 3 | draw(st.sampled_from([0, 4, 4 | 0xE0]))
    return entries(
        " ".join(dict.fromkeys([*required.split(), *some])),
        user=user,
        physical=draw(st.integers(39, 52)),
        counters=draw(st.integers(0, 8)),
        signature=draw(st.integers(0, 0xFFFFFFF)),
    )


# --- x86-64-v2 and v3 -----------------------------------------------------------------------------
@each
def test_a_level_is_the_same_on_unlike_hosts_of_a_vendor(name: str) -> None:
    one, other = level(SKYLAKE.cpuid, name), level(HASWELL.cpuid, name)
    caches = (4,)
    assert [e for e in one if e[0] not in caches] == [e for e in other if e[0] not in caches]
    brand = b"".join(struct.pack("<IIII", *leaf(one, 0x80000002 + n)) for n in range(3))
    assert brand.rstrip(b"\0").decode() == f"Godwit {name}"
    assert leaf(one, 0)[0] == 0xD
    assert leaf(one, 0x80000008)[0] == 48 << 8 | 39


@each
def test_a_level_has_its_features_and_hides_the_others(name: str) -> None:
    for host in _HOSTS:
        bits = features(level(host.cpuid, name))
        assert all(has(bits, feature) for feature in LEVELS[name].split())
        for feature in ("aes", "rdrand", "rdtscp", "spec_ctrl", "invtsc", "tsc-deadline", "pdcm"):
            assert not has(bits, feature)
        assert not has(bits, "avx512f")
        assert has(bits, "kvmclock")
        assert leaf(level(host.cpuid, name), 0xA) == (0, 0, 0, 0)


def test_v2_has_no_xsave_and_v3_has_none_beyond_avx() -> None:
    v2, v3 = (level(SKYLAKE.cpuid, name) for name in LEVELS)
    assert xsave.layout(v2) == (0, 0, {})
    assert leaf(v2, 0xD) == (0, 0, 0, 0)
    assert not has(features(v2), "xsave")
    assert xsave.layout(v3).user == 7
    assert leaf(v3, 0xD)[1:3] == (832, 832)


def test_the_vendor_stays() -> None:
    assert leaf(level(EPYC.cpuid, "x86-64-v2"), 0) == (0xD, *leaf(EPYC.cpuid, 0)[1:])
    assert leaf(level(EPYC.cpuid, "x86-64-v2"), 1)[0] == 0x800F12


def test_a_host_that_lacks_a_level_is_refused_by_name() -> None:
    old = entries(_V3, without=("avx2", "movbe"))
    with pytest.raises(HostError, match="--cpu x86-64-v3 asks for MOVBE and AVX2, which this host"):
        level(old, "x86-64-v3")
    assert level(old, "x86-64-v2")
    narrow = entries(_V3, physical=36)
    with pytest.raises(HostError, match="39 physical address bits, and this host's CPU has 36"):
        level(narrow, "x86-64-v2")


@each
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_level_is_a_part_of_the_host_and_itself_again(name: str, data: st.DataObject) -> None:
    host = data.draw(cpus(LEVELS[name]))
    masked = level(host, name)
    assert lacks(masked, host) == []
    assert level(masked, name) == masked


# --- FEATURE=off ----------------------------------------------------------------------------------
def test_what_is_off_takes_along_what_needs_it() -> None:
    bare = without(SKYLAKE.cpuid, ("avx",))
    assert not any(has(features(bare), name) for name in ("avx", "avx2", "fma", "avx512f"))
    assert xsave.layout(bare).user == 3
    assert leaf(bare, 0xD)[1:3] == (576, 576)
    assert has(features(bare), "xsave")
    assert xsave.layout(without(SKYLAKE.cpuid, ("avx512f",))).user == 7
    assert xsave.layout(without(SKYLAKE.cpuid, ("xsave",))).user == 0


def test_the_description_of_what_is_off_goes_as_well() -> None:
    host = [*entries(f"{_V3} amx_tile"), (0x1D, 1, 1, 7, 0, 0, 0)]
    assert leaf(without(host, ("avx",)), 0x1D, 1)[0] == 7
    assert leaf(without(host, ("amx_tile",)), 0x1D, 1) == (0, 0, 0, 0)


def test_the_compacted_area_has_its_size_anew() -> None:
    # AVX, opmasks that may stand anywhere, and tiles that want 64 bytes' alignment (flag 2).
    host: list[Entry] = [
        (0xD, 0, 1, 7 | 1 << 5 | 1 << 18, 11008, 11008, 0),
        (0xD, 1, 1, 0x1F, 1, 0, 0),
        (0xD, 2, 1, 256, 576, 0, 0),
        (0xD, 5, 1, 8, 1088, 0, 0),
        (0xD, 18, 1, 8192, 2816, 2, 0),
    ]
    everything = (1 << 64) - 1
    assert leaf(xsave.restricted(host, everything, 0), 0xD, 1)[1] == 576 + 256 + 64 + 8192
    fewer = xsave.restricted(host, 7, 0)
    assert leaf(fewer, 0xD, 1)[1] == leaf(fewer, 0xD)[1] == 576 + 256
    assert leaf(fewer, 0xD, 18) == (0, 0, 0, 0)


@given(host=cpus(), names=st.lists(st.sampled_from(sorted(PLACES)), max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_is_off_is_gone_and_nothing_came(host: list[Entry], names: list[str]) -> None:
    masked = without(host, names)
    assert lacks(masked, host) == []
    assert not any(has(features(masked), name) for name in names)
    assert without(masked, names) == masked


def test_the_invariant_tsc_goes_with_the_timer_that_counts_by_it() -> None:
    offered = guest_cpuid(SKYLAKE.cpuid, 0, 2, deadline=True)
    assert has(features(offered), "tsc-deadline")
    bits = features(chosen(parse_cpu("host,invtsc=off"), offered, 2))
    assert not has(bits, "invtsc")
    assert not has(bits, "tsc-deadline")
    assert has(bits, "avx512f")


def test_a_level_may_do_without_a_feature() -> None:
    host = entries(_V3, without=("cx16",))
    with pytest.raises(HostError, match="asks for CX16"):
        chosen(CpuConfig("x86-64-v2"), host, 1)
    bits = features(chosen(parse_cpu("x86-64-v2,cmpxchg16b=off"), host, 1))
    assert not has(bits, "cx16")
    assert has(bits, "popcnt")


def test_no_such_feature_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nonsense=off: no such feature"):
        chosen(parse_cpu("host,nonsense=off"), SKYLAKE.cpuid, 1)


# --- what several hosts have in common ------------------------------------------------------------
@given(one=cpus(), other=cpus())
@settings(max_examples=100, deadline=None)
def test_an_intersection_is_a_part_of_both_and_commutes(
    one: list[Entry], other: list[Entry]
) -> None:
    both = intersection(one, other)
    assert both == intersection(other, one)
    assert lacks(both, one) == lacks(both, other) == []
    assert intersection(both, both) == both
    assert intersection(both, one) == both
    common = {r: bits & features(other).get(r, 0) for r, bits in features(one).items()}
    assert all(value & ~common.get(r, 0) == 0 for r, value in features(both).items())


def test_an_intersection_keeps_what_both_have() -> None:
    both = intersection(SKYLAKE.cpuid, HASWELL.cpuid)
    assert features(both) == features(HASWELL.cpuid)
    assert xsave.layout(both) == xsave.layout(HASWELL.cpuid)
    assert leaf(both, 0xD)[1:3] == (832, 832)
    assert leaf(both, 0x80000008)[0] & 0xFF == 39
    assert intersection(SKYLAKE.cpuid, SKYLAKE.cpuid)[0] == SKYLAKE.cpuid[0]


def test_events_that_one_host_lacks_are_lacking_in_both() -> None:
    def events(missing: int) -> list[Entry]:
        cpuid = entries(_V3, counters=4)
        return [(f, i, g, a, missing if f == 0xA else b, c, d) for f, i, g, a, b, c, d in cpuid]

    assert leaf(intersection(events(0b011), events(0b100)), 0xA)[1] == 0b111


def test_hosts_of_two_vendors_or_layouts_have_no_baseline() -> None:
    with pytest.raises(ConfigError, match="AuthenticAMD and GenuineIntel have no baseline"):
        intersection(SKYLAKE.cpuid, EPYC.cpuid)
    elsewhere = entries(f"{_V3} avx512f", user=0xE7, opmasks_at=832)
    with pytest.raises(ConfigError, match="AVX-512 opmasks is of 64 bytes at 1088 on one host"):
        intersection(SKYLAKE.cpuid, elsewhere)


def test_a_feature_that_is_described_in_two_ways_is_none() -> None:
    one, other = (
        sorted([*entries(f"{_V3} amx_tile amx_int8"), (0x1D, 1, 1, value, 0, 0, 0)])
        for value in (1, 2)
    )
    both = intersection(one, other)
    assert not has(features(both), "amx_tile")
    assert not has(features(both), "amx_int8")
    assert leaf(both, 0x1D, 1) == (0, 0, 0, 0)


def _cpu(khz: int, scaling: bool) -> Cpu:
    offered = guest_cpuid(entries(f"{_V3} invtsc"), 0, 1, deadline=True)
    return Cpu(offered, khz, scaling, [0x277, khz])


@pytest.mark.parametrize(
    ("rates", "scaling", "relied_on"),
    [
        ((2_000_000, 2_000_400), (False, False), True),
        ((2_000_000, 3_000_000), (True, True), True),
        ((2_000_000, 3_000_000), (True, False), False),
        ((2_000_000, 3_000_000), (False, False), False),
    ],
)
def test_a_baseline_promises_a_rate_only_if_all_keep_it(
    rates: tuple[int, int], scaling: tuple[bool, bool], relied_on: bool
) -> None:
    both = baseline([_cpu(*one) for one in zip(rates, scaling, strict=True)])
    for name in ("invtsc", "tsc-deadline"):
        assert has(features(both.cpuid), name) is relied_on
    assert both.tsc_khz == 2_000_000
    assert both.tsc_scaling is all(scaling)
    assert both.msrs == [0x277]


def test_a_baseline_of_hosts_with_other_holes_has_no_list_of_them() -> None:
    cpuid = entries(f"{_V3} arch_capabilities")
    one, other = (Cpu(cpuid, 1_000_000, True, [], value) for value in (8, 9))
    both = baseline([one, other])
    assert not has(features(both.cpuid), "arch_capabilities")
    assert both.arch_capabilities == 0
    alike = baseline([one, one])
    assert has(features(alike.cpuid), "arch_capabilities")
    assert alike.arch_capabilities == 8


# --- vCPUs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_first_vcpus_cpuid_makes_the_others(count: int) -> None:
    host = [*SKYLAKE.cpuid, (0x1F, 0, 1, 0, 0, 0, 0), (0x8000001E, 0, 0, 0, 0x100, 0, 0)]
    first = guest_cpuid(host, 0, count, True)
    for index in range(count):
        assert for_vcpu(first, index) == [
            (*e[:4], e[4] & ~0xFF | index, *e[5:]) if e[0] == 0x8000001E else e
            for e in guest_cpuid(host, index, count, True)
        ]


def test_all_feature_registers_are_masked() -> None:
    # A register with names that a mask forgot would let a guest see the host's own.
    everything = dict.fromkeys(NAMES, 4294967295)
    assert set(bits_of(*PLACES)) <= set(everything)
