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

from . import abi
from .handles import QUICK_S, Clock, Vcpu, Vm

_WORD = 1 << 64
#: A reading is made again until nobody came between, so often at the most.
_READINGS = 3


class Reading(NamedTuple):
    """Of one instant."""

    clock: Clock
    tscs: list[int]
    """The guest's TSC on each vCPU."""


def read(vm: Vm, vcpus: Sequence[Vcpu]) -> Reading:
    """The guest's clock between two readings of the first vCPU's TSC; the others' by their offsets.
    A kernel that does not tell these keeps all TSCs together, if its guest does.

    Raises:
        KvmError: KVM does not tell a TSC.
    """
    first = vcpus[0]
    quick = first.tsc_khz() * 1000 * QUICK_S
    looks: list[tuple[int, int, Clock]] = []
    for _ in range(_READINGS):
        before = first.tsc()
        clock = vm.clock()
        took = (first.tsc() - before) % _WORD
        looks.append((took, before + took // 2, clock))
        if took <= quick:
            break
    _, tsc, clock = min(looks, key=lambda look: look[0])
    offsets = [vcpu.tsc_offset() or 0 for vcpu in vcpus]
    return Reading(clock, [(tsc + offset - offsets[0]) % _WORD for offset in offsets])


def restore(vm: Vm, vcpus: Sequence[Vcpu], clock: int, since: float, tscs: Sequence[int]) -> None:
    """Set the guest's clock to what it is by now if it was ``clock``, ns, at that time.monotonic,
    and the TSCs to what they are if they were ``tscs`` at the same instant.

    TSCs less than a second apart are one, as KVM has it where they are written
    (arch/x86/kvm/x86.c, kvm_synchronize_tsc): they may have been read one after the other.

    Raises:
        OSError, KvmError: KVM refuses.
    """
    first = vcpus[0]
    hertz = first.tsc_khz() * 1000
    for _ in range(_READINGS):
        vm.set_clock(clock + int((time.monotonic() - since) * 1e9))
        now = read(vm, vcpus[:1])
        # Between the question for the time and the setting anybody may have had the CPU.
        off = now.clock.guest - clock - int((now.clock.monotonic - since) * 1e9)
        if abs(off) <= QUICK_S * 1e9:
            break
    passed = (now.clock.guest - clock) * hertz // 10**9
    offset = first.tsc_offset()
    for vcpu, tsc in zip(vcpus, tscs, strict=True):
        apart = tsc - tscs[0] if abs(tsc - tscs[0]) >= hertz else 0
        due = tscs[0] + apart + passed
        if offset is None:
            late = int((time.monotonic() - now.clock.monotonic) * hertz)
            vcpu.set_msrs([(abi.MSR_TSC, (due + late) % _WORD)])
        else:
            vcpu.set_tsc_offset((offset + due - now.tscs[0]) % _WORD)
