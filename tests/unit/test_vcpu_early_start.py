"""A vCPU that runs before there are devices: what needs one waits, and nothing is lost.

KVM_RUN is a stand-in that leaves the guest for one OUT, and then runs until it is kicked.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from godwit.host.kvm import abi
from godwit.host.kvm.handles import Vcpu
from godwit.hw.bus import MmioBus, PortBus
from godwit.machine.vcpu import StopReason, VcpuThread

PORT, VALUE, DATA_AT = 0x80, 0x5A, 0x100


class Device:
    """Notes what is written."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.came = threading.Event()

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("nothing is read here")

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append(value)
        self.came.set()


class Guest:
    """A vCPU's thread, its bus, and what it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._page = bytearray(4096)
        self._kicked = threading.Event()
        self.left = threading.Event()
        self.runs = 0
        self.fails = False
        self.ended = threading.Event()
        self.reported: list[tuple[StopReason, str]] = []
        vcpu = cast(
            Vcpu, SimpleNamespace(index=0, run_page=self._page, run=self._run, kick=self._kick)
        )
        self.ports, self.device = PortBus(), Device()
        self.thread = VcpuThread(vcpu, self.ports, MmioBus(), self._tell)
        self.thread.start()

    def _run(self) -> None:
        self.runs += 1
        if self.runs > 1:
            if not self._page[abi.RUN_IMMEDIATE_EXIT]:
                assert self._kicked.wait(60)
            self._kicked.clear()
            raise InterruptedError
        if self.fails:
            self.left.set()
            raise OSError(errno.EFAULT, "Bad address")
        self._page[abi.RUN_EXIT_REASON] = abi.EXIT_IO
        abi.RUN_IO.pack_into(self._page, abi.RUN_UNION, 1, 1, PORT, 1, DATA_AT)
        self._page[DATA_AT] = VALUE
        self.left.set()

    def _tell(self, ending: StopReason, detail: str) -> None:
        self.reported.append((ending, detail))
        self.ended.set()

    def _kick(self, thread: int | None) -> None:
        self._page[abi.RUN_IMMEDIATE_EXIT] = 1
        if thread is not None:
            self._kicked.set()


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    guest = Guest(monkeypatch)
    yield guest
    guest.thread.stop()
    assert not guest.thread._thread.is_alive()


def test_the_first_exit_is_served_by_a_device_that_came_later(guest: Guest) -> None:
    guest.thread.start_early()
    assert guest.left.wait(60)
    assert guest.thread.early
    guest.ports.map(PORT, 1, guest.device)
    assert guest.device.written == []
    guest.thread.resume()
    assert guest.device.came.wait(60)
    assert guest.device.written == [VALUE]
    assert not guest.thread.early


def test_devices_that_are_there_first_are_not_waited_for(guest: Guest) -> None:
    guest.ports.map(PORT, 1, guest.device)
    guest.thread.resume()
    assert guest.device.came.wait(60)


def test_one_whose_devices_never_come_can_be_ended(guest: Guest) -> None:
    guest.ports.map(PORT, 1, guest.device)
    guest.thread.start_early()
    assert guest.left.wait(60)
    guest.thread.stop()
    assert not guest.thread._thread.is_alive()
    assert (guest.device.written, guest.runs) == ([], 1)


def test_a_guest_that_started_early_is_paused_as_any_other(guest: Guest) -> None:
    guest.ports.map(PORT, 1, guest.device)
    guest.thread.start_early()
    assert guest.left.wait(60)
    guest.thread.resume()
    assert guest.device.came.wait(60)
    guest.thread.request_pause()
    guest.thread.wait_paused(60)
    assert guest.device.written == [VALUE]


def test_an_error_of_kvms_waits_for_somebody_to_receive_it(guest: Guest) -> None:
    guest.fails = True
    guest.thread.start_early()
    assert guest.left.wait(60)
    assert guest.thread.exited is None
    guest.thread.resume()
    assert guest.ended.wait(60)
    assert guest.reported == [(StopReason.INTERNAL_ERROR, "KVM_RUN: [Errno 14] Bad address")]
