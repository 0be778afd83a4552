"""Saving a guest: whole, or not at all and the guest goes on. The machine is a stand-in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from godwit.hw.memory import PAGE, GuestMemory
from godwit.machine.machine import Machine
from godwit.migration.outgoing import Outgoing
from godwit.migration.snapshot import FileConnection, Saver
from godwit.spec.parameters import MigrationParameters
from godwit.spec.runstate import RunState, RunStates

S = RunState


class Standin:
    """What a save asks of a machine."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.vm = SimpleNamespace(dirty_log=lambda slot, address: None)
        self.nics: list[object] = []
        self.lock = threading.RLock()
        self.ended = None
        self.running = True
        self.logging = False
        self.config = SimpleNamespace(machine=SimpleNamespace(name="godwit-0.2"), cpus=1, nics=())

    def set_dirty_log(self, on: bool) -> None:
        self.logging = on

    def pause(self, mark: Callable[[str], None]) -> None:
        self.running = False

    def resume(self) -> None:
        self.running = True

    def save(self) -> msgspec.Struct:
        return msgspec.defstruct("State", [("serial", int, 1)])()


class Save:
    """A guest that runs, being saved."""

    def __init__(self, memory: GuestMemory, path: Path) -> None:
        self.machine = Standin(memory)
        memory.view(0, 4 * PAGE)[:] = bytes(range(256)) * (4 * PAGE // 256)
        self.states = RunStates(S.RUNNING)
        self.told: list[str] = []
        self.path = path
        self.saver = self._saver()

    def _saver(self) -> Saver:
        parameters = MigrationParameters(downtime_limit=0)
        machine = cast(Machine, self.machine)
        return Saver(machine, self.states, self.path, lambda: parameters, self.told.append)

    def again(self) -> None:
        self.saver = self._saver()
        self.run()

    def run(self) -> None:
        self.saver.start()
        self.saver.join(60)
        assert not self.saver.active


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guest"


def _goes_on(save: Save, path: Path, status: str) -> None:
    assert save.told[-1] == status
    assert (save.machine.running, save.states.current) == (True, S.RUNNING)
    assert not path.exists()


def test_the_guest_is_in_the_file(memory: GuestMemory, path: Path) -> None:
    path.write_text("what was there before")
    save = Save(memory, path)
    save.run()
    assert save.told == ["active", "device", "completed"]
    assert (save.machine.running, save.states.current) == (False, S.POSTMIGRATE)
    assert path.stat().st_size == save.saver.report.bytes_sent > 4 * PAGE
    assert list(path.parent.iterdir()) == [path]
    assert str(path) in save.saver.farewell


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_disk_that_fails_leaves_the_guest_where_it_was(
    memory: GuestMemory, path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls = 0

    def sync(line: FileConnection) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileConnection, "sync", sync)
    save = Save(memory, path)
    save.run()
    _goes_on(save, path, "failed")
    assert calls == at
    assert "Input/output error" in str(save.saver.report.error)
    assert list(path.parent.iterdir()) == []


def test_what_cannot_be_removed_is_named_and_the_save_is_over(
    memory: GuestMemory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    save = Save(memory, path)
    save.run()
    _goes_on(save, path, "failed")
    (left,) = path.parent.iterdir()
    assert str(left) in str(save.saver.report.error)
    assert "delete it" in str(save.saver.report.error)


def test_a_process_that_ends_leaves_no_memory_of_the_guest(
    memory: GuestMemory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck(line: FileConnection) -> None:
        entered.set()
        assert leave.wait(60)

    monkeypatch.setattr(FileConnection, "sync", stuck)
    save = Save(memory, path)
    save.saver.start()
    assert entered.wait(60)
    assert len(list(path.parent.iterdir())) == 1
    save.saver.abandon()
    assert list(path.parent.iterdir()) == []
    leave.set()
    save.saver.join(60)
    _goes_on(save, path, "cancelled")


def test_too_late_to_cancel(memory: GuestMemory, path: Path) -> None:
    save = Save(memory, path)
    save.run()
    assert not save.saver.cancel()
    assert path.exists()


@pytest.mark.parametrize("make", ["directory", "symlink", "socket"])
def test_what_is_no_file_is_not_replaced(memory: GuestMemory, path: Path, make: str) -> None:
    if make == "directory":
        path.mkdir()
    elif make == "symlink":
        path.symlink_to("/dev/null")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    save = Save(memory, path)
    save.run()
    assert (save.told[-1], save.states.history) == ("failed", [S.RUNNING])
    assert "no regular file" in str(save.saver.report.error)
    assert list(path.parent.iterdir()) == [path]


def test_whatever_goes_wrong_another_save_may_be_tried(
    memory: GuestMemory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Outgoing, status: str, error: str | None = None) -> None:
        raise RuntimeError("internal")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    raised: list[str] = []
    closed: list[FileLine] = []
    close = FileLine.close

    def noted(line: FileLine) -> None:
        closed.append(line)
        close(line)

    save = Save(memory, path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)  # in the stop
        patch.setattr(Outgoing, "_finish", broken)
        patch.setattr(FileLine, "close", noted)
        patch.setattr(threading, "excepthook", lambda args: raised.append(str(args.exc_value)))
        save.run()
    assert raised == ["internal"]
    assert save.told == ["active", "device"]
    assert (save.machine.running, save.states.current) == (True, S.RUNNING)
    assert list(path.parent.iterdir()) == []
    assert (save.machine.logging, len(closed)) == (False, 1)
    save.again()
    assert save.told[-1] == "completed"
    assert list(path.parent.iterdir()) == [path]
