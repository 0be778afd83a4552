"""Clocks are read and set at one instant, however busy the host is. KVM and time are stand-ins."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from godwit.errors import KvmError
from godwit.host.kvm import abi, clocks, handles
from godwit.host.kvm.clocks import QUICK_S, Clock
from godwit.host.kvm.handles import System, Vcpu, Vm

AHEAD_NS = 7_000_000_000
REAL_NS = 1_700_000_000_000_000_000
SLOW_S = 0.004
MONOTONIC_S = 100.0


class Host:
    """Time that passes only within calls; each takes the next of ``delays``, s, a half before KVM
    looks and a half after it. A descriptor is its VM's or vCPU's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delays: Iterable[float]) -> None:
        self.now = MONOTONIC_S
        self._delays = iter(delays)
        self.calls = 0
        clock = SimpleNamespace(
            monotonic=lambda: self.now, time_ns=lambda: REAL_NS + self.ns() - AHEAD_NS
        )
        monkeypatch.setattr(clocks, "time", clock)

    def ns(self) -> int:
        """What a clock that started with the host's, but AHEAD_NS ahead, shows."""
        return int((self.now - MONOTONIC_S) * 1e9) + AHEAD_NS

    def call(self) -> int:
        self.calls += 1
        delay = next(self._delays)
        self.now += delay / 2
        value = self.ns()
        self.now += delay / 2
        return value


class FakeVm(Vm):
    """A VM that has only a clock."""

    def __init__(self, host: Host, exact: bool = False) -> None:
        self.host, self.exact, self.off = host, exact, 0

    def reading(self) -> bytes:
        """What KVM_GET_CLOCK returns."""
        clock = self.host.call() + self.off
        flags = abi.CLOCK_REALTIME if self.exact else 0
        return abi.CLOCK_DATA.pack(clock, flags, 0, 42, 0)

    def ioctl(self, request: int, argument: int = 0) -> int:
        assert request == abi.GET_CLOCK
        data = (ctypes.c_char * abi.CLOCK_DATA.size).from_address(argument)
        data[:] = self.reading()
        return 0

    def set(self, request: int, data: bytes) -> int:
        assert request == abi.SET_CLOCK
        self.off = abi.CLOCK_DATA.unpack(data)[0] - self.host.call()
        return 0


class FakeVcpu(Vcpu):
    """A vCPU that has only a TSC, of a GHz, and a quick kernel."""

    def __init__(self, host: Host, offset: int = 0, reports: bool = True) -> None:
        self.index = 0
        self.host, self.offset, self.reports = host, offset, reports
        self.written: list[tuple[int, int]] = []

    def ioctl(self, request: int, argument: int = 0) -> int:
        assert request == abi.GET_MSRS
        data = (ctypes.c_char * 24).from_address(argument)
        assert struct.unpack("<IxxxxIxxxx", data[:16]) == (1, 0x10)
        data[16:] = self.tsc().to_bytes(8, "little")
        return 1

    def tsc(self) -> int:
        return (self.host.ns() + self.offset) % (1 << 64)

    def tsc_khz(self) -> int:
        return 1_000_000

    def tsc_offset(self) -> int | None:
        return self.offset if self.reports else None

    def set_tsc_offset(self, offset: int) -> None:
        assert 0 <= offset < 1 << 64
        self.offset = offset

    def set_msrs(self, msrs: list[tuple[int, int]]) -> int:
        self.written += msrs
        return len(msrs)


def _read(host: Host, exact: bool = False) -> Clock:
    return clocks.read(FakeVm(host, exact), [FakeVcpu(host)]).clock


def test_a_quick_reading_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [QUICK_S / 2])
    read = _read(host)
    assert read.guest - (read.realtime - REAL_NS) == pytest.approx(AHEAD_NS, abs=1000)
    assert read.guest == pytest.approx((read.monotonic - MONOTONIC_S) * 1e9 + AHEAD_NS, abs=1000)
    assert host.calls == 1


def test_the_quickest_of_slow_readings_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, SLOW_S / 4, SLOW_S / 2])
    read = _read(host)
    assert read.guest == pytest.approx((SLOW_S + SLOW_S / 8) * 1e9 + AHEAD_NS, abs=1000)
    assert host.calls == 3


def test_the_hosts_own_clocks_are_read_at_one_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, SLOW_S / 2, 1e-5, 1e-5])
    look = clocks.time.time_ns

    def time_ns() -> int:
        host.call()
        return look()

    monkeypatch.setattr(clocks.time, "time_ns", time_ns)
    realtime, monotonic = clocks.host_clocks()
    assert host.calls == 3
    assert realtime - REAL_NS == pytest.approx((monotonic - MONOTONIC_S) * 1e9, abs=1e4)


def test_what_the_kernel_knows_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _read(Host(monkeypatch, [QUICK_S]), exact=True).realtime == 42


def test_tscs_and_clock_are_read_at_one_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, SLOW_S / 2, 1e-5])
    vm, vcpus = FakeVm(host), [FakeVcpu(host, AHEAD_NS), FakeVcpu(host, -AHEAD_NS)]
    clock, tscs, offsets = clocks.read(vm, vcpus)
    assert host.calls == 3
    assert tscs[0] - clock.guest == pytest.approx(AHEAD_NS, abs=1000)
    assert offsets == [AHEAD_NS, -AHEAD_NS]
    assert tscs[0] - tscs[1] == 2 * AHEAD_NS


def test_a_busy_host_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, SLOW_S / 4, SLOW_S / 2, SLOW_S])
    clock, tscs, _ = clocks.read(FakeVm(host), [FakeVcpu(host, AHEAD_NS)])
    assert host.calls == 3
    # As exact as if nobody had come between: KVM looked in the middle.
    assert tscs[0] - clock.guest == pytest.approx(AHEAD_NS, abs=1000)


def test_without_offsets_each_tsc_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [1e-5] * 4)
    vcpus = [FakeVcpu(host, reports=False), FakeVcpu(host, AHEAD_NS, reports=False)]
    _, tscs, offsets = clocks.read(FakeVm(host), vcpus)
    assert offsets == [None, None]
    assert tscs[1] - tscs[0] == pytest.approx(AHEAD_NS, abs=1e5)


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    """One whose descriptor is only a page."""
    fd = os.memfd_create("kvm_run")
    os.ftruncate(fd, mmap.PAGESIZE)
    system = SimpleNamespace(vcpu_mmap_size=mmap.PAGESIZE, check=lambda capability: 0)
    with Vcpu(fd, 3, cast(System, system)) as vcpu:
        yield vcpu


def test_a_tsc_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, vcpu: Vcpu) -> None:
    monkeypatch.setattr(handles, "ioctl_out", lambda fd, request, data: 0)
    with pytest.raises(KvmError, match="vCPU 3: its TSC"):
        vcpu.tsc()
    vm = FakeVm(Host(monkeypatch, [0.0] * 10))
    monkeypatch.setattr(vcpu, "ioctl", lambda request, argument: 0)
    with pytest.raises(KvmError, match="vCPU 3: its TSC"):
        clocks.read(vm, [vcpu])


def test_the_tsc_is_what_kvm_wrote(monkeypatch: pytest.MonkeyPatch, vcpu: Vcpu) -> None:
    def get(fd: int, request: int, data: bytearray) -> int:
        assert request == abi.GET_MSRS
        count, index, value = struct.unpack("<IxxxxIxxxxQ", data)
        assert (count, index, value) == (1, 0x10, 0)
        data[16:] = (1 << 63 | 5).to_bytes(8, "little")
        return 1

    monkeypatch.setattr(handles, "ioctl_out", get)
    for _ in range(2):
        assert vcpu.tsc() == 1 << 63 | 5


def test_the_msrs_are_those_that_kvm_read(monkeypatch: pytest.MonkeyPatch, vcpu: Vcpu) -> None:
    def get(fd: int, request: int, address: int) -> int:
        data = (ctypes.c_char * (8 + 3 * 16)).from_address(address)
        assert struct.unpack("<I4x" + 3 * "IxxxxQ", data[:]) == (3, 7, 0, 8, 0, 9, 0)
        data[16:24] = bytes(range(8))
        data[32:40] = (70).to_bytes(8, "little")
        return 2  # the third, it does not know

    monkeypatch.setattr(handles, "ioctl", get)
    monkeypatch.setattr("godwit.host.ioctl.ioctl", get)
    for _ in range(2):
        assert vcpu.get_msrs([7, 8, 9]) == [(7, 0x0706050403020100), (8, 70)]


SINCE = MONOTONIC_S - 0.25
"""A guest's clocks were read a quarter of a second ago."""


def _due(host: Host, value: int) -> int:
    """What it is by now."""
    return value + int((host.now - SINCE) * 1e9)


@pytest.mark.parametrize("delay", [1e-5, 3e-4])
def test_clocks_go_on_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch, delay: float) -> None:
    host = Host(monkeypatch, [delay] * 40)
    vm, vcpus = FakeVm(host), [FakeVcpu(host, 5), FakeVcpu(host, 6)]
    tsc = 900_000_000_000
    clocks.restore(vm, vcpus, 5_000_000, SINCE, [tsc, tsc + 40_000])
    clock = host.ns() + vm.off
    assert clock == pytest.approx(_due(host, 5_000_000), abs=QUICK_S * 1e9)
    # However well the clock was set: a TSC is as far ahead of it as it was.
    assert vcpus[0].tsc() - clock == pytest.approx(tsc - 5_000_000, abs=1000)
    # They were read one after the other, as it seems.
    assert vcpus[1].offset == vcpus[0].offset


@pytest.mark.parametrize("apart", [6_000_000_000, -300_000_000, (1 << 64) - 300_000_000])
def test_tscs_that_a_guest_took_apart_stay_so(monkeypatch: pytest.MonkeyPatch, apart: int) -> None:
    host = Host(monkeypatch, [1e-5] * 40)
    vcpus = [FakeVcpu(host), FakeVcpu(host)]
    first = 1_000_000_000
    clocks.restore(FakeVm(host), vcpus, 0, SINCE, [first, (first + apart) % (1 << 64)])
    assert (vcpus[1].tsc() - vcpus[0].tsc() - apart) % (1 << 64) == 0


def test_a_kernel_without_offsets_is_told_the_tscs(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [1e-5] * 40)
    vcpus = [FakeVcpu(host, reports=False), FakeVcpu(host, reports=False)]
    clocks.restore(FakeVm(host), vcpus, 0, SINCE, [9_000_000_000, 19_000_000_000])
    for vcpu, tsc in zip(vcpus, (9_000_000_000, 19_000_000_000), strict=True):
        ((index, value),) = vcpu.written
        assert index == abi.MSR_TSC
        assert value == pytest.approx(_due(host, tsc), abs=1e5)


def test_a_tsc_that_is_refused_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [1e-5] * 40)
    vcpu = FakeVcpu(host, reports=False)
    monkeypatch.setattr(vcpu, "set_msrs", lambda msrs: 0)
    with pytest.raises(KvmError, match="vCPU 0: KVM refused its TSC"):
        clocks.restore(FakeVm(host), [vcpu], 0, SINCE, [1])


def test_a_clock_that_was_set_too_late_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Setting it takes 4 ms: when it takes effect, the time that was asked for is past.
    host = Host(monkeypatch, [SLOW_S, 1e-5, 1e-5, 1e-5])
    vm = FakeVm(host)
    clocks.restore(vm, [FakeVcpu(host)], 5_000_000, SINCE, [0])
    assert host.calls == 4  # set, read, set, read
    assert host.ns() + vm.off == pytest.approx(_due(host, 5_000_000), abs=QUICK_S * 1e9)


def test_a_clock_is_set_by_as_much_earlier_as_setting_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 0.2 ms until it takes effect, each time: not much, but a guest may move often.
    host = Host(monkeypatch, [4e-4, 1e-5] * 2)
    vm = FakeVm(host)
    clocks.restore(vm, [FakeVcpu(host)], 5_000_000, SINCE, [0])
    assert host.calls == 4
    assert host.ns() + vm.off == pytest.approx(_due(host, 5_000_000), abs=5000)


def test_a_clock_that_was_set_well_enough_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.2 ms late, then 0.15: there may be somebody who takes milliseconds the next time.
    host = Host(monkeypatch, [4e-4, 1e-5, 7e-4, 1e-5, SLOW_S, 1e-5])
    vm = FakeVm(host)
    clocks.restore(vm, [FakeVcpu(host)], 5_000_000, SINCE, [0])
    assert host.calls == 4
    assert host.ns() + vm.off - _due(host, 5_000_000) == pytest.approx(-150_000, abs=10_000)


def test_a_clock_is_never_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second setting takes no time, but was made earlier by what the first one took.
    host = Host(monkeypatch, [9.8e-4, 1e-5, 0.0, 1e-5])
    vm = FakeVm(host)
    clocks.restore(vm, [FakeVcpu(host)], 5_000_000, SINCE, [0])
    assert host.calls == 4
    assert 0 < host.ns() + vm.off - _due(host, 5_000_000) <= QUICK_S * 1e9


def test_a_host_that_is_always_slow_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S] * 80)
    clocks.restore(FakeVm(host), [FakeVcpu(host)], 0, SINCE, [0])
    assert host.calls == 3 * (1 + 3)
