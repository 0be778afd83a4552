"""A vCPU's state and the VM's interrupt controllers, as saved-state types.

The order of the SETs is one that works with stock kernels: what the local APIC depends on comes
before it, and the TSC-deadline MSR after it (KVM drops the deadline while the APIC's timer is not
in that mode). GET: MP_STATE first, because reading it makes pending INIT/SIPI take effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated

import msgspec

from ..errors import KvmError, StreamError
from . import abi
from .handles import Vcpu, Vm

_WORD = 1 << 64
_U64 = Annotated[int, msgspec.Meta(ge=0)]
_U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class VcpuState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a vCPU that KVM keeps; the blobs are KVM's own structs."""

    mp_state: Annotated[int, msgspec.Meta(ge=0, le=9)]
    regs: Annotated[bytes, msgspec.Meta(min_length=abi.REGS_SIZE, max_length=abi.REGS_SIZE)]
    sregs: Annotated[bytes, msgspec.Meta(min_length=abi.SREGS_SIZE, max_length=abi.SREGS_SIZE)]
    xsave: Annotated[bytes, msgspec.Meta(min_length=abi.XSAVE_SIZE, max_length=1 << 16)]
    xcrs: Annotated[bytes, msgspec.Meta(min_length=abi.XCRS_SIZE, max_length=abi.XCRS_SIZE)]
    msrs: Annotated[list[tuple[_U32, _U64]], msgspec.Meta(max_length=1024)]
    events: Annotated[bytes, msgspec.Meta(min_length=abi.EVENTS_SIZE, max_length=abi.EVENTS_SIZE)]
    debugregs: Annotated[
        bytes, msgspec.Meta(min_length=abi.DEBUGREGS_SIZE, max_length=abi.DEBUGREGS_SIZE)
    ]
    lapic: Annotated[bytes, msgspec.Meta(min_length=abi.LAPIC_SIZE, max_length=abi.LAPIC_SIZE)]


_Chip = Annotated[bytes, msgspec.Meta(min_length=abi.IRQCHIP_SIZE, max_length=abi.IRQCHIP_SIZE)]


class PlatformState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PICs, I/O APIC, PIT and the guest's clock."""

    irqchips: Annotated[list[_Chip], msgspec.Meta(min_length=3, max_length=3)]
    pit: Annotated[
        bytes, msgspec.Meta(min_length=abi.PIT_STATE_SIZE, max_length=abi.PIT_STATE_SIZE)
    ]
    clock_ns: _U64
    #: CLOCK_REALTIME of the source at ``clock_ns``; 0 in the streams of old.
    realtime_ns: _U64


def save_vcpu(vcpu: Vcpu, msrs: list[int]) -> tuple[VcpuState, float]:
    """The state of a vCPU that is stopped, and when its TSC was read, time.monotonic."""
    mp_state = abi.MP_STATE.unpack(vcpu.get(abi.GET_MP_STATE, abi.MP_STATE_SIZE))[0]
    xsave = (
        vcpu.get(abi.GET_XSAVE2, vcpu.xsave_size)
        if vcpu.xsave_size > abi.XSAVE_SIZE
        else vcpu.get(abi.GET_XSAVE, abi.XSAVE_SIZE)
    )
    values = vcpu.get_msrs(msrs)
    if len(values) != len(msrs):
        raise KvmError(f"vCPU {vcpu.index}: MSR {msrs[len(values)]:#x} could not be read")
    tsc, read_at = vcpu.tsc()  # by itself: the list takes its time
    values = [(i, tsc if i == abi.MSR_TSC else v) for i, v in values]
    state = VcpuState(
        mp_state=mp_state,
        regs=vcpu.get(abi.GET_REGS, abi.REGS_SIZE),
        sregs=vcpu.get(abi.GET_SREGS, abi.SREGS_SIZE),
        xsave=xsave,
        xcrs=vcpu.get(abi.GET_XCRS, abi.XCRS_SIZE),
        msrs=values,
        events=vcpu.get(abi.GET_VCPU_EVENTS, abi.EVENTS_SIZE),
        debugregs=vcpu.get(abi.GET_DEBUGREGS, abi.DEBUGREGS_SIZE),
        lapic=vcpu.get(abi.GET_LAPIC, abi.LAPIC_SIZE),
    )
    return state, read_at


def later(state: VcpuState, ticks: int) -> VcpuState:
    """The state with a TSC that went on for so many cycles."""
    return msgspec.structs.replace(
        state, msrs=[(i, (v + ticks) % _WORD if i == abi.MSR_TSC else v) for i, v in state.msrs]
    )


def load_vcpu(
    vcpu: Vcpu,
    state: VcpuState,
    advance_tsc: Callable[[], int] = lambda: 0,
    fresh: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Give a stopped vCPU ``state``; its TSC is put ``advance_tsc()`` cycles ahead, asked at the
    last moment.

    ``fresh`` are the MSRs of a vCPU that never ran: those that are so already are left alone. Most
    are (machine check banks, MTRRs, counters), and setting them takes several times as long as the
    others.

    Raises:
        StreamError: KVM does not take a part; the message names it.
    """
    if len(state.xsave) > vcpu.xsave_size:
        raise StreamError(
            f"vCPU {vcpu.index}: xsave has {len(state.xsave)} bytes, this host's KVM takes "
            f"{vcpu.xsave_size}: the source's CPU has state that this one lacks"
        )
    xsave = state.xsave.ljust(vcpu.xsave_size, b"\0")
    deadline = [(i, v) for i, v in state.msrs if i == abi.MSR_TSC_DEADLINE]
    others = [
        (i, v)
        for i, v in state.msrs
        if i not in (abi.MSR_TSC, abi.MSR_TSC_DEADLINE) and fresh.get(i) != v
    ]
    tsc = [(i, v) for i, v in state.msrs if i == abi.MSR_TSC]
    _put(vcpu, "sregs", abi.SET_SREGS, state.sregs)
    _put(vcpu, "regs", abi.SET_REGS, state.regs)
    _put(vcpu, "xsave", abi.SET_XSAVE, xsave)
    _put(vcpu, "xcrs", abi.SET_XCRS, state.xcrs)
    _put_msrs(vcpu, others)
    _put_msrs(vcpu, [(i, (v + advance_tsc()) % _WORD) for i, v in tsc])
    _put(vcpu, "events", abi.SET_VCPU_EVENTS, state.events)
    _put(vcpu, "debugregs", abi.SET_DEBUGREGS, state.debugregs)
    _put(vcpu, "lapic", abi.SET_LAPIC, state.lapic)
    _put(vcpu, "mp_state", abi.SET_MP_STATE, abi.MP_STATE.pack(state.mp_state))
    _put_msrs(vcpu, deadline)


def _put(vcpu: Vcpu, name: str, request: int, data: bytes) -> None:
    try:
        vcpu.set(request, data)
    except OSError as error:
        raise StreamError(f"vCPU {vcpu.index}: KVM refused '{name}': {error}") from error


def _put_msrs(vcpu: Vcpu, msrs: list[tuple[int, int]]) -> None:
    taken = vcpu.set_msrs(msrs) if msrs else 0
    if taken != len(msrs):
        raise StreamError(
            f"vCPU {vcpu.index}: KVM refused MSR {msrs[taken][0]:#x} = {msrs[taken][1]:#x}"
        )


def save_platform(vm: Vm) -> tuple[PlatformState, float]:
    """Interrupt controllers, PIT and clock of a VM that is stopped, and when the clock was read,
    time.monotonic."""
    clock = vm.clock()
    state = PlatformState(
        irqchips=[
            vm.get(abi.GET_IRQCHIP, abi.IRQCHIP_SIZE, chip.to_bytes(4, "little"))
            for chip in range(3)
        ],
        pit=vm.get(abi.GET_PIT2, abi.PIT_STATE_SIZE),
        clock_ns=clock.guest,
        realtime_ns=clock.realtime,
    )
    return state, clock.monotonic


def load_platform(vm: Vm, state: PlatformState, advance_ns: int = 0) -> None:
    """Give a stopped VM ``state``; its clock is put ``advance_ns`` ahead.

    Raises:
        StreamError: KVM does not take a part; the message names it.
    """
    for chip, data in enumerate(state.irqchips):
        if int.from_bytes(data[:4], "little") != chip:
            raise StreamError(f"platform: irqchips[{chip}] says that it is another chip")
    try:
        for data in state.irqchips:
            vm.set(abi.SET_IRQCHIP, data)
        vm.set(abi.SET_PIT2, state.pit)
        vm.set_clock(state.clock_ns + advance_ns)
    except OSError as error:
        raise StreamError(f"platform: KVM refused the state: {error}") from error
