"""What a guest was told and a host cannot give is named, each kind in a sentence of its own."""

from __future__ import annotations

import pytest

from godwit.host.kvm.cpuid import Entry
from godwit.hw.cpu import msrs
from godwit.hw.cpu.compare import lacks, lacks_capabilities, lacks_msrs, same_rate
from godwit.hw.cpu.features import NAMES, PLACES, spelled
from tests.fakes.cpus import _V3, EPYC, HASWELL, SKYLAKE, entries


def _changed(cpuid: list[Entry], function: int, index: int, *registers: int) -> list[Entry]:
    a, b, c, d = registers
    kept = [entry for entry in cpuid if entry[:2] != (function, index)]
    return [*kept, (function, index, 1, a, b, c, d)]


def test_a_cpu_lacks_nothing_of_itself_and_more_lacks_nothing_of_less() -> None:
    for cpu in (SKYLAKE, HASWELL, EPYC):
        assert lacks(cpu.cpuid, cpu.cpuid) == []
    assert lacks(HASWELL.cpuid, SKYLAKE.cpuid) == []


def test_missing_features_are_named() -> None:
    told, here = entries(f"{_V3} avx512f"), entries(_V3)
    assert lacks(told, here) == ["the guest was told AVX512F, this CPU has none"]
    told = entries(f"{_V3} avx512f smep rdseed kvm_asyncpf invtsc")
    assert lacks(told, here) == [
        "the guest was told SMEP, AVX512F, RDSEED and INVTSC, this CPU has none of them",
        "the guest was told KVM_ASYNCPF, this host's KVM has none",
    ]


def test_all_that_differs_is_named_at_once() -> None:
    (features, state, bits, *counters) = lacks(SKYLAKE.cpuid, HASWELL.cpuid)
    assert features == (
        "the guest was told PDCM, SMEP, AVX512F, AVX512DQ and AVX512BW, this CPU has none of them"
    )
    assert state == (
        "the guest was told XSAVE state AVX-512 opmasks, AVX-512 upper halves and AVX-512 upper "
        "registers, this CPU has none of them"
    )
    assert bits == "the guest was told 46 physical address bits, this CPU has 39"
    assert "the guest was told 4 performance counters, this CPU has 0" in counters


def test_a_bit_without_a_name_has_its_place() -> None:
    told = _changed(entries(_V3), 7, 1, 0, 1 << 12, 0, 0)
    assert lacks(told, entries(_V3)) == [
        "the guest was told CPUID 7.1 EBX bit 12, this CPU has none"
    ]


def test_the_list_of_names_is_bounded() -> None:
    told = _changed(entries(_V3), 7, 1, *[0xFFFFFFFF] * 4)
    (sentence,) = lacks(told, entries(_V3))
    assert " more, this CPU has none of them" in sentence
    assert len(sentence) < 600


def test_another_vendor_is_all_that_is_said() -> None:
    assert lacks(SKYLAKE.cpuid, EPYC.cpuid) == [
        "the guest was told that its CPU is of GenuineIntel, this CPU is of AuthenticAMD: no guest "
        "can change between vendors, with any --cpu"
    ]
    assert "AuthenticAMD, this CPU is of GenuineIntel" in lacks(EPYC.cpuid, SKYLAKE.cpuid)[0]


def test_a_vendor_is_printable_whatever_came() -> None:
    told = entries(_V3, vendor=b"\x1b[31m\0\xff\x80abcd")
    assert "?[31m???abcd" in lacks(told, EPYC.cpuid)[0]


def test_state_that_lies_elsewhere_is_named() -> None:
    one, other = (entries(_V3, user=0xE7, opmasks_at=at) for at in (1088, 832))
    (opmasks, *others) = lacks(one, other)
    assert opmasks == (
        "the guest was told XSAVE state AVX-512 opmasks of 64 bytes at 1088, this CPU has it in 64 "
        "bytes at 832"
    )
    assert len(others) == 2
    # Of no use to a guest that was not told of it.
    assert lacks(entries(_V3), other) == []


def test_what_a_guest_uses_as_described_must_be_the_same() -> None:
    tiles = entries(f"{_V3} amx_tile")
    told, here = (_changed(tiles, 0x1D, 1, value, 0, 0, 0) for value in (1, 2))
    assert lacks(told, here) == [
        "the guest was told AMX tiles as CPUID 1D has it, this CPU has other values"
    ]
    assert lacks(_changed(tiles, 0x1D, 1, 0, 0, 0, 0), here) == []


def test_events_that_were_promised_are_named() -> None:
    one = entries(_V3, counters=4)
    other = [(f, i, g, a, 5 if f == 0xA else b, c, d) for f, i, g, a, b, c, d in one]
    assert lacks(one, other) == [
        "the guest was told the performance events 0x5 of leaf 0xA, this CPU has none"
    ]
    assert lacks(other, one) == []


def test_what_the_guests_kernel_or_the_vcpus_set_is_no_difference() -> None:
    told = [
        (f, i, g, a, b, c | 1 << 27 if f == 1 else c, d | 1 << 28 if f == 1 else d)
        for f, i, g, a, b, c, d in entries(_V3)
    ]
    assert lacks(told, entries(_V3)) == []


def test_that_something_is_not_there_any_more_is_no_difference() -> None:
    assert lacks(entries(f"{_V3} zero_fcs_fds"), entries(_V3)) == []


def test_msrs_that_cannot_be_set_are_named() -> None:
    assert lacks_msrs([0x277, 0x345, 0xABC], [0x277]) == [
        "the guest's state has MSR 0x345 (PERF_CAPABILITIES) and 0xabc, this host's KVM has none "
        "of them"
    ]
    assert lacks_msrs([0x277], [0x277, 0x345]) == []


def test_msrs_of_what_a_guest_was_not_told_are_none_of_its_state() -> None:
    listed = [0x277, 0x48, 0x345, 0xC1, 0xC0000103, 0x40000020, 0x6E0, 0xDA0, 0x4B564D00]
    assert msrs.told_of(listed, SKYLAKE.cpuid) == [
        *(0x277, 0x48, 0x345, 0xC1, 0xC0000103, 0x4B564D00)
    ]
    bare = entries("fpu")
    assert msrs.told_of(listed, bare) == [0x277, 0x4B564D00]


def test_what_a_guest_would_not_mitigate_is_named() -> None:
    assert lacks_capabilities(0b1, 0b1) == lacks_capabilities(0, 0b1) == []
    assert lacks_capabilities(0b100, 0) == []  # RSBA is a vice
    (sentence,) = lacks_capabilities(1 | 1 << 5 | 1 << 60, 1 << 19)
    assert "told 0x1000000000000021 in the MSR ARCH_CAPABILITIES" in sentence
    assert "differs in RDCL_NO, MDS_NO, RRSBA and bit 60" in sentence


@pytest.mark.parametrize(
    ("khz", "same"), [(2_000_000, True), (2_000_500, True), (2_000_501, False), (1_999_499, False)]
)
def test_a_rate_is_the_same_within_250_ppm(khz: int, same: bool) -> None:
    assert same_rate(2_000_000, khz) is same


def test_each_name_is_there_once_and_in_its_bit() -> None:
    names = [name for bits in NAMES.values() for name in bits.values()]
    assert len(names) == len(set(names)) == len(PLACES)
    # The ends of the longer rows, by which a row that has slipped shows itself.
    for name, bit in {
        "hypervisor": 31,
        "pbe": 31,
        "avx512vl": 31,
        "pks": 31,
        "ssbd": 31,
        "msrlist": 27,
        "apxf": 21,
        "mcdt_no": 5,
        "xfd": 4,
        "kvmclock_stable": 24,
        "mwaitx": 29,
        "3dnow": 31,
        "invtsc": 8,
        "ibpb_ret": 30,
        "srso_user_kernel_no": 30,
        "prefetchi": 20,
        "la57": 16,
        "topoext": 22,
        "rdtscp": 27,
        "lm": 29,
        "tsc-deadline": 24,
        "amx_tile": 24,
        "btc_no": 29,
    }.items():
        assert PLACES[name][1] == 1 << bit, name


def test_names_are_taken_in_the_usual_spellings() -> None:
    for given in ("pni", "SSE4_1", "sse4.1", "tsc_deadline_timer", "AVX512-BITALG", "sha-ni"):
        assert spelled(given) in PLACES
