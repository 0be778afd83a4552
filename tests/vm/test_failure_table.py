"""Every phase of a move x every fault, with real guests: exactly one side runs, its peers are
answered, and whoever has no guest any more gives all back.

tests/unit/test_failure_table.py has the same table with stand-ins, in seconds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest, Watched, held, resident

from godwit.client.vm import VmGone
from godwit.errors import GodwitError
from godwit.migration.wire.messages import Kind
from lab.scenario import wait_for
from tests.fakes.connection_cutter import ConnectionCutter

pytestmark = ONE_BACKEND

#: From here on the guest may be at its destination; before, it is not.
_COMMITTED = (Kind.COMMIT, Kind.SWITCHED, Kind.PATH_DRAINED, Kind.STARTED, Kind.ACK)
#: The frame at which the fault strikes. (TOUCH and ROUND come while RAM does.)
_PHASES = (Kind.HELLO, Kind.WELCOME, Kind.RAM, Kind.STATE, Kind.READY, *_COMMITTED)
#: Bytes that a source may keep of moves that failed: what it imported for the first one.
_KEPT = 8 << 20


class Move:
    """A move of the guest over a line that tells of each frame before it passes it on."""

    def __init__(self, bench: Bench, guest: Guest, stays: bool) -> None:
        self.bench = bench
        self.guest = guest
        self.source = guest.vm
        self.target = bench.target(guest, another=stays)
        self.far = bench.listen(self.target)
        self.near = bench.folder / f"{self.target.name}.cut"
        self._checksum = guest.agent.mem_start(8)
        self._held = held(self.source.pid)
        #: A destination that does not know that its source knows listens on.
        self.unheard = False
        self._resident = resident(self.source.pid)

    def line(
        self,
        kind: Kind | None = None,
        before: Callable[[], None] | None = None,
        on_frame: Callable[[Kind, bytes | bytearray], None] = lambda kind, payload: None,
    ) -> ConnectionCutter:
        """The line; see ConnectionCutter."""
        far = Path(self.far.removeprefix("unix:"))
        return ConnectionCutter(self.near, far, kind, False, before, on_frame)

    def start(self) -> None:
        """Over that line."""
        self.source.start_migration(f"unix:{self.near}")

    def judge(self, completed: bool, code: int = 1) -> None:
        """The guest is where it should be, and only there; ``code``: how a destination ends that
        was left without."""
        if completed:
            self._has_moved()
        else:
            self._has_stayed(code)
        self.bench.answers()
        assert self.guest.agent.mem_check() == self._checksum

    def _has_moved(self) -> None:
        source, target = self.source, self.target
        wait_for(lambda: target.status() == "running", 60)
        assert len(target.news("RESUME")) == 1
        assert not source.news("RESUME")
        self.bench.moved(self.guest, target, source.qmp.execute("query-migrate"))
        assert source.wait(60) == 0
        if not self.unheard:
            self._gives_back(target)

    def _gives_back(self, vm: Watched) -> None:
        """It holds what the source held before."""
        with suppress(TimeoutError):
            wait_for(lambda: held(vm.pid) == self._held, 60)
        assert held(vm.pid) == self._held

    def _has_stayed(self, code: int) -> None:
        source, target = self.source, self.target
        assert source.status() == "running"
        assert target.wait(60) == code  # so its tap is free, which the next move takes
        self._gives_back(source)
        assert resident(source.pid) - self._resident < _KEPT

    def end_target(self) -> int:
        """End a destination that met a source at its end: it waits on, or it heard why and ends.
        Returns its exit code."""
        with suppress(VmGone):
            return self.target.wait(15)
        assert self.target.status() == "inmigrate"
        return self.target.quit()


@pytest.mark.parametrize("kind", _PHASES, ids=lambda kind: kind.name)
def test_the_line_breaks(bench: Bench, guest: Guest, kind: Kind) -> None:
    completes = kind in _COMMITTED
    move = Move(bench, guest, stays=not completes)
    move.unheard = kind is Kind.ACK
    with move.line(kind) as line:
        move.start()
        info = move.source.wait_migration()
        assert line.cut.wait(60)  # the last one comes after the end
    assert info["status"] == ("completed" if completes else "failed")
    waits = kind in (Kind.HELLO, Kind.WELCOME)  # nothing changed there: another source may come
    if waits:
        assert move.target.status() == "inmigrate"
        bench.retire(move.target)
    move.judge(completes, code=0 if waits else 1)
    if move.unheard:  # that process listens on, and others are measured by the guest's process
        bench.move(guest, bench.target(guest))


@pytest.mark.parametrize("kind", _PHASES[:-1], ids=lambda kind: kind.name)
def test_the_destination_is_killed(bench: Bench, guest: Guest, kind: Kind) -> None:
    """Up to the last word before the source is content; after it, its guest dies with it."""
    move = Move(bench, guest, stays=True)

    def kill() -> None:
        os.kill(move.target.pid, signal.SIGKILL)

    with move.line(kind, before=kill) as line:
        move.start()
        info = move.source.wait_migration()
        assert line.cut.is_set()
    assert info["status"] == "failed"
    move.judge(completed=False, code=-signal.SIGKILL)


@pytest.mark.parametrize("kind", _PHASES, ids=lambda kind: kind.name)
def test_the_destination_hangs(bench: Bench, guest: Guest, kind: Kind) -> None:
    """Nothing is heard of it for longer than the source waits; then it wakes up again."""
    completes = kind is Kind.READY or kind in _COMMITTED  # READY comes, and is answered by COMMIT
    move = Move(bench, guest, stays=not completes)
    hung = threading.Event()

    def hang(seen: Kind, payload: bytes | bytearray) -> None:
        if seen is kind and not hung.is_set():
            os.kill(move.target.pid, signal.SIGSTOP)
            hung.set()

    with move.line(on_frame=hang):
        try:
            move.start()
            assert hung.wait(60)
            wait_for(lambda: _given_up(move.source), 60)
        finally:
            os.kill(move.target.pid, signal.SIGCONT)
        info = move.source.wait_migration()
    assert info["status"] == ("completed" if completes else "failed")
    if kind is Kind.HELLO:  # it woke up to a HELLO whose source was gone: another may come
        assert move.target.status() == "inmigrate"
        bench.retire(move.target)
    move.judge(completes, code=0 if kind is Kind.HELLO else 1)


def _given_up(source: Watched) -> bool:
    info = source.qmp.execute("query-migrate")
    return info["status"] in ("completed", "failed") or "querying" in info.get("error-desc", "")


@pytest.mark.parametrize("kind", _PHASES, ids=lambda kind: kind.name)
def test_it_is_cancelled(bench: Bench, guest: Guest, kind: Kind) -> None:
    completes = kind in _COMMITTED
    move = Move(bench, guest, stays=not completes)
    reached, on = threading.Event(), threading.Event()

    def hold(seen: Kind, payload: bytes | bytearray) -> None:
        if seen is kind and not reached.is_set():
            reached.set()
            on.wait(60)

    with move.line(on_frame=hold):
        try:
            move.start()
            assert reached.wait(60)
            with suppress(GodwitError):  # too late
                move.source.qmp.execute("migrate_cancel")
            if kind is Kind.READY:  # else its passing meets a closed end, and takes FAILED along
                move.source.wait_migration()
        finally:
            on.set()
        info = move.source.wait_migration()
    assert info["status"] == ("completed" if completes else "cancelled")
    move.judge(completes, code=move.end_target() if kind is Kind.HELLO else 1)


def test_the_state_is_bad(bench: Bench, guest: Guest) -> None:
    move = Move(bench, guest, stays=True)

    def spoil(seen: Kind, payload: bytes | bytearray) -> None:
        if seen is Kind.STATE and isinstance(payload, bytearray):
            payload[len(payload) // 2 :] = bytes(len(payload) - len(payload) // 2)

    with move.line(on_frame=spoil):
        move.start()
        info = move.source.wait_migration()
    assert info["status"] == "failed"
    assert "MachineState" in info["error-desc"]
    move.judge(completed=False)
