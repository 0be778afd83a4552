"""Snapshots of a small guest, and a VM that takes the guest from one."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from godwit.errors import GodwitError
from godwit.hw.memory import PAGE
from godwit.migration.snapshot import format
from godwit.migration.snapshot.format import Header
from godwit.spec.restore import FULL, Restore
from godwit.spec.runstate import RunState
from migration_bench import IMPATIENT, Side

S = RunState
#: Pages with something in them, in three chunks, and one that was written and is zeros.
PAGES = {0: 1, 1: 2, 70: 3, 4000: 4, 4001: 0}


def saved(path: Path, **manner: Any) -> Path:
    """Save a guest of 32 MiB."""
    side = Side(S.RUNNING, IMPATIENT)
    for number, byte in PAGES.items():
        side.machine.memory.view(number * PAGE, PAGE)[:] = bytes([byte]) * PAGE
    side.machine.resume()
    side.migrations.save(str(path), manner.get("keep_running", True), manner.get("compress", ""))
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    outgoing.join(60)
    assert side.statuses[-1] == "completed", outgoing.report.error
    side.close()
    return path


class There(Side):
    """A VM that takes the guest from a file."""

    def __init__(self, path: Path, restore: Restore = FULL) -> None:
        super().__init__(S.INMIGRATE, IMPATIENT)
        self.damage: list[GodwitError] = []
        self.damaged = threading.Event()
        self.migrations._restore = restore
        self.migrations._on_damaged = self._note
        self.migrations.await_guest(f"file:{path}", False)
        incoming = self.migrations._incoming
        assert incoming is not None
        incoming._thread.join(60)

    def _note(self, error: GodwitError) -> None:
        self.damage.append(error)
        self.damaged.set()

    def check(self) -> None:
        assert not self.failures
        assert self.states.history == [S.INMIGRATE, S.RESTORE_VM, S.PRELAUNCH_MIGRATE, S.RUNNING]
        for number, byte in PAGES.items():
            assert self.machine.memory.read(number * PAGE, PAGE) == bytes([byte]) * PAGE
        assert self.machine.memory.read(2 * PAGE, PAGE) == bytes(PAGE)


def refused(path: Path) -> str:
    side = There(path)
    try:
        (error,) = side.failures
        assert not side.machine.running
        assert str(path) in str(error)
        return str(error)
    finally:
        side.close()


def changed_copy(whole: Path, path: Path, at: int, data: bytes) -> Path:
    """Copy a snapshot, holes and all, with other bytes at one place."""
    with open(whole, "rb") as source, open(path, "wb") as target:
        size = os.fstat(source.fileno()).st_size
        target.truncate(size)
        at_data = 0
        while at_data < size:
            try:
                at_data = os.lseek(source.fileno(), at_data, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(source.fileno(), at_data, os.SEEK_HOLE)
            os.pwrite(target.fileno(), os.pread(source.fileno(), end - at_data, at_data), at_data)
            at_data = end
        os.pwrite(target.fileno(), data, at)
    return path


def header_of(path: Path) -> Header:
    return format.decode_header(path.read_bytes()[:PAGE])
