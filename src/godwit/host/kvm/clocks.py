"""A guest's TSCs and clock: read as of one instant, and set so that all agree.

The guest compares both: its kernel's watchdog calls a TSC unstable that gains or loses half a
millisecond on kvm-clock between two looks (kernel/time/clocksource.c, WATCHDOG_MAX_SKEW). A TSC
that is written goes on while the value is on its way, for milliseconds where others want the CPU,
and KVM takes writes within a second for one and the same. Its offset to the host's TSC has no such
delay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from godwit.errors import KvmError
from godwit.host.ioctl import address_of

from . import abi
from .handles import Vcpu, Vm, msr_query

_T = TypeVar("_T")
_WORD = 1 << 64
#: A reading of two clocks that took longer is made again, so often at the most; seconds. It takes
#: microseconds on a real CPU, a few hundred on an emulated one, and the guest stands still.
QUICK_S = 500e-6
_READINGS = 3
#: A clock is set so often at the most: again where it was set too late.
_SETTINGS = 3
#: A clock that is this close is not set again, ns: an emulated CPU takes as long for a call.
_EXACT_NS = 100_000
#: Nor is one that is this close and was set earlier by what it was late before.
_GOOD_NS = int(QUICK_S * 1e9)


class Clock(NamedTuple):
    """A guest's clock at one instant."""

    guest: int
    """Nanoseconds since the VM was made."""
    realtime: int
    """The host's CLOCK_REALTIME in nanoseconds."""
    monotonic: float
    """The host's time.monotonic in seconds."""


class Reading(NamedTuple):
    """A reading of clock and TSCs, as of one instant."""

    clock: Clock
    tscs: list[int]
    """The guest's TSC on each vCPU."""
    offsets: list[int | None]
    """How far each TSC is ahead of the host's; None: KVM does not report the offset."""


def at_one_instant(look: Callable[[], _T]) -> tuple[_T, float, float]:
    """Return the result of ``look``, the time.monotonic of its middle, and its length in seconds.

    A look that was interrupted is made again, and the quickest of some looks counts.
    """
    looks: list[tuple[_T, float, float]] = []
    for _ in range(_READINGS):
        before = time.monotonic()
        value = look()
        took = time.monotonic() - before
        looks.append((value, before + took / 2, took))
        if took <= QUICK_S:
            break
    return min(looks, key=lambda one: one[2])


def host_clocks() -> tuple[int, float]:
    """Return the host's CLOCK_REALTIME in nanoseconds, and time.monotonic in seconds, at once."""
    return at_one_instant(time.time_ns)[:2]


class _Looker:
    """A reader of a VM's clock between two readings of a vCPU's TSC.

    Three calls, back to back, into buffers made before: where CPUs are emulated, all else takes as
    long as the calls.
    """

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        query = msr_query((abi.MSR_TSC,))
        self._buffers = bytearray(query), bytearray(abi.CLOCK_DATA.size), bytearray(query)
        self._addresses = tuple(map(address_of, self._buffers))
        self._vm, self._vcpu = vm, vcpu

    def look(self) -> tuple[int, int, list[bytes]]:
        """Return the host's time.time_ns, how many TSCs were read (two are due), the answers."""
        first, second, third = self._addresses
        realtime = time.time_ns()
        answered = self._vcpu.ioctl(abi.GET_MSRS, first)
        self._vm.ioctl(abi.GET_CLOCK, second)
        answered += self._vcpu.ioctl(abi.GET_MSRS, third)
        return realtime, answered, list(map(bytes, self._buffers))

    def at_one_instant(self) -> tuple[int, Clock]:
        """Return TSC and clock of one instant.

        Raises:
            KvmError: KVM does not report the TSC.
        """
        (realtime, answered, answers), monotonic, took = at_one_instant(self.look)
        if answered != 2:
            raise KvmError(f"vCPU {self._vcpu.index}: its TSC could not be read")
        before, after = (int.from_bytes(answers[at][-8:], "little") for at in (0, 2))
        guest, flags, _, exact, _ = abi.CLOCK_DATA.unpack(answers[1])
        # A kernel without a stable TSC does not report the host's time.
        realtime = exact if flags & abi.CLOCK_REALTIME else realtime + int(took * 5e8)
        tsc = (before + (after - before) % _WORD // 2) % _WORD
        return tsc, Clock(guest, realtime, monotonic)


def read(vm: Vm, vcpus: Sequence[Vcpu]) -> Reading:
    """Read the guest's clock between two readings of the first vCPU's TSC.

    The other vCPUs' TSCs follow from the offsets; without offsets, each TSC is read by itself,
    and a little later.

    Raises:
        KvmError: KVM does not report a TSC.
    """
    tsc, clock = _Looker(vm, vcpus[0]).at_one_instant()
    base = vcpus[0].tsc_offset()
    tscs, offsets = [tsc], [base]
    for vcpu in vcpus[1:]:
        offset = vcpu.tsc_offset()
        if base is None or offset is None:
            tscs.append(vcpu.tsc())
        else:
            tscs.append((tsc + offset - base) % _WORD)
        offsets.append(offset)
    return Reading(clock, tscs, offsets)


def restore(vm: Vm, vcpus: Sequence[Vcpu], clock: int, since: float, tscs: Sequence[int]) -> None:
    """Set the guest's clock and TSCs to the values of now.

    The clock was ``clock`` nanoseconds, and the TSCs were ``tscs``, at time.monotonic ``since``.

    TSCs a few milliseconds apart are one: the TSCs were read one after the other. KVM itself makes
    one of all that are written within a second (arch/x86/kvm/x86.c, kvm_synchronize_tsc).

    Raises:
        OSError, KvmError: KVM refuses.
    """
    hertz = vcpus[0].tsc_khz() * 1000
    looker, late = _Looker(vm, vcpus[0]), 0
    for _ in range(_SETTINGS):
        vm.set_clock(clock + int((time.monotonic() - since) * 1e9) + late)
        own, now = looker.at_one_instant()
        # Between the question for the time and the setting anybody may have had the CPU.
        off = now.guest - clock - int((now.monotonic - since) * 1e9)
        if abs(off) <= (_GOOD_NS if late else _EXACT_NS):
            break
        # What the call itself takes, it takes each time; what others took, they may not.
        if abs(off) <= _GOOD_NS:
            late -= off
    passed = (now.guest - clock) * hertz // 10**9
    offset = vcpus[0].tsc_offset()
    for vcpu, tsc in zip(vcpus, tscs, strict=True):
        apart = (tsc - tscs[0] + _WORD // 2) % _WORD - _WORD // 2
        due = tscs[0] + passed + (apart if abs(apart) >= hertz // 100 else 0)
        if offset is not None:
            vcpu.set_tsc_offset((offset + due - own) % _WORD)
            continue
        behind = int((time.monotonic() - now.monotonic) * hertz)
        if vcpu.set_msrs([(abi.MSR_TSC, (due + behind) % _WORD)]) != 1:
            raise KvmError(f"vCPU {vcpu.index}: KVM refused its TSC")
