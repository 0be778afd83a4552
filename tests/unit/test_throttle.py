"""A throttled vCPU: slices, rests, and that nothing has to wait for one that rests.

KVM_RUN is a stand-in that ends when it is kicked, and the clock stands still until it is set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.host.kvm import abi
from godwit.host.kvm.handles import Vcpu
from godwit.hw.bus import MmioBus, PortBus
from godwit.machine.vcpu import SLICE_S, StopReason, VcpuThread, rest_after
from godwit.migration.ram.throttle import Throttle


@given(ran=st.floats(1e-4, 0.05), percent=st.integers(1, 99))
def test_a_rest_makes_up_for_the_time_in_the_guest(ran: float, percent: int) -> None:
    rest = rest_after(ran, percent)
    assert rest / (ran + rest) == pytest.approx(percent / 100)


@given(ran=st.floats(0.0, 1e6), percent=st.integers(0, 99))
def test_no_rest_is_long(ran: float, percent: int) -> None:
    assert 0 <= rest_after(ran, percent) < 5.0


class Guest:
    """A vCPU's thread, and what it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.kicks = 0
        self.ends = threading.Event()
        self._kicked = threading.Event()
        self._entered = threading.Semaphore(0)
        page = bytearray(4096)
        self._page = page
        monkeypatch.setattr("godwit.machine.vcpu.time", SimpleNamespace(monotonic=lambda: self.now))
        vcpu = cast(Vcpu, SimpleNamespace(index=0, run_page=page, run=self._run, kick=self._kick))
        self.thread = VcpuThread(vcpu, PortBus(), MmioBus(), lambda ending, detail: None)
        self.thread.start()

    def _run(self) -> None:
        self._entered.release()
        if not self._page[abi.RUN_IMMEDIATE_EXIT]:
            assert self._kicked.wait(60)
        self._kicked.clear()
        if self.ends.is_set():
            self.thread.exit(StopReason.RESET, "the guest reset the machine")
            return
        raise InterruptedError

    def _kick(self, thread: int | None) -> None:
        self._page[abi.RUN_IMMEDIATE_EXIT] = 1
        if thread is None:
            return
        self.kicks += 1
        self._kicked.set()

    def kick(self) -> None:
        """From elsewhere: any exit."""
        self._kicked.set()

    def runs(self) -> None:
        """It entered the guest (once more)."""
        assert self._entered.acquire(timeout=60)

    @property
    def inside(self) -> bool:
        """Whether it entered the guest once more."""
        return self._entered.acquire(blocking=False)

    def rests(self) -> None:
        """Have its slice end, and wait until it rests."""
        self.now += SLICE_S
        self.thread.end_slice()
        with self.thread._changed:
            assert self.thread._changed.wait_for(lambda: self.thread._rests_until, 60)

    def paused(self) -> None:
        """Pause it; it must be parked already."""
        self.thread.request_pause()
        self.thread.wait_paused(0)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    guest = Guest(monkeypatch)
    guest.thread.resume()
    guest.runs()
    yield guest
    guest.thread.stop()
    assert not guest.thread._thread.is_alive()


def test_a_slice_a_rest_and_the_next_slice(guest: Guest) -> None:
    guest.thread.throttle(20)
    assert guest.thread.end_slice() == pytest.approx(SLICE_S)
    guest.now += SLICE_S * 0.75
    assert guest.thread.end_slice() == pytest.approx(SLICE_S / 4)
    assert guest.kicks == 0
    guest.now += SLICE_S / 4
    assert guest.thread.end_slice() == SLICE_S
    assert guest.kicks == 1
    guest.runs()  # after a rest of 2.5 ms
    assert guest.thread.end_slice() == pytest.approx(SLICE_S)


def test_it_is_asked_again_when_its_next_slice_is_over(guest: Guest) -> None:
    guest.thread.throttle(99)
    guest.rests()
    assert guest.thread.end_slice() == pytest.approx(0.99 + SLICE_S)
    assert guest.kicks == 1


def test_what_ran_before_the_throttle_does_not_count(guest: Guest) -> None:
    guest.now += 3600
    guest.thread.throttle(99)
    assert guest.thread.end_slice() == pytest.approx(SLICE_S)
    assert guest.kicks == 0


def test_a_vcpu_that_is_not_throttled_is_left_alone(guest: Guest) -> None:
    guest.now += 3600
    guest.thread.end_slice()
    assert guest.kicks == 0


def test_a_pause_does_not_wait_for_a_rest(guest: Guest) -> None:
    guest.thread.throttle(99)
    guest.rests()
    guest.paused()
    assert guest.kicks == 1  # it needs no kick either
    guest.thread.throttle(0)
    assert not guest.inside
    guest.thread.resume()
    guest.runs()


def test_a_pause_and_a_resume_leave_the_throttle(guest: Guest) -> None:
    guest.thread.throttle(99)
    guest.rests()
    guest.paused()
    guest.thread.resume()
    assert guest.thread.end_slice() > SLICE_S
    assert not guest.inside
    guest.thread.throttle(0)
    guest.runs()


def test_the_end_of_the_throttle_ends_a_rest(guest: Guest) -> None:
    guest.thread.throttle(99)
    guest.rests()
    assert not guest.inside
    guest.thread.throttle(0)
    guest.runs()
    guest.now += 3600
    guest.thread.end_slice()
    assert guest.kicks == 1


def test_a_vcpu_in_the_guest_pauses_as_ever(guest: Guest) -> None:
    guest.thread.throttle(50)
    guest.thread.request_pause()
    guest.thread.wait_paused(60)
    guest.now += 3600
    guest.thread.end_slice()
    assert guest.kicks == 1
    guest.thread.resume()
    guest.runs()
    assert guest.thread.end_slice() == pytest.approx(SLICE_S)  # the pause is no time in the guest


def test_a_guest_that_resets_does_not_rest(guest: Guest) -> None:
    guest.thread.throttle(99)
    guest.ends.set()
    guest.kick()
    guest.thread.wait_paused(60)
    assert guest.thread.exited is not None
    assert guest.thread._rests_until == 0
    guest.thread.throttle(0)
    guest.thread.revive()
    guest.ends.clear()
    guest.thread.resume()
    guest.runs()


def test_its_thread_ends_while_it_rests(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    # A rest of the usual length would be over before the deadline of stop().
    monkeypatch.setattr("godwit.machine.vcpu.rest_after", lambda ran, percent: 3600.0)
    guest.thread.throttle(99)
    guest.rests()
    guest.thread.stop()
    assert not guest.thread._thread.is_alive()


class FakeVcpu:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.percent = 0
        self.asked = threading.Event()

    def throttle(self, percent: int) -> None:
        self.percent = percent

    def end_slice(self) -> float:
        self.asked.set()
        return 0.001


def test_the_throttle_of_a_machine() -> None:
    vcpus = [FakeVcpu(), FakeVcpu()]
    throttle = Throttle(lambda: vcpus)
    assert throttle.percent == 0
    throttle.set(0)
    assert throttle._thread is None
    throttle.set(20)
    for vcpu in vcpus:
        assert vcpu.asked.wait(60)
    throttle.set(30)
    assert [throttle.percent, *(vcpu.percent for vcpu in vcpus)] == [30] * 3
    throttle.end()
    assert [throttle.percent, *(vcpu.percent for vcpu in vcpus)] == [0] * 3
    assert throttle._thread is not None
    throttle._thread.join(60)
    assert not throttle._thread.is_alive()
    throttle.end()
    throttle.set(50)
    assert [throttle.percent, *(vcpu.percent for vcpu in vcpus)] == [0] * 3


def test_a_throttle_that_was_never_needed_asks_for_no_vcpus() -> None:
    def none() -> list[FakeVcpu]:
        raise AssertionError

    throttle = Throttle(none)
    throttle.set(0)
    throttle.end()
    throttle.set(20)
