"""What CPUID says to a guest's vCPUs."""

from __future__ import annotations

import pytest

from godwit.host.kvm.cpuid import Entry, guest_cpuid

HOST: list[Entry] = [
    (1, 0, 0, 0x800F12, 7 << 24 | 16 << 16 | 0x0800, 1 << 5, 0),
    (0xB, 0, 1, 0, 0, 0, 7),  # as KVM lists it: no level under it
    (0x40000001, 0, 0, 1 << 3 | 1 << 4 | 1 << 10 | 1 << 14, 0, 0, 0),
    (0x80000001, 0, 0, 0, 0, 1 << 2, 0),
    (0x80000008, 0, 0, 0x3028, 0, 0x400F, 0),
    (0x8000001E, 0, 0, 7, 0x0107, 0x0200, 0),
]


#: A host that lists all levels, and of 0x1F as well.
LEVELS: list[Entry] = [
    (function, sub, 1, 4, 16, sub + 1 << 8 | sub, 7) for function in (0xB, 0x1F) for sub in range(3)
]


def leaf(entries: list[Entry], function: int, sub: int = 0) -> tuple[int, int, int, int]:
    return next(entry[3:] for entry in entries if entry[:2] == (function, sub))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_vcpu_has_its_own_id_in_one_package_of_single_threads(count: int) -> None:
    width = (count - 1).bit_length()
    for index in range(count):
        entries = guest_cpuid(HOST, index, count, deadline=True)
        _, ebx, _, edx = leaf(entries, 1)
        assert (ebx >> 24, ebx >> 16 & 0xFF, bool(edx & 1 << 28)) == (index, count, count > 1)
        assert leaf(entries, 0xB) == (0, 1, 0x100, index)
        assert leaf(entries, 0xB, 1) == (width, count, 0x201, index)
        assert leaf(entries, 0xB, 2) == (0, 0, 2, index)
        assert {entry[2] for entry in entries if entry[0] == 0xB} == {1}
        assert len({entry[:2] for entry in entries}) == len(entries)
        assert leaf(entries, 0x80000008)[2] == width << 12 | count - 1
        assert leaf(entries, 0x8000001E)[:2] == (index, index)


def test_a_host_that_lists_the_levels_changes_nothing() -> None:
    entries = guest_cpuid(LEVELS, 1, 2, deadline=True)
    assert [entry[:2] for entry in entries] == [entry[:2] for entry in LEVELS]
    assert leaf(entries, 0x1F, 1) == leaf(entries, 0xB, 1) == (1, 2, 0x201, 1)


def test_a_guest_knows_that_it_is_one_and_may_not_nest() -> None:
    entries = guest_cpuid(HOST, 0, 1, deadline=True)
    assert leaf(entries, 1)[2] == 1 << 31 | 1 << 24
    assert leaf(entries, 0x80000001)[2] == 0
    assert leaf(guest_cpuid(HOST, 0, 1, deadline=False), 1)[2] == 1 << 31


def test_asynchronous_page_faults_are_not_offered() -> None:
    assert leaf(guest_cpuid(HOST, 0, 1, deadline=True), 0x40000001)[0] == 1 << 3
