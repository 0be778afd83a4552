"""What one VM alone may have goes over with the guest, and comes back with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from godwit.errors import HostError, StateError
from godwit.hw.capabilities import OwnsHostState, RefusesCopies
from godwit.hw.device import Device
from godwit.hw.devices import Devices
from godwit.migration.times import Times
from godwit.spec.runstate import RunState
from migration_bench import Migration


class Lock:
    """A lock that one of several has, and what happened to it, in order."""

    def __init__(self) -> None:
        self.owner: Part | None = None
        self.log: list[str] = []


class Part(OwnsHostState):
    """A part that is to have the lock while its guest runs."""

    def __init__(self, name: str, lock: Lock) -> None:
        self.name, self.lock = name, lock
        self.refuses: str | None = None
        self.keeps: str | None = None

    def sync(self) -> None:
        if self.lock.log[-1:] != [f"{self.name} syncs"]:
            self.lock.log.append(f"{self.name} syncs")

    def release(self) -> None:
        if self.keeps:
            raise HostError(self.keeps)
        if self.lock.owner is self:
            self.lock.owner = None
            self.lock.log.append(f"{self.name} releases")

    def acquire(self) -> None:
        if self.lock.owner is self:
            return
        if self.refuses or self.lock.owner is not None:
            raise HostError(self.refuses or "another has it")
        self.lock.owner = self
        self.lock.log.append(f"{self.name} acquires")


class Holder:
    """A device that is nothing but such a part."""

    kind = "part"

    def __init__(self, part: Part) -> None:
        self.id, self._part = part.name, part

    def parts(self) -> tuple[Part]:
        return (self._part,)


def _devices(*parts: Part) -> Devices:
    devices = Devices()
    for part in parts:
        devices.add(cast(Device, Holder(part)))
    return devices


class Rig:
    """A migration whose NICs have such a part."""

    def __init__(self, folder: Path) -> None:
        self.lock = Lock()
        self.migration = Migration(folder, times=Times(silence=5.0, marker=0.0, late=0.0))
        self.here, self.there = Part("source", self.lock), Part("destination", self.lock)
        for side, part in ((self.migration.here, self.here), (self.migration.there, self.there)):
            (device,) = (one for one in side.machine.devices if one.id == "nic0")
            parts = (*device.parts(), part)
            device.parts = lambda parts=parts: parts  # type: ignore[method-assign,misc]
            side.machine.devices._found.clear()
        self.here.acquire()

    def close(self) -> None:
        self.migration.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_what_others_lose_by_comes_last() -> None:
    log: list[str] = []
    connections, disk = Part("connections", Lock()), Part("disk", Lock())
    connections.last = True
    connections.lock.log = disk.lock.log = log
    devices = _devices(connections, disk)
    disk.refuses = "another has the disk"
    for _ in range(3):
        with pytest.raises(HostError, match=r"^device 'disk': another has the disk$"):
            devices.acquire()
    assert log == []
    disk.refuses = None
    devices.acquire()
    disk.keeps = "it cannot be flushed"
    with pytest.raises(HostError, match=r"^device 'disk': it cannot be flushed$"):
        devices.release()
    assert connections.lock.owner is connections
    disk.keeps = None
    devices.release()
    assert log == [f"{n} {d}" for d in ("acquires", "releases") for n in ("disk", "connections")]


def test_what_is_taken_in_vain_is_given_back_and_nothing_else() -> None:
    held, taken, odd, missing = (Part(name, Lock()) for name in ("held", "taken", "odd", "missing"))
    devices = _devices(held, taken, odd, missing)
    devices.acquire()
    for part in (taken, odd, missing):
        part.lock.owner = None
        devices._held.discard(part)
    missing.refuses, odd.keeps = "another has it", "it is stuck"
    says = "device 'missing': another has it; and then device 'odd': it is stuck"
    with pytest.raises(HostError, match=rf"^{says}$"):
        devices.acquire()
    assert held.lock.owner is held
    assert taken.lock.owner is None
    assert "held releases" not in held.lock.log


def test_it_goes_over_at_the_commit(rig: Rig) -> None:
    rig.migration.run()
    assert rig.migration.running == (False, True)
    assert rig.lock.owner is rig.there
    order = [entry for entry in rig.lock.log if "syncs" not in entry]
    assert order == ["source acquires", "source releases", "destination acquires"]
    assert rig.lock.log[1] == "source syncs", "ahead of the stop"


def test_a_guest_that_came_paused_has_it_too(rig: Rig) -> None:
    rig.migration.there.migrations.autostart = False
    rig.migration.run()
    assert rig.migration.running == (False, False)
    assert rig.lock.owner is rig.there


def test_a_destination_that_cannot_have_it_gives_the_guest_back(rig: Rig) -> None:
    rig.there.refuses = "somebody has the disk"
    rig.migration.run()
    assert rig.migration.running == (True, False)
    assert rig.lock.owner is rig.here
    error = rig.migration.source.report.error
    assert error is not None
    assert "the destination gave the guest up: device 'nic0': somebody has the disk" in error
    assert rig.migration.here.states.current is RunState.RUNNING
    rig.migration.there.wait_failed()


def test_a_source_that_cannot_release_it_keeps_the_guest(rig: Rig) -> None:
    rig.here.keeps = "the disk cannot be flushed"
    rig.migration.run()
    assert rig.migration.running == (True, False)
    assert rig.migration.source.report.error == "device 'nic0': the disk cannot be flushed"


@pytest.mark.parametrize("before", [RunState.RUNNING, RunState.PAUSED])
def test_a_guest_that_cannot_have_it_back_stays_stopped_until_it_can(
    rig: Rig, before: RunState
) -> None:
    if before is RunState.PAUSED:
        rig.migration.here.machine.pause()
        rig.migration.here.states.set(before)
    rig.there.refuses = rig.here.refuses = "a third has the disk"
    rig.migration.run()
    assert rig.migration.running == (False, False)
    assert rig.migration.here.states.current is RunState.PAUSED
    error = rig.migration.source.report.error
    assert error is not None
    assert "on the guest's way back: device 'nic0': a third has the disk" in error
    rig.here.refuses = None
    rig.migration.here.machine.resume()
    assert rig.lock.owner is rig.here


class Hanging:
    """The storage of the source's part, which hangs once the guest has stopped."""

    def __init__(self, rig: Rig) -> None:
        self.inside, self.goes_on = threading.Event(), threading.Event()
        self.over = threading.Event()
        self._sync = rig.here.sync
        rig.here.sync = self.sync  # type: ignore[method-assign]

    def sync(self) -> None:
        self._sync()
        if threading.current_thread().name == "last-sync":
            self.inside.set()
            self.goes_on.wait(60)
            self.over.set()


def _cancel(rig: Rig) -> None:
    rig.migration.here.migrations.cancel()


def _let_time_pass(rig: Rig) -> None:
    source = rig.migration.source
    source._times = source._times._replace(now=lambda: time.monotonic() + 1000)


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        (_cancel, "cancelled", None),
        (_let_time_pass, "failed", "disks were not flushed in the time"),
    ],
)
def test_a_flush_that_hangs_does_not_hold_the_guest(
    rig: Rig, end: Callable[[Rig], None], status: str, says: str | None
) -> None:
    storage = Hanging(rig)
    rig.migration.begin()
    assert storage.inside.wait(30)
    end(rig)
    rig.migration.finish()
    assert rig.migration.here.statuses[-1] == status
    assert (says or "") in (rig.migration.source.report.error or "")
    assert rig.migration.running == (True, False)
    assert rig.migration.here.states.current is RunState.RUNNING
    storage.goes_on.set()  # and its late end changes nothing
    assert storage.over.wait(30)
    assert rig.lock.owner is rig.here
    assert "source releases" not in rig.lock.log


def test_a_save_whose_flush_hangs_can_be_cancelled(rig: Rig, tmp_path: Path) -> None:
    storage, side = Hanging(rig), rig.migration.here
    side.migrations.save(str(tmp_path / "guest"), False, "")
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    assert storage.inside.wait(30)
    assert outgoing.cancel()
    outgoing.join(60)
    assert side.statuses[-1] == "cancelled"
    assert side.machine.running
    assert rig.lock.owner is rig.here
    storage.goes_on.set()
    assert storage.over.wait(30)


def test_a_sync_with_a_bug_fails_the_migration(rig: Rig) -> None:
    def sync() -> None:
        if threading.current_thread().name == "last-sync":
            raise RuntimeError("a bug")

    rig.here.sync = sync  # type: ignore[method-assign]
    rig.migration.run()
    assert rig.migration.running == (True, False)
    assert "a bug" in (rig.migration.source.report.error or "")


def _save(rig: Rig, path: Path, keep_running: bool) -> str:
    """Save the source's guest, and return what became of that."""
    side = rig.migration.here
    side.migrations.save(str(path), keep_running, "")
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    outgoing.join(60)
    return side.statuses[-1]


def test_a_guest_in_a_file_has_it_no_more(rig: Rig, tmp_path: Path) -> None:
    assert _save(rig, tmp_path / "guest", False) == "completed"
    assert rig.lock.owner is None
    assert rig.lock.log[-1] == "source releases"


def test_a_guest_that_runs_on_while_it_is_saved_has_it_all_the_time(
    rig: Rig, tmp_path: Path
) -> None:
    assert _save(rig, tmp_path / "guest", True) == "completed"
    assert rig.lock.owner is rig.here
    assert "source releases" not in rig.lock.log


def test_a_save_that_fails_at_the_end_gives_it_back(rig: Rig, tmp_path: Path) -> None:
    rig.here.keeps = "the disk cannot be flushed"
    assert _save(rig, tmp_path / "guest", False) == "failed"
    assert rig.lock.owner is rig.here
    assert rig.migration.here.machine.running
    assert not list(tmp_path.glob("*guest*"))


def test_a_part_that_may_not_be_twice_refuses_a_copy(rig: Rig, tmp_path: Path) -> None:
    class Single(RefusesCopies):
        def why_no_copy(self) -> str | None:
            return why

    devices = rig.migration.here.machine.devices
    (device,) = (one for one in devices if one.id == "nic0")
    parts = (*device.parts(), Single())
    device.parts = lambda: parts  # type: ignore[method-assign]
    devices._found.clear()
    why: str | None = "it is the only one"
    with pytest.raises(StateError, match=r"device 'nic0': it is the only one; .* keep-running"):
        _save(rig, tmp_path / "guest", True)
    why = None
    assert _save(rig, tmp_path / "guest", True) == "completed"
    why = "it is the only one"
    assert _save(rig, tmp_path / "guest", False) == "completed"
