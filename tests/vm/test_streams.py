"""Machines of this version load the recorded streams of each machine type (tests/streams)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import structs
from vm_bench import Bench

from godwit.host.kvm import abi
from godwit.host.kvm.cpustate import PlatformState, VcpuState, tsc_of
from godwit.host.loop import Loop
from godwit.hw.console import Console
from godwit.machine.board import Board
from godwit.machine.machine import Machine
from godwit.machine.state import MachineState
from godwit.machine.vcpu import install_kick_handler
from godwit.migration.wire import compatibility, messages
from godwit.spec import saved
from godwit.spec.config import NicConfig, VmConfig
from godwit.spec.machine_types import machine_type
from godwit.spec.values import parse_mac, parse_size
from lab.netns import inside
from recorded import STREAMS, Stream

#: Where the streams were recorded (tests/streams/README.md). A guest of another CPU's may not fit.
_CPU = "AMD EPYC Processor"
#: The local APIC's registers, 16 bytes each (SDM volume 3, table 11-1).
_PPR, _IRR, _LVT_TIMER, _CURRENT_COUNT = 0xA0, 0x200, 0x320, 0x390
#: The guest's clocks run, and make up for a pause; the three after them, Hyper-V's run time,
#: reference counter and TSC frequency, are the host's to say (arch/x86/kvm/hyperv.c,
#: kvm_hv_set_msr_pw and kvm_hv_set_msr ignore what they are given).
_CLOCK_MSRS = (abi.MSR_TSC, abi.MSR_TSC_DEADLINE, 0x40000010, 0x40000020, 0x40000022)
#: What a guest's watchdog allows its TSC, s (kernel/time/clocksource.c: 250 us for each clock).
_ALLOWED_S = 0.0005
#: SYSENTER_ESP and _EIP. On AMD, whose SYSENTER has 32 bits, KVM keeps no more of what it is given,
#: but reads all of what the guest wrote (arch/x86/kvm/svm/svm.c, svm_set_msr and svm_get_msr).
_SYSENTER_MSRS = (0x175, 0x176)


@contextmanager
def _machine(bench: Bench, stream: Stream) -> Iterator[Machine]:
    """A machine of the recorded configuration, paused, in this process."""
    install_kick_handler()
    host = bench.net.a
    hello = saved.decode(stream.read()[0], messages.Hello)
    nic = next(device for device in hello.devices if "mac" in device.properties)
    config = VmConfig(
        memory=parse_size(stream.memory),
        cpus=stream.cpus,
        devices=(
            NicConfig(
                nic.id,
                bench.free_tap(host),
                parse_mac(str(nic.properties["mac"])),
                kind=nic.kind,
            ),
        ),
        machine=machine_type(stream.machine),
    )
    loop, errors = Loop(), []
    with open(os.devnull, "wb") as null:
        console = Console(null.fileno())
        thread = threading.Thread(target=loop.run)
        with inside(host.netns):
            machine = Machine(
                Board(config), loop, console, lambda *end: None, lambda *what: errors.append(what)
            )
        thread.start()
        try:
            yield machine
            assert errors == []
        finally:
            machine.close()
            loop.stop()
            thread.join()
            console.close()
            loop.close()


@pytest.mark.parametrize("prepared", [False, True], ids=["at once", "prepared"])
@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_a_machine_loads_the_stream_and_has_the_same_state(
    bench: Bench, stream: Stream, prepared: bool
) -> None:
    said, raw = stream.read()
    state = saved.decode(raw, MachineState)
    with _machine(bench, stream) as machine:
        source = saved.decode(said, messages.Hello)
        same_cpu = f": {_CPU}\n" in Path("/proc/cpuinfo").read_text()
        if not same_cpu:
            source = structs.replace(source, cpu=None)
        compatibility.check(source, machine)
        compatibility.adopt(source, machine)
        if prepared:
            machine.prepare(
                {device.id: device.hints for device in source.devices if device.hints is not None}
            )
        if not same_cpu:
            state = structs.replace(state, vcpus=machine.save().vcpus)
        machine.load(state, time.monotonic())
        own = machine.save(state.sections)
        # The streams are of a time when a state had all MSRs that KVM lists, Hyper-V's too.
        told = {abi.MSR_TSC, *machine.board.msrs}
        then_told = [
            structs.replace(vcpu, msrs=[pair for pair in vcpu.msrs if pair[0] in told])
            for vcpu in state.vcpus
        ]
        assert saved.decode(saved.encode(own), MachineState) == own
        for index, (now, then) in enumerate(zip(own.vcpus, then_told, strict=True)):
            before, after = _still(then), _still(now)
            changed = {k: (v, after[k]) for k, v in before.items() if after[k] != v}
            assert not changed, f"vCPU {index}"
            assert len(before) == len(after)
        assert _platform(own.platform) == _platform(state.platform)
        _clocks_went_on(machine, state, own)
        assert machine.devices.decode(own.devices) == machine.devices.decode(state.devices)


def _clocks_went_on(machine: Machine, then: MachineState, now: MachineState) -> None:
    """All TSCs and the clock, by the same time; TSCs read one after the other are one."""
    offsets = {thread.vcpu.tsc_offset() for thread in machine.vcpus}
    assert len(offsets) == 1
    assert None not in offsets
    passed = (now.platform.clock_ns - then.platform.clock_ns) / 1e9
    assert 0 <= passed < 60
    hertz = machine.vcpus[0].vcpu.tsc_khz() * 1000
    for vcpu in now.vcpus:
        ticks = (tsc_of(vcpu) - tsc_of(then.vcpus[0])) % (1 << 64)
        assert abs(ticks / hertz - passed) < _ALLOWED_S


def _still(vcpu: VcpuState) -> dict[str, object]:
    """What of a stopped vCPU stays as it is."""
    lapic = {at: vcpu.lapic[at : at + 16] for at in range(0, len(vcpu.lapic), 16)}
    # The processor priority follows from the rest. KVM makes it anew whenever it matters, and in
    # SET_LAPIC too early: before it counts what is in service (kvm_apic_set_state).
    del lapic[_PPR]
    # The timer runs while the vCPU stands still, and its interrupt may have become pending.
    del lapic[_CURRENT_COUNT]
    vector = lapic[_LVT_TIMER][0]
    at = _IRR + 16 * (vector // 32)
    pending = int.from_bytes(lapic[at], "little") & ~(1 << vector % 32)
    lapic[at] = pending.to_bytes(16, "little")
    still: dict[str, object] = structs.asdict(vcpu)
    del still["lapic"], still["msrs"]
    still.update({f"lapic {at:#x}": value for at, value in lapic.items()})
    for index, value in vcpu.msrs:
        if index not in _CLOCK_MSRS:
            still[f"MSR {index:#x}"] = value & 0xFFFFFFFF if index in _SYSENTER_MSRS else value
    return still


def _platform(platform: PlatformState) -> list[bytes]:
    """Its chips; the PIT's counters tell when they were loaded."""
    return platform.irqchips
