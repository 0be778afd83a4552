"""A VM under its operator's hand, from start to end. KVM, taps and their monitors are fakes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import msgspec
import pytest

from godwit.errors import ConfigError, HostError, KvmError, StateError
from godwit.host.loop import Loop
from godwit.hw import acpi, layout
from godwit.hw.capabilities import IoError
from godwit.hw.console import Console
from godwit.machine.board import Board
from godwit.machine.vcpu import StopReason
from godwit.migration.outgoing import Outgoing
from godwit.migration.snapshot import lazy
from godwit.qmp.commands.migration import MigrationInfo, OwnInfo
from godwit.spec.machine_types import DEFAULT, machine_type
from godwit.spec.parameters import MigrationParameters
from godwit.spec.restore import Restore
from godwit.spec.runstate import RunState
from godwit.vm.vm import EXIT_INTERNAL_ERROR, EXIT_RESET, EXIT_TRIPLE_FAULT, Vmm
from migration_bench import IMPATIENT
from tests.fakes.host import NIC, Silent, config, taps
from tests.fakes.kvm import FakeSystem, FakeVcpu

S = RunState


class StrictOwn(OwnInfo, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """OwnInfo, and nothing else."""


class Strict(MigrationInfo, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """MigrationInfo, and nothing else."""

    godwit: StrictOwn | None = None


RNG = ("--rng", "id=dice")


class Place:
    """A VM, with its events and what its operator reads."""

    def __init__(self, *devices: tuple[str, str], **given: Any) -> None:
        self.loop, self.system = Loop(), FakeSystem()
        self.events: list[tuple[str, dict[str, object]]] = []
        self.text: list[str] = []
        absent = HostError("not in a unit test")
        with (
            taps() as self.taps,
            mock.patch("godwit.announce.monitors.TapWatch", side_effect=absent),
            mock.patch("godwit.announce.monitors.Ports", side_effect=absent),
            mock.patch.object(
                Vmm, "_emit", lambda vmm, name, data: self.events.append((name, data))
            ),
        ):
            machine = machine_type(given.pop("machine", DEFAULT))
            made_of = config(*(devices or (NIC,)), machine=machine)
            board = Board(made_of, lambda: self.system)
            self.vm = Vmm(
                board,
                self.loop,
                cast(Console, Silent()),
                log=self.text.append,
                times=IMPATIENT,
                **given,
            )
        self.vm._emit = lambda name, data: self.events.append((name, data))  # type: ignore[method-assign]
        self.vm.announcer._report = self.vm._emit

    @property
    def vcpu(self) -> FakeVcpu:
        return cast(FakeVcpu, self.vm.machine.vcpus[0].vcpu)

    def run_until(self, done: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        for _ in range(2000):
            if done():
                return
            self.loop.run_once(0.05)
        raise AssertionError("it is never so")

    def named(self, name: str) -> list[dict[str, object]]:
        return [data for event, data in self.events if event == name]

    def finish_migration(self) -> None:
        outgoing = self.vm.migrations._outgoing
        assert isinstance(outgoing, Outgoing)
        assert outgoing._over.wait(60), "its thread may look for late packets on"

    def close(self) -> None:
        self.vm.close()
        self.loop.close()


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


@pytest.mark.parametrize(
    ("port", "value", "code", "state", "reason"),
    [
        (layout.PM1_CONTROL + 1, 0x34, 0, S.SHUTDOWN, "guest-shutdown"),
        (layout.RESET_PORT, 6, EXIT_RESET, S.SHUTDOWN, "guest-reset"),
    ],
)
def test_the_guests_own_end(port: int, value: int, code: int, state: RunState, reason: str) -> None:
    place = Place(reboot=False)
    place.vm.start()
    place.vcpu.out(port, value)
    place.loop.run()
    assert (place.vm.exit_code, place.vm.states.current) == (code, state)
    assert place.named("SHUTDOWN") == [{"guest": True, "reason": reason}]
    assert not place.vm.machine.running
    with pytest.raises(StateError, match="the guest is dead"):
        place.vm.migrate("unix:/nowhere", False)
    place.close()


@pytest.mark.parametrize(
    ("exit_reason", "code", "state"),
    [(8, EXIT_TRIPLE_FAULT, S.GUEST_PANICKED), (17, EXIT_INTERNAL_ERROR, S.INTERNAL_ERROR)],
)
def test_a_vcpu_that_cannot_go_on_ends_the_vm(
    place: Place, exit_reason: int, code: int, state: RunState
) -> None:
    def fault() -> None:
        place.vcpu.run_page[8:12] = exit_reason.to_bytes(4, "little")

    place.vm.start()
    place.vcpu.do(fault)
    place.loop.run()
    assert (place.vm.exit_code, place.vm.states.current) == (code, state)


@pytest.fixture
def rebooting(place: Place) -> Place:
    """A VM whose reboots are counted, as the fake KVM has no kernel to boot."""
    machine = place.vm.machine
    machine.power_on_state = mock.Mock()  # type: ignore[method-assign]
    machine.reboot = mock.Mock(  # type: ignore[method-assign]
        side_effect=lambda initial: [thread.revive() for thread in machine.vcpus]
    )
    place.vm.start()
    return place


def _reboots(place: Place) -> int:
    return cast(mock.Mock, place.vm.machine.reboot).call_count


def test_a_guest_that_resets_as_it_is_stopped_reboots_and_stays_stopped(rebooting: Place) -> None:
    place = rebooting
    place.vcpu.out(layout.RESET_PORT, 6)
    assert _wait_exited(place)
    place.vm.stop()  # before the loop knows of the reset
    place.run_until(lambda: _reboots(place) == 1)
    assert place.vm.states.current is S.PAUSED
    assert not place.vm.machine.running
    assert place.named("RESET") == [{"guest": True, "reason": "guest-reset"}]
    place.vm.cont()
    assert place.vm.machine.running


def test_an_exit_that_comes_after_the_reboot_is_no_second_one(rebooting: Place) -> None:
    place = rebooting
    place.vcpu.out(layout.RESET_PORT, 6)
    place.run_until(lambda: _reboots(place) == 1)
    place.vm._guest_exited(StopReason.RESET, "the guest reset the machine")
    assert _reboots(place) == 1
    assert place.vm.states.current is S.RUNNING


def test_the_first_end_is_the_one_that_counts(place: Place) -> None:
    place.vm.start()
    place.vcpu.do(lambda: place.vcpu.run_page.__setitem__(slice(8, 12), b"\x08\0\0\0"))
    place.loop.run()
    place.vm._guest_exited(StopReason.POWER_OFF, "")
    place.vm._guest_exited(StopReason.RESET, "the guest reset the machine")
    assert (place.vm.exit_code, place.vm.states.current) == (EXIT_TRIPLE_FAULT, S.GUEST_PANICKED)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """A destination that accepts, and answers nothing."""
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield f"unix:{path}"


@pytest.mark.parametrize(
    ("port", "value", "why"),
    [
        (layout.PM1_CONTROL + 1, 0x34, "the guest powered off during its migration"),
        (layout.RESET_PORT, 6, "the guest reset the machine during its migration"),
    ],
)
def test_a_guest_that_exits_during_its_migration_fails_it_and_says_why(
    rebooting: Place, silent: str, port: int, value: int, why: str
) -> None:
    place = rebooting
    place.vm.migrate(silent, False)
    place.vcpu.out(port, value)
    assert _wait_exited(place)
    if port == layout.RESET_PORT:
        place.run_until(lambda: _reboots(place) == 1)
        assert place.vm.states.current is S.RUNNING
        assert place.vm.machine.running
    else:
        place.loop.run()
        assert (place.vm.exit_code, place.vm.states.current) == (0, S.SHUTDOWN)
    statuses = [data["status"] for data in place.named("MIGRATION")]
    assert statuses[-1] == "failed"
    assert "cancelled" not in statuses
    info = place.vm.migration_info()
    assert (info["status"], info["error-desc"]) == ("failed", why)


def test_the_loop_does_not_wait_for_the_migration_of_a_guest_that_exited(
    rebooting: Place, silent: str
) -> None:
    place = rebooting
    place.vm.migrate(silent, False)
    outgoing = place.vm.migrations._outgoing
    assert outgoing is not None
    over: list[Callable[[], None]] = []
    outgoing.when_over = over.append  # type: ignore[method-assign]
    place.vcpu.out(layout.RESET_PORT, 6)
    place.run_until(lambda: bool(over))  # the loop's turn is over, and the migration may be not
    assert _reboots(place) == 0
    place.finish_migration()
    over[0]()
    place.run_until(lambda: _reboots(place) == 1)


def test_a_paused_guest_that_reset_before_its_migration_failed_stays_paused(
    rebooting: Place, silent: str
) -> None:
    place = rebooting
    place.vm.stop()
    place.vm.migrate(silent, False)
    outgoing = place.vm.migrations._outgoing
    assert outgoing is not None
    outgoing._before = S.PAUSED
    place.vm.states.set(S.FINISH_MIGRATE)
    place.vm.machine.vcpus[0].exited = (StopReason.RESET, "the guest reset the machine")
    place.vm._guest_exited(StopReason.RESET, "the guest reset the machine")
    place.run_until(lambda: _reboots(place) == 1)
    assert place.vm.states.current is S.PAUSED
    assert not place.vm.machine.running


def _wait_exited(place: Place) -> bool:
    thread = place.vm.machine.vcpus[0]
    with thread._changed:
        return thread._changed.wait_for(lambda: thread.exited is not None, 10)


def test_a_reset_without_a_kernel_ends_the_vm_and_says_so(place: Place) -> None:
    place.vm.start()
    place.vcpu.out(layout.RESET_PORT, 6)
    place.loop.run()
    assert place.vm.exit_code == EXIT_RESET
    assert "no kernel was given here" in place.text[-1]


def test_quit_and_signals_end_the_loop(place: Place) -> None:
    place.vm.quit()
    place.loop.run()
    assert place.named("SHUTDOWN") == [{"guest": False, "reason": "host-qmp-quit"}]


def test_a_guest_error_is_an_event_and_a_line(place: Place) -> None:
    place.vm._guest_errors.add("nic0", "a bad ring")
    assert place.named("GUEST_ERROR") == [
        {"device": "nic0", "message": "a bad ring", "suppressed": 0}
    ]
    assert "nic0: the guest broke the device's rules (a bad ring)" in place.text[-1]


def test_lost_requests_are_an_event_and_a_line_and_not_the_guests_fault(place: Place) -> None:
    place.vm.device_reports.requests_lost("disk0")()
    place.loop.run_once(0)
    assert place.named("BACK_END_REQUESTS_LOST") == [{"device": "disk0"}]
    assert "disk0: its back end was lost with requests in flight" in place.text[-1]
    assert place.named("GUEST_ERROR") == []


@pytest.mark.parametrize(
    ("action", "state", "code"),
    [
        ("exit", S.GUEST_PANICKED, EXIT_TRIPLE_FAULT),
        ("pause", S.GUEST_PANICKED, None),
        ("run", S.RUNNING, None),
    ],
)
def test_a_panic_is_an_event_and_what_the_operator_chose(
    action: str, state: RunState, code: int | None
) -> None:
    place = Place(on_panic=action, machine="godwit-0.3")
    place.vm.start()
    place.vcpu.out(acpi.PANIC_PORT, 1)
    place.run_until(lambda: bool(place.named("GUEST_PANICKED")))
    assert place.named("GUEST_PANICKED") == [{"action": action}]
    place.run_until(lambda: place.vm.states.current is state)
    assert place.vm.machine.running is (action == "run")
    if code is not None:
        place.loop.run()
        assert place.vm.exit_code == code
        assert place.named("SHUTDOWN") == [{"guest": True, "reason": "guest-panic"}]
    place.close()


def test_a_panic_of_a_guest_that_saves_a_dump_changes_nothing() -> None:
    place = Place(machine="godwit-0.3")
    place.vm.start()
    place.vcpu.out(acpi.PANIC_PORT, 2)
    place.run_until(lambda: bool(place.named("GUEST_CRASHLOADED")))
    assert place.named("GUEST_CRASHLOADED") == [{"action": "run"}]
    assert place.vm.machine.running
    place.close()


def test_a_panic_reboots(rebooting: Place) -> None:
    rebooting.vm._on_panic = "reboot"
    rebooting.vm._panicked(crash_loaded=False)
    rebooting.run_until(lambda: _reboots(rebooting) == 1)
    assert rebooting.vm.states.current is S.RUNNING


def test_counters_and_filters_are_by_device() -> None:
    place = Place(NIC, RNG)
    counters = {(id, kind): dict(counts) for id, kind, counts, _ in place.vm.devices()}
    assert counters[("dice", "virtio-rng")] == {"requests": 0, "bytes": 0}
    assert ("nic0", "virtio-net") in counters
    assert counters[("serial0", "serial")] == {}
    ((name, view),) = place.vm.rx_filters(None)
    assert (name, view.promiscuous) == ("nic0", True)
    with pytest.raises(ConfigError, match="no NIC 'nic7'; this VM has: nic0"):
        place.vm.rx_filters("nic7")
    place.close()


def test_a_vm_that_cannot_stop_for_a_disk_tries_again(place: Place) -> None:
    """What failed is kept for the stop and its cont: without them the guest would wait for ever."""
    vm = place.vm
    vm.states.set(RunState.RUNNING)
    later: list[Callable[[], None]] = []
    with (
        mock.patch.object(vm.machine, "pause", side_effect=[KvmError("busy"), None]),
        mock.patch.object(place.loop, "call_later", lambda delay, call: later.append(call)),
    ):
        error = IoError("disk0", "write", "stop", True, "No space left on device")
        vm.device_reports.io_failed(error)
        place.loop.run_once(0)
        assert vm.states.current is RunState.RUNNING
        later.pop()()
    assert vm.states.current is RunState.IO_ERROR
    assert [name for name, _ in place.events].count("BLOCK_IO_ERROR") == 1
