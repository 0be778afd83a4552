"""The sending half's rounds: measured, judged, throttled, and ended however it ends.

The machine is a stand-in. Its guest makes pages dirty as time goes on, and time goes on as the line
takes bytes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
from msgspec.structs import replace

from godwit.errors import LinkLost
from godwit.hw.devices import Devices
from godwit.hw.memory import PAGE, GuestMemory
from godwit.machine.machine import Machine, OnPhase
from godwit.migration.guest import Guest
from godwit.migration.outgoing import Outgoing
from godwit.migration.times import Times
from godwit.migration.wire.stream import Connection
from godwit.spec.parameters import ConvergenceParameters, MigrationParameters, OnNoConvergence
from godwit.spec.runstate import RunState, RunStates

S = RunState
#: Pages in all, and those that the guest writes to.
ALL, HOT = 4096, 2048
#: Pages per second that the connection takes.
LINE = 1000


class Vcpu:
    """A vCPU, as far as a throttle knows it."""

    def __init__(self) -> None:
        self.percents: list[int] = []

    def throttle(self, percent: int) -> None:
        self.percents.append(percent)

    def end_slice(self) -> float:
        return 60.0


class Standin:
    """A running guest that makes ``speed`` pages dirty in a second of its time."""

    def __init__(self, memory: GuestMemory, speed: float) -> None:
        self.memory = memory
        self.now = 1000.0
        self.speed = speed
        self.vcpus = [Vcpu(), Vcpu()]
        self.vm = SimpleNamespace(dirty_log=self._dirty_log)
        self.devices = Devices()
        self.lock = threading.RLock()
        self.exited = None
        self.running = True
        self._looked = self.now

    @property
    def throttle(self) -> int:
        """In force, percent."""
        (one, other) = ((vcpu.percents or [0])[-1] for vcpu in self.vcpus)
        assert one == other
        return one

    def set_dirty_log(self, on: bool) -> None:
        self._looked = self.now

    def pause(self, on_phase: OnPhase) -> None:
        self.running = False

    def resume(self) -> None:
        self.running = True

    def _dirty_log(self, slot: int, address: int) -> None:
        share = (100 - self.throttle) / 100
        pages = min(HOT, int((self.now - self._looked) * self.speed * share)) // 8 * 8
        self._looked = self.now
        ctypes.memset(address, 0, self.memory.size // PAGE // 8)
        ctypes.memset(address, 0xFF, pages // 8)


class Wire(Connection):
    """Takes ``LINE`` pages in a second; ``breaks`` after so many bytes."""

    def __init__(self, guest: Standin) -> None:
        super().__init__()
        self._guest = guest
        self.breaks = 1 << 60

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        size = sum(map(len, parts))
        self.sent += size
        self._guest.now += size / PAGE / LINE
        if self.sent > self.breaks:
            raise LinkLost("the line broke")

    def read_into(self, views: Sequence[memoryview]) -> None:
        raise NotImplementedError

    def begin(self, length: int | None = None) -> None:
        pass

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class Precopy(Outgoing):
    """Out of the machine, to nowhere."""

    def __init__(self, standin: Standin, parameters: ConvergenceParameters) -> None:
        self.states = RunStates(S.RUNNING)
        self.statuses: list[tuple[str, int]] = []
        self.chosen = MigrationParameters(convergence=parameters)
        guest = Guest(cast(Machine, standin), [], lambda: standin.now)
        times = Times(now=lambda: standin.now)
        super().__init__(guest, self.states, lambda: self.chosen, self._tell, times)
        self._standin = standin
        self._connection = self.wire = Wire(standin)
        self.at_round: Callable[[int], object] = lambda number: None

    def _tell(self, status: str) -> None:
        self.statuses.append((status, self._standin.throttle))

    def _phases(self) -> tuple[Callable[[], None], ...]:
        return self._begin, self._precopy, self._stop, self._hand_over

    def _begin(self) -> None:
        self._log.start()
        self._to_send = [(0, ALL)]

    def _round(
        self, runs: list[tuple[int, int]], looked: float
    ) -> tuple[list[tuple[int, int]], float]:
        self.at_round(len(self.report.rounds))
        return super()._round(runs, looked)

    def _hand_over(self) -> None:
        self._states.set(S.POSTMIGRATE)

    def run(self) -> None:
        self.start()
        self.join(60)
        assert not self.active
        assert self._standin.throttle == 0
        assert self.report.throttle == 0


@pytest.fixture
def guest(memory: GuestMemory) -> Standin:
    memory.view(0, ALL * PAGE)[::8] = b"\1" * (ALL * PAGE // 8)
    return Standin(memory, speed=8000)


def _throttles(migration: Precopy) -> list[int]:
    return [done.throttle for done in migration.report.rounds]


def test_an_idle_guest_costs_one_round(guest: Standin) -> None:
    guest.speed = 1
    migration = Precopy(guest, ConvergenceParameters(auto_converge=True))
    migration.run()
    assert [done.pages for done in migration.report.rounds] == [ALL]
    assert migration.statuses == [("device", 0), ("completed", 0)]
    assert guest.vcpus[0].percents == []


def test_what_is_left_is_sent_before_the_stop_and_after_it_was_found(guest: Standin) -> None:
    guest.speed = 2
    migration = Precopy(guest, ConvergenceParameters())
    done: list[tuple[str, object]] = []
    take, send = migration._log.take, migration._send_pages

    def taken() -> list[tuple[int, int]]:
        runs = take()
        done.append(("found", runs))
        return runs

    def sent(runs: list[tuple[int, int]]) -> None:
        done.append(("sent", runs))
        send(runs)

    migration._log.take, migration._send_pages = taken, sent  # type: ignore[method-assign]
    migration.run()
    assert done[-2:] == [("found", [(0, 8)]), ("sent", [(0, 8)])]
    assert migration._to_send == []
    assert migration._sent_early == 8


def test_a_guest_is_slowed_down_until_it_can_migrate(guest: Standin) -> None:
    migration = Precopy(guest, ConvergenceParameters(auto_converge=True, cpu_throttle_initial=40))
    migration.run()
    assert _throttles(migration)[:8] == [0, 0, 40, 50, 60, 70, 80, 90]  # 8 to 1: needs 90.6
    assert _throttles(migration)[8] == 99
    # Until it has stopped: else it would make good in the last moment what it could not write.
    assert migration.statuses == [("device", 99), ("completed", 0)]
    assert guest.vcpus[0].percents == [40, 50, 60, 70, 80, 90, 99, 0]
    assert not guest.running
    (first, *_, last) = migration.report.rounds
    assert (first.pages, first.dirty) == (ALL, HOT)
    assert first.ms == pytest.approx(ALL / LINE * 1000, rel=0.01)
    assert first.bytes == pytest.approx(ALL * PAGE, rel=0.01)
    assert last.dirty * 1000 / LINE <= 300


def test_the_guest_goes_on_where_nothing_helps(guest: Standin) -> None:
    migration = Precopy(guest, ConvergenceParameters(auto_converge=True, max_cpu_throttle=30))
    migration.run()
    assert _throttles(migration) == [0, 0, 20, 30, 30]
    assert migration.statuses == [("failed", 0)]
    assert migration.states.history == [S.RUNNING]
    assert guest.running
    error = str(migration.report.error)
    assert "after 5 rounds and with its vCPUs throttled by 30 percent" in error
    assert "8.4 MB are left" in error
    info = migration.report.info()
    assert info["error-desc"] == error
    assert info["expected-downtime"] == pytest.approx(2048, rel=0.01)
    assert "cpu-throttle-percentage" not in info


def test_the_guest_is_stopped_where_its_operator_says_so(guest: Standin) -> None:
    anyway = ConvergenceParameters(on_no_convergence=OnNoConvergence.STOP_AND_COPY)
    migration = Precopy(guest, anyway)
    migration.run()
    assert _throttles(migration) == [0] * 30
    assert migration.statuses == [("device", 0), ("completed", 0)]


def test_a_connection_that_breaks_ends_the_throttle(guest: Standin) -> None:
    migration = Precopy(guest, ConvergenceParameters(auto_converge=True))
    migration.wire.breaks = (ALL + 3 * HOT) * PAGE
    migration.run()
    assert guest.vcpus[0].percents[-2:] == [30, 0]
    assert migration.statuses == [("failed", 0)]
    assert guest.running


def test_cancelled_is_throttled_no_more_even_before_the_thread_knows(guest: Standin) -> None:
    migration = Precopy(guest, ConvergenceParameters(auto_converge=True))
    seen = []

    def cancel(number: int) -> None:
        if number == 3:
            seen.append((guest.throttle, migration.report.throttle))
            migration.cancel()
            seen.append((guest.throttle, migration.report.throttle))

    migration.at_round = cancel
    migration.run()
    assert seen == [(30, 30), (0, 0)]
    assert migration.statuses == [("cancelled", 0)]
    assert guest.running


def test_parameters_count_from_the_next_round_on(guest: Standin) -> None:
    migration = Precopy(guest, ConvergenceParameters())

    def change(number: int) -> None:
        if number == 4:
            throttled = ConvergenceParameters(auto_converge=True, cpu_throttle_initial=95)
            migration.chosen = MigrationParameters(convergence=throttled)
        if number == 6:
            migration.chosen = replace(migration.chosen, downtime_limit=10_000)

    migration.at_round = change
    migration.run()
    assert _throttles(migration)[:6] == [0, 0, 0, 0, 0, 95]
    assert migration.report.status == "completed"
