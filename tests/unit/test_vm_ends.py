"""The ends of a guest and of its VM: exits, resets, panics, errors, signals."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast
from unittest import mock

import pytest

from godwit.errors import ConfigError, KvmError, StateError
from godwit.hw import acpi, layout
from godwit.hw.capabilities import IoError
from godwit.machine.vcpu import StopReason
from godwit.spec.runstate import RunState
from godwit.vm.vm import EXIT_INTERNAL_ERROR, EXIT_RESET, EXIT_TRIPLE_FAULT
from tests.fakes.host import NIC
from vm_place import RNG, Place, S


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


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
