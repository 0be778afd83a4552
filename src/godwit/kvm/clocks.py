"""A guest's TSCs and its clock: read as of one instant, and set so that they agree.

The guest compares them: its kernel's watchdog calls a TSC unstable that gains or loses half a
millisecond on kvm-clock between two looks (kernel/time/clocksource.c, WATCHDOG_MAX_SKEW). A TSC
that is written goes on while the value is on its way, for milliseconds where others want the CPU,
and KVM takes writes within a second for one and the same. Its offset to the host's TSC has no such
delay.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import KvmError
from . import abi
from .handles import QUICK_S, Clock, Vcpu, Vm, at_one_instant

_WORD = 1 << 64
#: A clock that was set too late is set again, so often at the most.
_SETTINGS = 3


class Reading(NamedTuple):
    """Of one instant."""

    clock: Clock
    tscs: list[int]
    """The guest's TSC on each vCPU."""
    offsets: list[int | None]
    """How far each is ahead of the host's; None: KVM does not tell."""


def read(vm: Vm, vcpus: Sequence[Vcpu]) -> Reading:
    """The guest's clock between two readings of the first vCPU's TSC. The others' follow from their
    offsets; without these, each is read by itself, and a little later.

    Raises:
        KvmError: KVM does not tell a TSC.
    """
    first = vcpus[0]
    (before, clock, after), _, _ = at_one_instant(lambda: (first.tsc(), vm.clock(), first.tsc()))
    tsc = before + (after - before) % _WORD // 2
    base = first.tsc_offset()
    tscs, offsets = [tsc % _WORD], [base]
    for vcpu in vcpus[1:]:
        offset = vcpu.tsc_offset()
        if base is None or offset is None:
            tscs.append(vcpu.tsc())
        else:
            tscs.append((tsc + offset - base) % _WORD)
        offsets.append(offset)
    return Reading(clock, tscs, offsets)


def restore(vm: Vm, vcpus: Sequence[Vcpu], clock: int, since: float, tscs: Sequence[int]) -> None:
    """Set the guest's clock to what it is by now if it was ``clock``, ns, at that time.monotonic,
    and the TSCs to what they are if they were ``tscs`` at the same instant.

    TSCs a few milliseconds apart are one: they were read one after the other. KVM itself makes one
    of all that are written within a second (arch/x86/kvm/x86.c, kvm_synchronize_tsc).

    Raises:
        OSError, KvmError: KVM refuses.
    """
    hertz = vcpus[0].tsc_khz() * 1000
    for _ in range(_SETTINGS):
        vm.set_clock(clock + int((time.monotonic() - since) * 1e9))
        now = read(vm, vcpus[:1])
        # Between the question for the time and the setting anybody may have had the CPU.
        off = now.clock.guest - clock - int((now.clock.monotonic - since) * 1e9)
        if abs(off) <= QUICK_S * 1e9:
            break
    passed = (now.clock.guest - clock) * hertz // 10**9
    offset = now.offsets[0]
    for vcpu, tsc in zip(vcpus, tscs, strict=True):
        apart = (tsc - tscs[0] + _WORD // 2) % _WORD - _WORD // 2
        due = tscs[0] + passed + (apart if abs(apart) >= hertz // 100 else 0)
        if offset is not None:
            vcpu.set_tsc_offset((offset + due - now.tscs[0]) % _WORD)
            continue
        late = int((time.monotonic() - now.clock.monotonic) * hertz)
        if vcpu.set_msrs([(abi.MSR_TSC, (due + late) % _WORD)]) != 1:
            raise KvmError(f"vCPU {vcpu.index}: KVM refused its TSC")
