"""State of a vCPU, and of a VM's interrupt controllers, PIT and clock, as saved-state types.

The order of the SETs is one that works with stock kernels: what the local APIC depends on comes
before it, and the TSC-deadline MSR after it (KVM drops the deadline while the APIC's timer is not
in that mode) and after the TSC (KVM computes once how long it is until then). GET: MP_STATE first,
because reading it makes pending INIT/SIPI take effect.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.errors import KvmError, StreamError
from godwit.spec.saved import U32, U64

from . import abi
from .clocks import Clock
from .handles import Vcpu, Vm

#: What goes on while a guest stands still, and what waits for it.
_OF_TIME = abi.MSR_TSC, abi.MSR_TSC_DEADLINE


class VcpuState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All state of a vCPU KVM keeps, the blobs being KVM's own structs."""

    mp_state: Annotated[int, msgspec.Meta(ge=0, le=9)]
    regs: Annotated[bytes, msgspec.Meta(min_length=abi.REGS_SIZE, max_length=abi.REGS_SIZE)]
    sregs: Annotated[bytes, msgspec.Meta(min_length=abi.SREGS_SIZE, max_length=abi.SREGS_SIZE)]
    xsave: Annotated[bytes, msgspec.Meta(min_length=abi.XSAVE_SIZE, max_length=1 << 16)]
    xcrs: Annotated[bytes, msgspec.Meta(min_length=abi.XCRS_SIZE, max_length=abi.XCRS_SIZE)]
    msrs: Annotated[list[tuple[U32, U64]], msgspec.Meta(max_length=1024)]
    events: Annotated[bytes, msgspec.Meta(min_length=abi.EVENTS_SIZE, max_length=abi.EVENTS_SIZE)]
    debugregs: Annotated[
        bytes, msgspec.Meta(min_length=abi.DEBUGREGS_SIZE, max_length=abi.DEBUGREGS_SIZE)
    ]
    lapic: Annotated[bytes, msgspec.Meta(min_length=abi.LAPIC_SIZE, max_length=abi.LAPIC_SIZE)]


_Chip = Annotated[bytes, msgspec.Meta(min_length=abi.IRQCHIP_SIZE, max_length=abi.IRQCHIP_SIZE)]


class PlatformState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """State of the PICs, the I/O APIC, the PIT and the guest's clock."""

    irqchips: Annotated[list[_Chip], msgspec.Meta(min_length=3, max_length=3)]
    pit: Annotated[
        bytes, msgspec.Meta(min_length=abi.PIT_STATE_SIZE, max_length=abi.PIT_STATE_SIZE)
    ]
    #: Below what is left of a u64 for the time to come.
    clock_ns: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    #: CLOCK_REALTIME of the source at ``clock_ns``; 0 in the streams of old.
    realtime_ns: U64


#: MSRs that are so already in a vCPU that never ran: (index, value).
ResetMsrs = frozenset[tuple[int, int]]
#: All XSAVE components, the first two of which (x87 and SSE) every area has.
ALL_COMPONENTS = (1 << 64) - 1
_ALWAYS = 3
#: XSTATE_BV, in the header of an XSAVE area (Intel SDM volume 1, 13.4.2).
_XSTATE_BV = slice(512, 520)
NO_RESET_MSRS: ResetMsrs = frozenset()


def save_vcpu(vcpu: Vcpu, msrs: list[int], tsc: int) -> VcpuState:
    """Return the state of a stopped vCPU whose TSC was ``tsc``.

    Raises:
        KvmError: KVM does not read an MSR.
    """
    mp_state = abi.MP_STATE.unpack(vcpu.get(abi.GET_MP_STATE, abi.MP_STATE_SIZE))[0]
    xsave = (
        vcpu.get(abi.GET_XSAVE2, vcpu.xsave_size)
        if vcpu.xsave_size > abi.XSAVE_SIZE
        else vcpu.get(abi.GET_XSAVE, abi.XSAVE_SIZE)
    )
    values = vcpu.get_msrs(msrs)
    if len(values) != len(msrs):
        raise KvmError(f"vCPU {vcpu.index}: MSR {msrs[len(values)]:#x} could not be read")
    return VcpuState(
        mp_state=mp_state,
        regs=vcpu.get(abi.GET_REGS, abi.REGS_SIZE),
        sregs=vcpu.get(abi.GET_SREGS, abi.SREGS_SIZE),
        xsave=xsave,
        xcrs=vcpu.get(abi.GET_XCRS, abi.XCRS_SIZE),
        msrs=[*values, (abi.MSR_TSC, tsc)],
        events=vcpu.get(abi.GET_VCPU_EVENTS, abi.EVENTS_SIZE),
        debugregs=vcpu.get(abi.GET_DEBUGREGS, abi.DEBUGREGS_SIZE),
        lapic=vcpu.get(abi.GET_LAPIC, abi.LAPIC_SIZE),
    )


def tsc_of(state: VcpuState) -> int:
    """Return the TSC in a vCPU's state.

    Raises:
        StreamError: the TSC is missing.
    """
    for index, value in reversed(state.msrs):
        if index == abi.MSR_TSC:
            return value
    raise StreamError("vcpus: msrs: the TSC is not among them")


def load_vcpu(
    vcpu: Vcpu,
    state: VcpuState,
    reset: ResetMsrs = NO_RESET_MSRS,
    components: int = ALL_COMPONENTS,
) -> None:
    """Set a stopped vCPU's state, except the TSC and the timer's deadline.

    :func:`.clocks.restore` sets the TSC, and :func:`load_deadline` the deadline after that.

    ``reset``: MSRs that are so already are left alone. Most are (machine check banks, MTRRs,
    counters), and setting them takes several times as long as the others.

    ``components``: the XSAVE components the guest was told of. KVM of old saves all of the host's,
    PKRU in any case (before Linux 6.6), and no KVM takes what the own host lacks.

    Raises:
        StreamError: KVM does not take a part; the message names it.
    """
    if len(state.xsave) > vcpu.xsave_size:
        raise StreamError(
            f"vCPU {vcpu.index}: xsave has {len(state.xsave)} bytes, this host's KVM takes "
            f"{vcpu.xsave_size}: the source's CPU has state that this one lacks"
        )
    differing = [pair for pair in state.msrs if pair not in reset]
    _put(vcpu, "sregs", abi.SET_SREGS, state.sregs)
    _put(vcpu, "regs", abi.SET_REGS, state.regs)
    xsave = _with_components(state.xsave, components)
    _put(vcpu, "xsave", abi.SET_XSAVE, xsave.ljust(vcpu.xsave_size, b"\0"))
    _put(vcpu, "xcrs", abi.SET_XCRS, state.xcrs)
    _put_msrs(vcpu, [(i, v) for i, v in differing if i not in _OF_TIME])
    _put(vcpu, "events", abi.SET_VCPU_EVENTS, state.events)
    _put(vcpu, "debugregs", abi.SET_DEBUGREGS, state.debugregs)
    _put(vcpu, "lapic", abi.SET_LAPIC, state.lapic)
    _put(vcpu, "mp_state", abi.SET_MP_STATE, abi.MP_STATE.pack(state.mp_state))


def _with_components(area: bytes, components: int) -> bytes:
    present = int.from_bytes(area[_XSTATE_BV], "little")
    kept = present & (components | _ALWAYS)
    if kept == present:
        return area
    return area[: _XSTATE_BV.start] + kept.to_bytes(8, "little") + area[_XSTATE_BV.stop :]


def load_deadline(vcpu: Vcpu, state: VcpuState) -> None:
    """Set the deadline of a vCPU's timer, once the TSC is right.

    Raises:
        StreamError: KVM does not take the MSR.
    """
    _put_msrs(vcpu, [(i, v) for i, v in state.msrs if i == abi.MSR_TSC_DEADLINE])


def _put(vcpu: Vcpu, name: str, request: int, data: bytes) -> None:
    try:
        vcpu.set(request, data)
    except OSError as error:
        raise StreamError(f"vCPU {vcpu.index}: KVM refused '{name}': {error}") from error


def _put_msrs(vcpu: Vcpu, msrs: list[tuple[int, int]]) -> None:
    try:
        taken = vcpu.set_msrs(msrs) if msrs else 0
    except OSError as error:
        raise StreamError(f"vCPU {vcpu.index}: KVM refused {len(msrs)} MSRs: {error}") from error
    if taken != len(msrs):
        raise StreamError(
            f"vCPU {vcpu.index}: KVM refused MSR {msrs[taken][0]:#x} = {msrs[taken][1]:#x}"
        )


def save_platform(vm: Vm, clock: Clock) -> PlatformState:
    """Return a stopped VM's interrupt controllers and PIT, with ``clock`` as the VM's clock."""
    return PlatformState(
        irqchips=[
            vm.get(abi.GET_IRQCHIP, abi.IRQCHIP_SIZE, chip.to_bytes(4, "little"))
            for chip in range(3)
        ],
        pit=vm.get(abi.GET_PIT2, abi.PIT_STATE_SIZE),
        clock_ns=clock.guest,
        realtime_ns=clock.realtime,
    )


def load_platform(vm: Vm, state: PlatformState) -> None:
    """Set a stopped VM's interrupt controllers and PIT, but not the clock.

    :func:`.clocks.restore` sets the clock.

    Raises:
        StreamError: KVM does not take a part; the message names it.
    """
    for chip, data in enumerate(state.irqchips):
        if int.from_bytes(data[:4], "little") != chip:
            raise StreamError(f"platform: irqchips[{chip}] is the state of another chip")
    try:
        for data in state.irqchips:
            vm.set(abi.SET_IRQCHIP, data)
        vm.set(abi.SET_PIT2, state.pit)
    except OSError as error:
        raise StreamError(f"platform: KVM refused the state: {error}") from error
