"""Saving a guest: whole, or not at all and the guest goes on. The machine is on a fake KVM."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.hw.capabilities import HasFile
from godwit.hw.memory import PAGE
from godwit.migration.guest import Guest
from godwit.migration.outgoing import Outgoing
from godwit.migration.snapshot.image import Image
from godwit.migration.snapshot.saver import PLAIN, Manner, Saver
from godwit.spec.parameters import MigrationParameters
from godwit.spec.runstate import RunState, RunStates
from tests.fakes.host import Host, config

S = RunState


class Save:
    """A guest that runs, being saved."""

    def __init__(self, path: Path, manner: Manner = PLAIN) -> None:
        self.manner = manner
        self.host = Host(config())
        self.machine = self.host.machine
        self.machine.memory.view(0, 4 * PAGE)[:] = bytes(range(256)) * (4 * PAGE // 256)
        self.machine.resume()
        self.states = RunStates(S.RUNNING)
        self.statuses: list[str] = []
        self.path = path
        self.saver = self._saver()

    def _saver(self) -> Saver:
        parameters = MigrationParameters(downtime_limit=0)
        guest = Guest(self.machine, [], self.host.loop.now)
        return Saver(
            guest,
            self.states,
            self.path,
            lambda: parameters,
            self.statuses.append,
            manner=self.manner,
        )

    def again(self) -> None:
        self.saver = self._saver()
        self.run()

    def run(self) -> None:
        self.saver.start()
        self.saver.join(60)
        assert not self.saver.active

    @property
    def logging(self) -> bool:
        """Whether KVM's dirty log is on."""
        return any(log for *_, log in self.host.vm.memory.values())


@pytest.fixture
def save(path: Path) -> Iterator[Save]:
    save = Save(path)
    yield save
    save.host.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guest"


def _open_files() -> list[str]:
    links = Path("/proc/self/fd").iterdir()
    return [os.readlink(link) for link in links if link.is_symlink()]


def _goes_on(save: Save, path: Path, status: str) -> None:
    assert save.statuses[-1] == status
    assert (save.machine.running, save.states.current) == (True, S.RUNNING)
    assert not path.exists()


def test_the_guest_is_in_the_file(save: Save, path: Path) -> None:
    path.write_text("what was there before")
    save.run()
    assert save.statuses == ["active", "device", "completed"]
    assert (save.machine.running, save.states.current) == (False, S.POSTMIGRATE)
    assert path.stat().st_size > save.machine.memory.size
    assert 4 * PAGE <= path.stat().st_blocks * 512 < 2 << 20
    assert 4 * PAGE <= save.saver.report.bytes_sent < 64 * PAGE
    assert list(path.parent.iterdir()) == [path]
    assert str(path) in save.saver.completion


class DiskOf(HasFile):
    """A disk on a file."""

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self._identity = status.st_dev, status.st_ino

    def is_file(self, device: int, inode: int) -> bool:
        return (device, inode) == self._identity


@pytest.mark.parametrize("linked", [False, True])
def test_a_disk_of_the_vm_is_not_replaced(
    save: Save, path: Path, tmp_path: Path, linked: bool
) -> None:
    image = tmp_path / "disk.raw" if linked else path
    image.write_bytes(bytes(512))
    if linked:
        os.link(image, path)
    devices = save.machine.devices
    first = next(iter(devices))
    parts = (*first.parts(), DiskOf(image))
    first.parts = lambda: parts  # type: ignore[method-assign]
    devices._found.clear()
    save.run()
    assert save.statuses[-1] == "failed"
    assert f"'{path}' is a disk of this VM" in (save.saver.report.error or "")
    assert path.read_bytes() == bytes(512)
    assert (save.machine.running, save.states.current) == (True, S.RUNNING)
    path.unlink()
    path.write_bytes(b"another's")  # in its place there may be something else
    if linked:
        save.again()
        assert save.statuses[-1] == "completed"


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_disk_that_fails_leaves_the_guest_where_it_was(
    save: Save, path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls = 0

    def sync(file: Image) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "sync", sync)
    save.run()
    _goes_on(save, path, "failed")
    assert calls == at
    assert "Input/output error" in str(save.saver.report.error)
    assert list(path.parent.iterdir()) == []


def test_what_cannot_be_removed_is_named_and_the_save_is_over(
    save: Save, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    save.run()
    _goes_on(save, path, "failed")
    (left,) = path.parent.iterdir()
    assert str(left) in str(save.saver.report.error)
    assert "delete it" in str(save.saver.report.error)


def test_a_process_that_ends_leaves_no_memory_of_the_guest(
    save: Save, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck(file: Image) -> None:
        entered.set()
        assert leave.wait(60)

    monkeypatch.setattr(Image, "sync", stuck)
    save.saver.start()
    assert entered.wait(60)
    assert len(list(path.parent.iterdir())) == 1
    save.saver.abandon()
    assert list(path.parent.iterdir()) == []
    leave.set()
    save.saver.join(60)
    _goes_on(save, path, "cancelled")


def test_a_guest_that_is_kept_running_runs_on(path: Path) -> None:
    save = Save(path, Manner(keep_running=True, ends_vm=True))
    try:
        save.run()
        assert save.statuses == ["active", "device", "completed"]
        assert save.machine.running
        assert save.states.history == [S.RUNNING, S.SAVE_VM, S.RUNNING]
        assert not save.logging
        assert not save.saver.ends_vm
        assert "runs on" in save.saver.completion
        assert save.saver.report.downtime_ms is not None
        assert list(path.parent.iterdir()) == [path]
        save.again()  # and again
        assert save.statuses[-1] == "completed"
    finally:
        save.host.close()


def test_a_guest_that_was_paused_stays_so(path: Path) -> None:
    save = Save(path, Manner(keep_running=True))
    try:
        save.machine.pause()
        save.states.set(S.PAUSED)
        save.run()
        assert save.states.history == [S.RUNNING, S.PAUSED, S.SAVE_VM, S.PAUSED]
        assert not save.machine.running
    finally:
        save.host.close()


@pytest.mark.parametrize("compression", ["", "zstd"])
def test_what_fails_after_the_guest_runs_on_costs_the_file_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    if compression:
        pytest.importorskip("zstandard")
    save = Save(path, Manner(True, compression))
    needed: list[bool] = []

    def sync(file: Image) -> None:
        needed.append(save.saver.needs_guest)
        assert save.machine.running
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image, "sync", sync)
    try:
        save.run()
        _goes_on(save, path, "failed")
        assert save.states.history == [S.RUNNING, S.SAVE_VM, S.RUNNING]
        assert needed == [False]
        assert list(path.parent.iterdir()) == []
    finally:
        save.host.close()


def test_more_than_is_held_is_written_while_the_guest_stands_still(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.migration.snapshot.saver._MOST_HELD", 2 * PAGE)
    save = Save(path, Manner(keep_running=True))
    try:
        save.host.vm.dirty[0] = b"\x55"  # pages 0, 2, 4 and 6, found at the stop
        save.run()
        assert save.statuses[-1] == "completed"
        assert path.exists()
    finally:
        save.host.close()


def test_too_late_to_cancel(save: Save, path: Path) -> None:
    save.run()
    assert not save.saver.cancel()
    assert path.exists()


@pytest.mark.parametrize("make", ["directory", "symlink", "socket"])
def test_what_is_no_file_is_not_replaced(save: Save, path: Path, make: str) -> None:
    if make == "directory":
        path.mkdir()
    elif make == "symlink":
        path.symlink_to("/dev/null")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    save.run()
    assert (save.statuses[-1], save.states.history) == ("failed", [S.RUNNING])
    assert "no regular file" in str(save.saver.report.error)
    assert list(path.parent.iterdir()) == [path]


def test_whatever_goes_wrong_another_save_may_be_tried(
    save: Save, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Outgoing, status: str, error: str | None = None) -> None:
        raise RuntimeError("internal")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    raised: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)  # in the stop
        patch.setattr(Outgoing, "_finish", broken)
        patch.setattr(threading, "excepthook", lambda args: raised.append(str(args.exc_value)))
        save.run()
    assert raised == ["internal"]
    assert save.statuses == ["active", "device"]
    assert (save.machine.running, save.states.current) == (True, S.RUNNING)
    assert list(path.parent.iterdir()) == []
    assert not save.logging
    assert not [name for name in _open_files() if name.startswith(str(path.parent))]
    save.again()
    assert save.statuses[-1] == "completed"
    assert list(path.parent.iterdir()) == [path]
