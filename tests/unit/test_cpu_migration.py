"""A guest between unlike hosts: refused by name, or there with the CPU that it was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from msgspec import structs

from godwit.errors import StreamError
from godwit.host.kvm import abi
from godwit.host.kvm.cpuid import Entry, for_vcpu
from godwit.hw.cpu.description import Cpu
from godwit.hw.cpu.features import features, has
from godwit.machine import cpu as guest_cpu
from godwit.migration.wire import compatibility, messages
from godwit.migration.wire.messages import Hello
from godwit.spec import saved
from godwit.spec.config import CpuConfig
from godwit.spec.machine_types import machine_type
from migration_bench import IMPATIENT, Migration, S
from tests.fakes.cpus import _V3, EPYC, HASWELL, SKYLAKE, entries
from tests.fakes.host import Host, config
from tests.fakes.kvm import FakeCpu

TOKEN = bytes(16)
LEVEL = CpuConfig("x86-64-v2")


@contextmanager
def host(cpu: FakeCpu, /, **given: object) -> Iterator[Host]:
    """A machine with two vCPUs on a host with this CPU."""
    made = Host(config(cpus=2, **given), cpu=cpu)
    try:
        yield made
    finally:
        made.close()


def hello_of(cpu: FakeCpu, /, **given: object) -> Hello:
    """What a guest on a host with this CPU sends, as it arrives."""
    with host(cpu, **given) as made:
        hello = compatibility.describe(made.machine, TOKEN)
    return saved.decode(saved.encode(hello), messages.Hello)


def refusal(hello: Hello, cpu: FakeCpu) -> str:
    """Why a host with this CPU does not take the guest; empty if it does."""
    with host(cpu) as made:
        try:
            compatibility.check(hello, made.machine)
        except StreamError as error:
            return str(error)
    return ""


def arrived(hello: Hello, made: Host) -> None:
    compatibility.check(hello, made.machine)
    compatibility.adopt(hello, made.machine)


# --- what HELLO has -------------------------------------------------------------------------------
def test_hello_describes_the_cpu_that_the_guest_was_told() -> None:
    hello = hello_of(SKYLAKE)
    assert hello.cpu is not None
    with host(SKYLAKE) as made:
        assert hello.cpu.cpuid == made.vcpus[0].cpuid
    assert (hello.cpu.tsc_khz, hello.cpu.tsc_scaling) == (2_000_000, False)
    # Hyper-V's 0x40000020 is none of a guest that was not told of it.
    assert hello.cpu.msrs == [*(0x277, 0x4B564D00, 0x48, 0x345, 0xC0000103)]
    level = hello_of(SKYLAKE, cpu=LEVEL).cpu
    assert level is not None
    assert level.msrs == [0x277, 0x4B564D00]
    assert not has(features(level.cpuid), "avx")


def test_the_longest_description_fits_into_hello() -> None:
    most: list[Entry] = [(0xFFFFFFFF, n, 1, *[0xFFFFFFFF] * 4) for n in range(256)]  # type: ignore[misc]
    cpu = Cpu(most, (1 << 31) - 1, True, [0xFFFFFFFF] * 1024)
    hello = structs.replace(hello_of(SKYLAKE), cpu=cpu)
    length = len(saved.encode(hello))
    assert messages.parse_header(messages.header(messages.Kind.HELLO, length))
    assert length < 20_000


def test_what_was_saved_is_what_was_described() -> None:
    with host(SKYLAKE, cpu=LEVEL) as made:
        state = made.machine.save()
        described = guest_cpu.describe(made.machine.board)
    for vcpu in state.vcpus:
        assert [index for index, _ in vcpu.msrs] == [*described.msrs, abi.MSR_TSC]


def test_an_older_machine_type_describes_no_cpu() -> None:
    # An older Godwit, to which this type can migrate, would refuse a field that it does not know.
    assert hello_of(SKYLAKE, machine=machine_type("godwit-0.1")).cpu is None
    hello = structs.replace(hello_of(SKYLAKE), cpu=None)
    assert b"cpuid" not in saved.encode(hello)


def test_a_guest_without_a_description_comes_as_before() -> None:
    hello = structs.replace(hello_of(SKYLAKE), cpu=None)
    assert refusal(hello, HASWELL) == refusal(hello, EPYC) == ""
    with host(HASWELL) as made:
        own = made.vcpus[0].cpuid
        arrived(hello, made)
        assert made.vcpus[0].cpuid == own


# --- what a host lacks ----------------------------------------------------------------------------
def test_a_host_that_lacks_something_refuses_by_name() -> None:
    why = refusal(hello_of(SKYLAKE), HASWELL)
    assert why.startswith("this host cannot take the guest: the guest was told PDCM, SMEP, AVX512F")
    for part in ("AVX-512 opmasks", "46 physical address bits", "MSR 0x345 (PERF_CAPABILITIES)"):
        assert part in why


def test_a_host_with_holes_that_the_guest_does_not_mitigate_refuses() -> None:
    one, other = (
        FakeCpu(entries(f"{_V3} arch_capabilities"), arch_capabilities=value) for value in (9, 8)
    )
    assert "ARCH_CAPABILITIES, this CPU has 0x8, which differs in RDCL_NO" in refusal(
        hello_of(one), other
    )
    assert refusal(hello_of(other), one) == ""
    # Told nothing of it, a guest mitigates all.
    assert refusal(hello_of(one, cpu=LEVEL), other) == ""
    # What a guest was told goes with it to the next host, until it boots anew.
    with host(one) as made:
        arrived(hello_of(other), made)
        board = made.machine.board
        assert guest_cpu.describe(board).arch_capabilities == 8
        made.machine.config.kernel = "bzImage"
        with mock.patch.object(board, "boot"):
            made.machine.reboot(made.machine.power_on_state())
        assert guest_cpu.describe(board).arch_capabilities == 9


def test_an_msr_that_kvm_has_and_does_not_list_is_no_lack() -> None:
    # As K7_HWCR, which KVM took long before it was in the list.
    hello = hello_of(HASWELL._replace(msrs=(*HASWELL.msrs, 0xC0010015)))
    assert "MSR 0xc0010015 (K7_HWCR), this host's KVM has none" in refusal(hello, HASWELL)
    with host(HASWELL._replace(unlisted_msrs=(0xC0010015,))) as made:
        arrived(hello, made)
        assert 0xC0010015 not in made.machine.board.msrs


def test_a_host_that_has_more_takes_the_guest() -> None:
    assert refusal(hello_of(HASWELL), SKYLAKE) == ""


def test_guests_of_a_level_go_both_ways() -> None:
    for one, other in ((SKYLAKE, HASWELL), (HASWELL, SKYLAKE)):
        assert refusal(hello_of(one, cpu=LEVEL), other) == ""


def test_no_level_helps_between_vendors() -> None:
    for one, other in ((SKYLAKE, EPYC), (EPYC, SKYLAKE)):
        assert "no guest can change between vendors" in refusal(hello_of(one, cpu=LEVEL), other)


def test_what_godwit_itself_sets_is_no_lack_and_what_it_hides_is_one() -> None:
    hello = hello_of(SKYLAKE)
    assert hello.cpu is not None
    assert has(features(hello.cpu.cpuid), "tsc-deadline")
    assert refusal(hello, SKYLAKE) == ""
    nests = [
        (f, i, g, a, b, c | 1 << 5 if f == 1 else c, d) for f, i, g, a, b, c, d in hello.cpu.cpuid
    ]
    hello = structs.replace(hello, cpu=structs.replace(hello.cpu, cpuid=nests))
    assert "the guest was told VMX, this CPU has none" in refusal(hello, SKYLAKE)


@pytest.mark.parametrize(
    "entry",
    [(1, 0, 0, 0, 0, 0, 0), (7, 0, 0, 0, 0, 0xFFFFFFFF, 0), (9, 3, 0, 0, 0, 0, 0)],
    ids=["twice", "all indices", "no index"],
)
def test_an_entry_that_would_hide_another_is_refused(entry: Entry) -> None:
    hello = hello_of(SKYLAKE)
    assert hello.cpu is not None
    odd = structs.replace(hello.cpu, cpuid=[*hello.cpu.cpuid, entry])
    assert "CPUID: leaf" in refusal(structs.replace(hello, cpu=odd), SKYLAKE)


# --- what a guest finds ---------------------------------------------------------------------------
def test_the_guest_sees_the_cpu_that_it_was_told() -> None:
    hello = hello_of(HASWELL)
    assert hello.cpu is not None
    told = hello.cpu.cpuid
    with host(SKYLAKE) as made:
        before = made.vcpus[0].cpuid
        assert [e for e in before if e[0] == 1] != [e for e in told if e[0] == 1]
        arrived(hello, made)
        assert [vcpu.cpuid for vcpu in made.vcpus] == [told, for_vcpu(told, 1)]
        assert made.vcpus[0].cpuid != made.vcpus[1].cpuid
        # And so on the next host, and after a reboot.
        assert compatibility.describe(made.machine, TOKEN).cpu == hello.cpu
        made.machine.config.kernel = "bzImage"
        with mock.patch.object(made.system, "supported_cpuid", side_effect=AssertionError):
            made.machine.power_on_state()


def test_a_reboot_has_the_cpu_that_the_guest_was_told() -> None:
    hello = hello_of(HASWELL)
    assert hello.cpu is not None
    with host(SKYLAKE) as made:
        arrived(hello, made)
        made.machine.config.kernel = "bzImage"
        seen = []
        board = made.machine.board
        make = board.make_vcpus

        def note(*given: object) -> object:
            seen.extend(make(*given))  # type: ignore[arg-type]
            return seen

        with mock.patch.object(board, "make_vcpus", note):
            made.machine.power_on_state()
        assert [vcpu.cpuid for vcpu in seen] == [
            hello.cpu.cpuid,
            for_vcpu(hello.cpu.cpuid, 1),
        ]


def test_a_cpuid_that_kvm_refuses_is_named() -> None:
    hello = hello_of(HASWELL)
    with (
        host(SKYLAKE._replace(stubborn=True)) as made,
        pytest.raises(StreamError, match="KVM refused the CPUID that the guest was told"),
    ):
        arrived(hello, made)


def test_state_that_the_guest_was_not_told_of_is_left_behind() -> None:
    hello = hello_of(SKYLAKE, cpu=CpuConfig("x86-64-v3"))
    with host(SKYLAKE) as source, host(HASWELL) as made:
        state = source.machine.save()
        area = bytearray(abi.XSAVE_SIZE)
        area[512:520] = (0x207 | 0xE0).to_bytes(8, "little")  # KVM of old adds PKRU (bit 9)
        odd = [
            structs.replace(vcpu, xsave=bytes(area), msrs=[(abi.MSR_TSC, 1)])
            for vcpu in state.vcpus
        ]
        arrived(hello, made)
        made.machine.load(structs.replace(state, vcpus=odd), 0.0)
        loaded = made.vcpus[0].structs[abi.SET_XSAVE]
        assert int.from_bytes(loaded[512:520], "little") == 7


# --- the TSC --------------------------------------------------------------------------------------
def _at(khz: int, scaling: bool, names: str = f"{_V3} invtsc") -> FakeCpu:
    return FakeCpu(entries(names), tsc_khz=khz, tsc_scaling=scaling)


def test_a_rate_within_250_ppm_is_let_be() -> None:
    hello = hello_of(_at(2_000_000, False))
    for scaling in (False, True):
        with host(_at(2_000_400, scaling)) as made:
            arrived(hello, made)
            assert made.vcpus[0].tsc_khz() == 2_000_400
            # Small differences do not add up from host to host: the guest's is the first one's.
            described = compatibility.describe(made.machine, TOKEN).cpu
            assert described is not None
            assert described.tsc_khz == 2_000_000
    again = structs.replace(hello, cpu=described)
    assert "its TSC has 2000000 kHz, this host's has 2000800" in refusal(
        again, _at(2_000_800, False)
    )


def test_another_rate_is_made_the_guests_where_kvm_can() -> None:
    hello = hello_of(_at(2_000_000, False))
    with host(_at(3_000_000, True)) as made:
        arrived(hello, made)
        assert [vcpu.tsc_khz() for vcpu in made.vcpus] == [2_000_000, 2_000_000]


def test_another_rate_is_refused_where_a_guest_counts_on_it() -> None:
    why = refusal(hello_of(_at(2_000_000, True)), _at(3_000_000, False))
    assert (
        "the guest was told INVTSC and TSC-DEADLINE, and its TSC has 2000000 kHz, this host's has "
        "3000000 kHz and its KVM cannot scale it"
    ) in why
    assert "--cpu host,invtsc=off" in why
    # The timer counts by the TSC, too.
    assert "told TSC-DEADLINE, and its TSC" in refusal(
        hello_of(_at(2_000_000, True, _V3)), _at(3_000_000, False, _V3)
    )


@pytest.mark.parametrize("cpu", [CpuConfig("host", ("invtsc",)), LEVEL])
def test_another_rate_is_nothing_to_a_guest_that_does_not_count_on_it(cpu: CpuConfig) -> None:
    hello = hello_of(_at(2_000_000, True), cpu=cpu)
    with host(_at(3_000_000, False)) as made:
        arrived(hello, made)
        assert made.vcpus[0].tsc_khz() == 3_000_000


def test_a_rate_that_kvm_takes_and_does_not_give_is_an_error() -> None:
    hello = hello_of(_at(2_000_000, True))
    with host(_at(3_000_000, True)) as made:
        for vcpu in made.vcpus:
            vcpu.set_tsc_khz = lambda khz: None  # type: ignore[method-assign]
        with pytest.raises(StreamError, match="KVM made the TSC 3000000 kHz instead of 2000000"):
            arrived(hello, made)


def test_a_rate_that_kvm_refuses_is_an_error() -> None:
    hello = hello_of(_at(2_000_000, True))

    def refuse(khz: int) -> None:
        raise OSError(22, "Invalid argument")

    with host(_at(3_000_000, True)) as made:
        made.vcpus[1].set_tsc_khz = refuse  # type: ignore[method-assign]
        with pytest.raises(StreamError, match="vCPU 1: KVM refused a TSC of 2000000 kHz"):
            arrived(hello, made)


def test_a_rate_that_nobody_knows_is_not_compared() -> None:
    # KVM gives none where the host's TSC is unstable.
    known, unknown = _at(2_000_000, False), _at(0, False)
    assert refusal(hello_of(unknown), known) == refusal(hello_of(known), unknown) == ""
    with host(_at(3_000_000, True)) as made:
        arrived(hello_of(unknown), made)
        assert made.vcpus[0].tsc_khz() == 3_000_000


# --- whole migrations -----------------------------------------------------------------------------
def test_a_guest_that_would_miss_something_stays(tmp_path: Path) -> None:
    migration = Migration(tmp_path, cpus=(SKYLAKE, HASWELL))
    try:
        migration.run()
        report = migration.source.report
        assert "the guest was told PDCM, SMEP, AVX512F" in str(report.error)
        assert not report.rounds
        assert migration.here.states.current is S.RUNNING
        assert migration.here.machine.running
        # Nothing happened there: the next one may come.
        assert migration.there.states.current is S.INMIGRATE
        assert migration.there.failures == []
    finally:
        migration.close()


def test_a_guest_takes_its_cpu_along(tmp_path: Path) -> None:
    migration = Migration(tmp_path, cpus=(HASWELL, SKYLAKE), times=IMPATIENT)
    try:
        migration.run()
        assert migration.here.statuses[-1] == "completed", migration.source.report
        here, there = (side.host.vcpus[0].cpuid for side in (migration.here, migration.there))
        assert there == here
    finally:
        migration.close()


def test_a_guest_in_a_file_keeps_its_cpu(tmp_path: Path) -> None:
    migration = Migration(tmp_path, cpus=(HASWELL, SKYLAKE))
    uri = f"file:{tmp_path}/guest"
    try:
        migration.here.migrations.migrate(uri, False)
        migration.finish()
        migration.there.migrations.await_guest(uri, False)
        incoming = migration.there.migrations._incoming
        assert incoming is not None
        incoming._thread.join(30)
        assert migration.there.failures == []
        here, there = (side.host.vcpus[0].cpuid for side in (migration.here, migration.there))
        assert there == here
    finally:
        migration.close()


def test_a_guest_in_a_file_is_compared_as_well(tmp_path: Path) -> None:
    migration = Migration(tmp_path, cpus=(SKYLAKE, HASWELL))
    uri = f"file:{tmp_path}/guest"
    try:
        migration.here.migrations.migrate(uri, False)
        migration.finish()
        assert migration.here.statuses[-1] == "completed", migration.source.report
        migration.there.migrations.await_guest(uri, False)
        migration.there.wait_failed()
        (error,) = migration.there.failures
        assert "the guest was told PDCM, SMEP, AVX512F" in str(error)
    finally:
        migration.close()
