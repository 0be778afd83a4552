"""A VM under its operator's hand, from start to end. KVM, taps and their monitors are fakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import msgspec
import pytest

from godwit.errors import ConfigError, KvmError, StateError
from godwit.migration.snapshot import lazy
from godwit.spec.parameters import MigrationParameters
from godwit.spec.restore import Restore
from godwit.spec.runstate import RunState
from godwit.vm.vm import EXIT_INTERNAL_ERROR
from tests.fakes.host import NIC
from vm_place import RNG, Place, S, Strict


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


@pytest.fixture
def pair() -> Iterator[tuple[Place, Place]]:
    one, other = Place(), Place()
    yield one, other
    one.close()
    other.close()


def test_a_start_a_stop_and_a_cont(place: Place) -> None:
    vm = place.vm
    vm.start()
    assert vm.machine.running
    vm.stop()
    assert not vm.machine.running
    with pytest.raises(StateError):
        vm.stop()
    vm.cont()
    assert vm.states.history == [S.PRELAUNCH, S.RUNNING, S.PAUSED, S.RUNNING]
    assert place.named("ANNOUNCE_STARTED") == [], "no migration: nobody is notified"


def test_facts_for_an_operator(place: Place) -> None:
    vm = place.vm
    vm.start()
    assert vm.ram_size() == vm.machine.memory.size
    threads = vm.vcpu_threads()
    assert len(threads) == len(vm.machine.vcpus)
    assert all(Path(f"/proc/self/task/{thread}").exists() for thread in threads)
    vm.powerdown()
    assert place.named("POWERDOWN") == [{}]


def test_without_autostart_it_waits_for_the_cont() -> None:
    place = Place(autostart=False)
    place.vm.start()
    assert place.vm.states.current is S.PRELAUNCH
    place.vm.cont()
    assert place.vm.machine.running
    place.close()


def test_a_guest_goes_from_one_vm_to_the_other(pair: tuple[Place, Place], tmp_path: Path) -> None:
    one, other = pair
    one.vm.start()
    one.vm.machine.memory.write(7 << 20, b"carried along")
    uri = f"unix:{tmp_path / 'm'}"
    other.vm.await_guest(uri, False)
    states: list[tuple[RunState, bool]] = []
    running = threading.Event()

    def note(old: RunState, new: RunState) -> None:
        states.append((new, other.vm.machine.running))
        if new is S.RUNNING:
            running.set()

    other.vm.states.listen(note)
    one.vm.migrate(uri, False)
    with pytest.raises(StateError, match="under way already"):
        one.vm.migrate(uri, False)
    one.finish_migration()
    assert running.wait(60), "the source is notified first"
    for vm in (one.vm, other.vm):  # as query-qmp-schema describes them
        info = msgspec.to_builtins(vm.migration_info())
        assert msgspec.convert(info, Strict).godwit is not None
    assert states == [(S.PRELAUNCH_MIGRATE, False), (S.RUNNING, True)], "machine first, then state"
    assert (one.vm.machine.running, other.vm.machine.running) == (False, True)
    assert one.vm.states.current is S.POSTMIGRATE
    assert other.vm.machine.memory.read(7 << 20, 13) == b"carried along"
    assert [data["status"] for data in one.named("MIGRATION")] == [
        *("setup", "active", "device", "completed")
    ]
    (started,) = other.named("ANNOUNCE_STARTED")
    assert started["nics"] == ["nic0"]
    assert one.text[-1] == "the guest has migrated"
    info = cast(Any, one.vm.migration_info())
    assert info["status"] == "completed"
    assert list(info["godwit"]["destination-phases"])[-4:] == [
        *("switched-over", "devices-resumed", "vcpus-started", "packets-handed-over")
    ]
    arrived = cast(Any, other.vm.migration_info())
    assert arrived["status"] == "completed"
    assert arrived["godwit"]["handover"]["markers-sent"] == 1
    assert other.taps["tap0"].get() is not None, "the marker left by the tap"


@pytest.mark.parametrize("why", ["no autostart", "it was paused"])
def test_a_guest_that_does_not_start_at_once_waits_in_its_own_state(
    tmp_path: Path, why: str
) -> None:
    one, other = Place(), Place(autostart=why != "no autostart")
    one.vm.start()
    if why == "it was paused":
        one.vm.stop()
    uri = f"unix:{tmp_path / 'm'}"
    other.vm.await_guest(None, False)
    with pytest.raises(StateError):
        one.vm.migrate_incoming(uri, False)
    other.vm.migrate_incoming(uri, False)
    with pytest.raises(StateError, match="waits for a guest already"):
        other.vm.migrate_incoming(uri, False)
    one.vm.migrate(uri, False)
    one.finish_migration()
    assert other.vm.states.current is S.PRELAUNCH_MIGRATE
    assert not other.vm.machine.running
    assert other.named("ANNOUNCE_STARTED") == []
    other.vm.cont()
    assert other.vm.machine.running
    assert len(other.named("ANNOUNCE_STARTED")) == 1
    one.close()
    other.close()


def test_a_guest_that_stays_says_why(pair: tuple[Place, Place], tmp_path: Path) -> None:
    one, other = Place(NIC, RNG), pair[1]
    one.vm.start()
    uri = f"unix:{tmp_path / 'm'}"
    other.vm.await_guest(uri, False)
    one.vm.migrate(uri, False)
    one.finish_migration()
    assert one.vm.machine.running
    assert one.vm.states.current is S.RUNNING
    assert "dice (virtio-rng): at the source, missing here" in one.text[-1]
    assert one.text[-1].startswith("the guest stays here; the migration failed: ")
    assert other.vm.states.current is S.INMIGRATE, "it waits for another"
    one.close()


def test_a_destination_whose_guest_is_spoilt_ends(
    pair: tuple[Place, Place], tmp_path: Path
) -> None:
    one, other = pair
    other.vm.machine.load = mock.Mock(side_effect=ConfigError("broken"))  # type: ignore[method-assign]
    one.vm.start()
    uri = f"unix:{tmp_path / 'm'}"
    other.vm.await_guest(uri, False)
    one.vm.migrate(uri, False)
    one.finish_migration()
    assert one.vm.machine.running
    other.run_until(lambda: other.vm.exit_code != 0)
    assert (other.vm.exit_code, other.vm.states.current) == (1, S.SHUTDOWN)
    assert other.text[-1].startswith("no guest arrived: ")


def test_a_vm_that_ends_as_its_guest_arrives_does_not_run_it(
    pair: tuple[Place, Place], tmp_path: Path
) -> None:
    one, other = pair
    one.vm.start()
    uri = f"unix:{tmp_path / 'm'}"
    other.vm.await_guest(uri, False)
    other.vm.migrations._closing = True
    one.vm.migrate(uri, False)
    one.finish_migration()
    assert (one.vm.machine.running, other.vm.machine.running) == (True, False)


def test_a_guest_that_is_saved_comes_back_from_its_file(tmp_path: Path) -> None:
    one, other = Place(), Place()
    one.vm.start()
    one.vm.machine.memory.write(3 << 20, b"in the file")
    uri = f"file:{tmp_path / 'guest'}"
    one.vm.migrate(uri, False)
    one.finish_migration()
    assert one.vm.states.current is S.POSTMIGRATE
    one.vm.migrate_cancel()  # there is none any more
    running = threading.Event()
    other.vm.states.listen(lambda old, new: running.set() if new is S.RUNNING else None)
    other.vm.await_guest(uri, False)
    assert running.wait(60)
    assert other.vm.machine.memory.read(3 << 20, 11) == b"in the file"
    one.close()
    other.close()


def test_a_guest_that_is_saved_takes_its_vm_along(place: Place, tmp_path: Path) -> None:
    place.vm.start()
    place.vm.save(str(tmp_path / "guest"), False, "")
    place.finish_migration()
    place.run_until(lambda: bool(place.named("SHUTDOWN")))
    assert place.named("SHUTDOWN") == [{"guest": False, "reason": "host-qmp-quit"}]
    assert (place.vm.exit_code, place.vm.states.current) == (0, S.SHUTDOWN)
    assert place.text[-1].endswith(f"--incoming file:{tmp_path}/guest brings it back")


def test_a_guest_that_runs_on_is_not_announced_and_its_copy_is(
    pair: tuple[Place, Place], tmp_path: Path
) -> None:
    one, other = pair
    one.vm.start()
    one.vm.save(str(tmp_path / "guest"), True, "")
    one.finish_migration()
    assert one.vm.states.history == [S.PRELAUNCH, S.RUNNING, S.SAVE_VM, S.RUNNING]
    assert one.vm.machine.running
    assert "a copy of it" in one.text[-1]
    assert not one.named("ANNOUNCE_STARTED")
    running = threading.Event()
    other.vm.states.listen(lambda old, new: running.set() if new is S.RUNNING else None)
    other.vm.await_guest(f"file:{tmp_path / 'guest'}", False)
    assert running.wait(60)
    assert other.named("ANNOUNCE_STARTED")


@pytest.mark.parametrize("busy", [False, True])
def test_a_guest_whose_ram_is_damaged_ends_with_its_vm(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    place.vm.start()
    place.vm.machine.memory.write(3 << 20, b"in the file")
    path = tmp_path / "guest"
    place.vm.save(str(path), True, "")
    place.finish_migration()
    with open(path, "r+b") as file:
        file.seek((2 << 20) + (3 << 20))
        file.write(b"x")
    other = Place(restore=Restore(lazy=True))
    with monkeypatch.context() as patch:
        if busy:
            never = mock.Mock(side_effect=KvmError("device 'disk0' did not finish its work"))
            patch.setattr(other.vm.machine, "pause", never)
            patch.setattr(lazy, "_AGAIN_S", 0.0)
        other.vm.await_guest(f"file:{path}", False)
        other.run_until(lambda: bool(other.named("SHUTDOWN")))
    assert (other.vm.exit_code, other.vm.states.current) == (EXIT_INTERNAL_ERROR, S.INTERNAL_ERROR)
    assert other.vm.machine.running == busy, "its process ends with it"
    assert "was altered" in other.text[-1]
    assert "offset 5242880" in other.text[-1]
    other.close()


def test_parameters_are_replaced_as_a_whole(place: Place) -> None:
    assert place.vm.parameters == MigrationParameters()
    place.vm.parameters = MigrationParameters(downtime_limit=7)
    assert place.vm.migrations.parameters.downtime_limit == 7
