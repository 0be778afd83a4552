"""The machine: its order, its state, and what ends it. Only KVM and the taps are fakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from msgspec import Raw
from msgspec.structs import replace

from godwit.errors import ConfigError, KvmError, StreamError
from godwit.host.kvm import abi
from godwit.hw import layout
from godwit.hw.capabilities import Counts, LogsDirtyPages
from godwit.machine import machine as module
from godwit.machine.state import MachineState
from godwit.machine.vcpu import StopReason
from godwit.spec import saved
from tests.fakes.host import NIC, Host, config

E1000 = ("--nic", "tap=tap1,id=old,model=e1000")
RNG = ("--rng", "id=dice")
S5 = 1 << 13 | layout.SLEEP_TYPE_S5 << 10


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host(config(NIC, E1000, RNG, cpus=2))
    yield host
    host.close()


@pytest.fixture
def other() -> Iterator[Host]:
    host = Host(config(NIC, E1000, RNG, cpus=2))
    yield host
    host.close()


def test_its_devices_are_the_platforms_and_those_of_the_configuration(host: Host) -> None:
    devices = [(device.id, device.kind) for device in host.machine.devices]
    assert devices == [
        ("serial0", "serial"),
        ("power0", "power"),
        ("pci0", "pci-host"),
        ("panic0", "pvpanic"),
        ("generation0", "vmgenid"),
        ("nic0", "virtio-net"),
        ("old", "e1000"),
        ("dice", "virtio-rng"),
    ]
    assert [nic.id for nic in host.machine.nics] == ["nic0", "old"]
    assert host.machine.devices.having(LogsDirtyPages) == []
    assert len(host.machine.devices.having(Counts)) == 3
    assert set(host.machine.hints()) == {"nic0", "dice"}


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        (("--nic", "tap=tap0,model=ne2000"), "'ne2000' is unknown; there are virtio-net, e1000"),
        (("--nic", "tap=tap0,model=virtio-rng"), "'virtio-rng' is unknown; there are virtio-net"),
        (("--nic", "tap=tap0,model=e1000,mtu=1400"), "mtu= needs model=virtio-net"),
    ],
)
def test_a_device_that_cannot_be_made_leaves_nothing_behind(
    devices: tuple[str, str], says: str
) -> None:
    threads = threading.active_count()
    with pytest.raises(ConfigError, match=says):
        Host(config(RNG, devices))
    assert threading.active_count() == threads


def test_it_starts_devices_first_and_stops_vcpus_first(host: Host) -> None:
    machine = host.machine
    seen: list[tuple[str, bool]] = []

    def note(phase: str) -> None:
        seen.append((phase, any(thread._run_wanted for thread in machine.vcpus)))

    machine.resume(note)
    machine.resume(note)
    machine.pause(note)
    machine.pause(note)
    assert seen == [
        ("devices-resumed", False),
        ("vcpus-started", True),
        ("vcpus-stopped", False),
        ("devices-paused", False),
    ]
    assert not machine.running


def test_a_device_that_does_not_finish_its_work_keeps_the_machine_running(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = host.machine
    machine.resume()
    busy = machine.devices.having(module.HasSetupHints)[1]
    monkeypatch.setattr(busy, "paused", lambda timeout: False)
    with pytest.raises(KvmError, match="device 'dice' did not finish its work in 10 s"):
        machine.pause()
    assert machine.running
    assert all(thread._run_wanted for thread in machine.vcpus)
    monkeypatch.undo()
    machine.pause()
    assert not machine.running


def test_a_vcpu_that_does_not_leave_the_guest_keeps_the_machine_running(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = host.machine
    machine.resume()

    def late(timeout: float = 10.0) -> None:
        raise KvmError("vCPU 1 did not leave the guest in 10 s")

    monkeypatch.setattr(machine.vcpus[1], "wait_paused", late)
    with pytest.raises(KvmError, match="vCPU 1"):
        machine.pause()
    assert machine.running
    monkeypatch.undo()
    machine.pause()


def _state(host: Host) -> MachineState:
    return saved.decode(saved.encode(host.machine.save({"more": Raw(b"\x01")})), MachineState)


def test_a_machine_takes_the_state_of_another(host: Host, other: Host) -> None:
    for vcpu in host.vcpus:
        vcpu.set(abi.SET_REGS, bytes(range(144)))
    host.machine.serial.receive(b"typed")
    state = _state(host)
    phases: list[str] = []
    other.machine.prepare(host.machine.hints())
    other.machine.load(state, 0.0, phases.append)
    again = _state(other)
    assert again.devices == state.devices
    assert [vcpu.regs for vcpu in again.vcpus] == [bytes(range(144))] * 2
    assert again.platform.irqchips == state.platform.irqchips
    assert again.platform.clock_ns >= state.platform.clock_ns
    assert phases == ["devices-decoded", "vcpus", "platform", "clocks"]


def test_what_is_not_its_own_state_is_refused_before_anything_changes(
    host: Host, other: Host
) -> None:
    state = _state(host)
    before = _state(other)
    for change, says in (
        ({"vcpus": state.vcpus[:1]}, "vcpus: 1 in the stream, 2 here"),
        ({"devices": state.devices[:-1]}, "'dice': missing"),
        ({"devices": [*state.devices, replace(state.devices[0], id="x")]}, "'x' not known"),
        ({"devices": [replace(d, version=9) for d in state.devices]}, "'serial0': version 9"),
    ):
        with pytest.raises(StreamError, match=says):
            other.machine.load(replace(state, **change), 0.0)
    assert _state(other).devices == before.devices


def test_hints_of_devices_that_are_not_here_are_left_alone(host: Host, other: Host) -> None:
    hints = host.machine.hints()
    other.machine.prepare({"who": hints["nic0"], "nic0": hints["nic0"], "old": hints["dice"]})


def test_a_guest_that_powers_off_stops_its_vcpu(host: Host) -> None:
    host.machine.resume()
    host.vcpus[0].out(layout.PM1_CONTROL + 1, S5 >> 8)
    thread = host.machine.vcpus[0]
    with thread._changed:
        assert thread._changed.wait_for(lambda: thread.exited is not None, 60)
    assert host.machine.exited == (StopReason.POWER_OFF, "the guest powered off")
    host.machine.pause()
    assert host.exits == [(StopReason.POWER_OFF, "the guest powered off")]


def test_a_guest_that_resets_names_it(host: Host) -> None:
    host.machine.resume()
    host.vcpus[0].out(layout.RESET_PORT, 6)
    thread = host.machine.vcpus[0]
    with thread._changed:
        assert thread._changed.wait_for(lambda: thread.exited is not None, 60)
    assert host.exits == [(StopReason.RESET, "the guest reset the machine")]
    with pytest.raises(ConfigError, match="no kernel was given"):
        host.machine.power_on_state()


def test_shared_memory_is_the_configurations(host: Host) -> None:
    assert host.machine.memory.fd is None
    shared = Host(config(RNG, shared_memory=True))
    assert shared.machine.memory.fd is not None
    shared.machine.memory.write(5 << 20, b"x")
    shared.machine.memory.clear()
    assert shared.machine.memory.read(5 << 20, 1) == b"\0"
    assert shared.machine.memory.populated() == [] or shared.machine.memory.read(0, 1) == b"\0"
    shared.close()
