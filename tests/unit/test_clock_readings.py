"""Clocks are read and set at one instant, however busy the host is. KVM and time are stand-ins."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from godwit.errors import KvmError
from godwit.kvm import abi, handles
from godwit.kvm.handles import QUICK_S, Vcpu, Vm

AHEAD_NS = 7_000_000_000
REAL_NS = 1_700_000_000_000_000_000
SLOW_S = 0.004
MONOTONIC_S = 100.0


class Host:
    """Time that passes only within calls; each takes the next of ``delays``, s, a half before KVM
    looks and a half after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delays: Iterable[float]) -> None:
        self.now = MONOTONIC_S
        self._delays = iter(delays)
        self.calls = 0
        clock = SimpleNamespace(
            monotonic=lambda: self.now, time_ns=lambda: REAL_NS + self.ns() - AHEAD_NS
        )
        monkeypatch.setattr("godwit.kvm.handles.time", clock)

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
        self.fd = -1
        self.host, self.exact, self.off = host, exact, 0

    def get(self, request: int, size: int, first: bytes = b"") -> bytes:
        assert request == abi.GET_CLOCK
        clock = self.host.call() + self.off
        flags = abi.CLOCK_REALTIME if self.exact else 0
        return abi.CLOCK_DATA.pack(clock, flags, 0, 42, 0)

    def set(self, request: int, data: bytes) -> int:
        assert request == abi.SET_CLOCK
        self.off = abi.CLOCK_DATA.unpack(data)[0] - self.host.call()
        return 0


class FakeVcpu(Vcpu):
    """A vCPU that has only a TSC, of a GHz."""

    def __init__(self, host: Host, tells: bool = True) -> None:
        self.fd, self.index = -1, 0
        self.host, self.tells = host, tells

    def get_msrs(self, indices: list[int]) -> list[tuple[int, int]]:
        assert indices == [abi.MSR_TSC]
        return [(abi.MSR_TSC, self.host.call())] if self.tells else []


def test_a_quick_reading_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [QUICK_S / 2])
    read = FakeVm(host).clock()
    assert read.guest - (read.realtime - REAL_NS) == pytest.approx(AHEAD_NS, abs=1000)
    assert read.guest == pytest.approx((read.monotonic - MONOTONIC_S) * 1e9 + AHEAD_NS, abs=1000)
    assert host.calls == 1


def test_the_quickest_of_slow_readings_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, SLOW_S / 4, SLOW_S / 2])
    read = FakeVm(host).clock()
    assert read.guest == pytest.approx((SLOW_S + SLOW_S / 8) * 1e9 + AHEAD_NS, abs=1000)
    assert host.calls == 3


def test_the_hosts_own_clocks_are_read_at_one_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, SLOW_S / 2, 1e-5, 1e-5])
    look = handles.time.time_ns

    def time_ns() -> int:
        host.call()
        return look()

    monkeypatch.setattr(handles.time, "time_ns", time_ns)
    realtime, monotonic = handles.host_clocks()
    assert host.calls == 3
    assert realtime - REAL_NS == pytest.approx((monotonic - MONOTONIC_S) * 1e9, abs=1e4)


def test_what_the_kernel_knows_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FakeVm(Host(monkeypatch, [SLOW_S] * 4), exact=True).clock().realtime == 42


def test_a_clock_that_was_set_too_late_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Setting it takes 4 ms: when it takes effect, the time that was asked for is past.
    host = Host(monkeypatch, [SLOW_S, 1e-5, 1e-5, 1e-5])
    vm = FakeVm(host)
    vm.set_clock(5_000_000, since=MONOTONIC_S)
    assert host.calls == 4  # set, read, set, read
    due = 5_000_000 + int((host.now - MONOTONIC_S) * 1e9)
    assert host.ns() + vm.off == pytest.approx(due, abs=QUICK_S * 1e9)


def test_a_host_that_is_always_slow_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S] * 40)
    FakeVm(host).set_clock(0, since=MONOTONIC_S)
    assert host.calls == 3 * (1 + 3)


def test_a_plain_setting_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [1e-5])
    vm = FakeVm(host)
    vm.set_clock(9)
    assert host.calls == 1


def test_the_tsc_is_read_as_the_clock_is(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [SLOW_S, 1e-5])
    value, at = FakeVcpu(host).tsc()
    assert value == pytest.approx((at - MONOTONIC_S) * 1e9 + AHEAD_NS, abs=1000)
    with pytest.raises(KvmError, match="vCPU 0: its TSC"):
        FakeVcpu(host, tells=False).tsc()
