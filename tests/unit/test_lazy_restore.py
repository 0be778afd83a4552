"""A guest whose RAM is the file of its snapshot, of which pages come as they are touched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import ConfigError, KvmError
from godwit.hw import memory as hw_memory
from godwit.hw.memory import PAGE
from godwit.machine.machine import Machine
from godwit.migration.outgoing import Outgoing
from godwit.migration.snapshot import lazy as lazy_module
from godwit.migration.snapshot.format import CHUNK, RAM_AT
from godwit.migration.snapshot.lazy import Lazy
from godwit.migration.snapshot.reader import Snapshot
from godwit.migration.snapshot.restorer import Restorer
from godwit.spec.restore import Restore
from godwit.spec.runstate import RunState
from migration_bench import IMPATIENT, Side
from snapshot_bench import PAGES, There, changed_copy, header_of, saved

S = RunState
LAZY = Restore(lazy=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "guest")


@pytest.fixture
def lazy(whole: Path) -> Iterator[There]:
    side = There(whole, LAZY)
    yield side
    side.close()


def test_no_guest_runs_that_nobody_would_check(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Lazy) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Lazy, "start", full)
    side = There(whole, LAZY)
    (error,) = side.failures
    assert "can't start new thread" in str(error)
    assert not side.machine.running
    assert S.RUNNING not in side.states.history
    side.close()


def test_a_check_that_never_began_ends(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lazy, "begin", lambda self: None)
    side = There(whole, LAZY)
    side.check()
    restorer = side.migrations._incoming
    assert isinstance(restorer, Restorer)
    assert restorer._lazy is not None
    thread = restorer._lazy._thread
    assert thread.is_alive()
    assert not restorer.checked()
    side.close()
    assert not thread.is_alive()


def test_pages_not_touched_yet_migrate_too(lazy: There) -> None:
    def has(number: int) -> bool:
        found = lazy.machine.memory.populated()
        assert found == sorted(found)
        return any(at <= number * PAGE < at + pages * PAGE for at, pages in found)

    assert all(has(number) for number, byte in PAGES.items() if byte)
    lazy.machine.memory.write(2000 * PAGE, b"x")
    assert has(2000)
    assert sum(pages for _, pages in lazy.machine.memory.populated()) < 3 * CHUNK // PAGE


def test_what_was_written_here_is_saved_and_the_file_stays(
    lazy: There, whole: Path, tmp_path: Path
) -> None:
    before = whole.read_bytes()
    lazy.machine.memory.write(70 * PAGE, b"changed")
    lazy.migrations.save(str(tmp_path / "again"), True, "")
    outgoing = lazy.migrations._outgoing
    assert outgoing is not None
    outgoing.join(60)
    assert lazy.statuses[-1] == "completed"
    assert whole.read_bytes() == before
    side = There(tmp_path / "again")
    assert side.machine.memory.read(70 * PAGE, 8) == b"changed\x03"
    assert side.machine.memory.read(4000 * PAGE, 8) == bytes([4]) * 8
    side.close()


def test_a_reboot_finds_zeros(lazy: There) -> None:
    lazy.machine.memory.read(0, PAGE)
    lazy.machine.memory.discard(lazy.machine.memory.regions[0].host, 2 << 20)
    assert lazy.machine.memory.read(0, PAGE) == bytes(PAGE)
    assert lazy.machine.memory.read(4000 * PAGE, 4) == bytes([4]) * 4
    lazy.machine.memory.clear()
    for number in PAGES:
        assert lazy.machine.memory.read(number * PAGE, PAGE) == bytes(PAGE)
    assert lazy.machine.memory.populated() == [] or lazy.machine.memory.read(0, 4) == bytes(4)


@pytest.mark.parametrize("at", [RAM_AT + 70 * PAGE, RAM_AT + 3 * CHUNK + 5])
def test_a_guest_whose_ram_was_altered_is_stopped(whole: Path, tmp_path: Path, at: int) -> None:
    side = There(changed_copy(whole, tmp_path / "changed", at, b"?"), LAZY)
    assert side.damaged.wait(60)
    assert not side.machine.running
    assert "altered" in str(side.damage[0])
    side.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a large file: after its first chunk it rests until somebody waits for it."""
    monkeypatch.setattr(lazy_module, "_REST", 1e6)


def _leave(side: There, path: Path, keep_running: bool) -> Outgoing:
    side.migrations.save(str(path), keep_running, "")
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    return outgoing


@pytest.mark.parametrize("keep_running", [False, True])
@pytest.mark.usefixtures("slow")
def test_damage_that_is_not_found_yet_does_not_leave(
    whole: Path, tmp_path: Path, keep_running: bool
) -> None:
    side = There(changed_copy(whole, tmp_path / "changed", RAM_AT + 4000 * PAGE + 5, b"?"), LAZY)
    assert not side.damage
    outgoing = _leave(side, tmp_path / "again", keep_running)
    outgoing.join(60)
    assert side.statuses[-1] == "failed"
    assert "was altered" in str(outgoing.report.error)
    assert not (tmp_path / "again").exists()
    assert side.damaged.wait(60)
    assert not side.machine.running
    side.migrations.migrate(f"unix:{tmp_path / 'nobody'}", False)
    assert side.migrations._outgoing is not None
    side.migrations._outgoing.join(60)
    assert "was altered" in str(side.migrations._outgoing.report.error)
    side.close()


@pytest.mark.usefixtures("slow")
def test_who_leaves_hurries_the_check(lazy: There, tmp_path: Path) -> None:
    _leave(lazy, tmp_path / "again", False).join(60)
    assert lazy.statuses[-1] == "completed"
    again = There(tmp_path / "again")
    again.check()
    again.close()


def test_a_save_that_waits_for_the_check_can_be_cancelled(
    lazy: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def never() -> bool:
        asked.set()
        return False

    monkeypatch.setattr(lazy.migrations, "_checked", never)
    outgoing = _leave(lazy, tmp_path / "again", False)
    assert asked.wait(60)
    assert outgoing.cancel()
    outgoing.join(60)
    assert lazy.statuses[-1] == "cancelled"
    assert lazy.machine.running


@pytest.mark.parametrize("times", [1, 2, 99])
def test_damage_is_reported_whatever_keeps_the_guest_from_a_pause(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    pause, refused = Machine.pause, []

    def busy(machine: Machine, *given: Any) -> None:
        if threading.current_thread().name == "snapshot" and len(refused) < times:
            refused.append(1)
            raise KvmError("device 'disk0' did not finish its work in 10 s; the guest goes on")
        pause(machine, *given)

    monkeypatch.setattr(Machine, "pause", busy)
    monkeypatch.setattr(lazy_module, "_AGAIN_S", 0.0)
    side = There(changed_copy(whole, tmp_path / "changed", RAM_AT + 70 * PAGE, b"?"), LAZY)
    assert side.damaged.wait(60)
    assert len(refused) == min(times, 3)
    assert side.machine.running == (times > 2)
    side.close()


def test_all_but_ram_is_checked_before(whole: Path, tmp_path: Path) -> None:
    changed = changed_copy(whole, tmp_path / "changed", header_of(whole).index_at + 3, b"?")
    side = There(changed, LAZY)
    assert "index" in str(side.failures)
    side.close()


def test_who_writes_the_file_waits_until_the_guest_has_a_copy(whole: Path, tmp_path: Path) -> None:
    path = changed_copy(whole, tmp_path / "held", 0, b"")
    side = There(path, LAZY)
    assert side.machine.memory._backed
    with open(path, "r+b") as file:  # waits
        assert not side.machine.memory._backed
        file.truncate(0)
    side.check()
    assert not side.damage
    side.close()


def test_whoever_reads_while_the_guest_gets_its_copy_finds_the_same(
    lazy: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hw_memory, "_COPIED", 3 * PAGE)
    memory = lazy.machine.memory
    memory.write(70 * PAGE + 8, b"changed")
    at = 4000 * PAGE
    view, over, seen = memory.view(at, PAGE), threading.Event(), set[bytes]()

    def read() -> None:
        while not over.is_set():
            seen.add(bytes(view))

    reader = threading.Thread(target=read)
    reader.start()
    lazy.machine.pause()
    memory.leave_file()
    over.set()
    reader.join()
    assert seen <= {bytes([4]) * PAGE}
    assert memory.read(70 * PAGE + 7, 9) == b"\x03changed\x03"
    assert not memory._backed
    lazy.machine.memory.write(70 * PAGE + 8, b"\x03" * 7)
    lazy.check()


def test_what_cannot_be_held_is_not_mapped(whole: Path, tmp_path: Path) -> None:
    path = changed_copy(whole, tmp_path / "written", 0, b"")
    with open(path, "r+b"), pytest.raises(ConfigError, match=r"close what writes it.*lazy"):
        There(path, LAZY)


def test_shared_ram_is_not_mapped(whole: Path) -> None:
    side = Side(S.INMIGRATE, IMPATIENT)
    side.machine.memory.fd = 77
    with pytest.raises(ConfigError, match="needs private RAM"):
        Lazy(Snapshot(whole), side.machine, lambda error: None)
    side.machine.memory.fd = None
    side.close()
