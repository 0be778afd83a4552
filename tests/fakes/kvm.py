"""KVM's handles without a kernel, which keep all state given and note all calls.

A machine on these handles is a real one: board, vCPU threads, devices and saved state are the
product's. A fake vCPU's guest idles until a kick, or does the work that a test queues.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from godwit.host.kvm import abi
from godwit.host.kvm.cpuid import Entry
from godwit.host.kvm.handles import System, Vcpu, Vm

_RUN_SIZE = 3 * 4096
#: MSRs that the fake KVM lists: PAT, and one of a clock.
MSRS = (0x277, 0x4B564D00)


class Call(NamedTuple):
    """One call with its name and arguments."""

    name: str
    arguments: tuple[object, ...]


class FakeCpu(NamedTuple):
    """The CPU of a host, as KVM shows it."""

    cpuid: list[Entry] = [(1, 0, 0, 0, 0, 0, 0)]  # noqa: RUF012
    tsc_khz: int = 1_000_000
    #: True if KVM gives a TSC the rate that it is asked for.
    tsc_scaling: bool = True
    #: MSRs that KVM lists and has.
    msrs: tuple[int, ...] = MSRS
    #: MSRs that KVM has and does not list.
    unlisted_msrs: tuple[int, ...] = ()
    arch_capabilities: int = 0
    #: True if KVM refuses another CPUID than that of a host's own guests.
    stubborn: bool = False


class FakeVm(Vm):
    """A :class:`godwit.host.kvm.handles.Vm` without a kernel, with all calls in :attr:`calls`.

    As KVM, the fake refuses an irqfd or ioeventfd that is already assigned, and the removal of one
    that is not.
    """

    def __init__(self, cpu: FakeCpu | None = None) -> None:
        self.fd = -1
        self._cpu = cpu
        self._structs: dict[int, bytes] = {}
        self._clock_at = time.monotonic_ns()
        self.calls: list[Call] = []
        #: eventfd -> GSI
        self.irqfds: dict[int, int] = {}
        #: (address, bytes) -> eventfd
        self.ioeventfds: dict[tuple[int, int], int] = {}
        #: GSI -> (address, data)
        self.routes: dict[int, tuple[int, int]] = {}
        self.lines: dict[int, bool] = {}
        self.memory: dict[int, tuple[int, int, int, bool]] = {}
        #: slot -> the bitmap that the next :meth:`dirty_log` gives, and clears.
        self.dirty: dict[int, bytes] = {}

    def create_vcpu(self, index: int) -> FakeVcpu:
        """Return a new fake vCPU."""
        return FakeVcpu(index, self._cpu)

    def get(self, request: int, size: int, first: bytes = b"") -> bytes:
        """Return the struct that was set, or zeros (interrupt controllers by their number)."""
        key = request << 8 | (first[0] if first else 0)
        return self._structs.get(key, first.ljust(size, b"\0"))

    def set(self, request: int, data: bytes) -> int:
        """Keep a struct for :meth:`get`."""
        if request == abi.SET_IRQCHIP:
            self._structs[abi.GET_IRQCHIP << 8 | data[0]] = data
        elif request == abi.SET_PIT2:
            self._structs[abi.GET_PIT2 << 8] = data
        return 0

    def ioctl(self, request: int, argument: int = 0) -> int:
        """Answer KVM_GET_CLOCK, whose struct is at an address."""
        if request == abi.GET_CLOCK:
            now = time.monotonic_ns() - self._clock_at
            _store(argument, abi.CLOCK_DATA.pack(now, abi.CLOCK_REALTIME, 0, time.time_ns(), 0))
        return 0

    def set_clock(self, clock: int) -> None:
        """Set the guest's clock, nanoseconds."""
        self._clock_at = time.monotonic_ns() - clock

    def dirty_log(self, slot: int, bitmap_address: int) -> None:
        """Give the slot's bitmap from :attr:`dirty`, once."""
        bitmap = self.dirty.pop(slot, b"")
        if bitmap:
            _store(bitmap_address, bitmap)

    def count(self, name: str) -> int:
        """Return how often a method was called."""
        return sum(call.name == name for call in self.calls)

    def set_memory(self, slot: int, address: int, size: int, host: int, log: bool) -> None:
        """Note a memory slot's settings."""
        self._note("set_memory", slot, address, size, host, log)
        self.memory[slot] = (address, size, host, log)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Note an interrupt line's level."""
        self._note("irq_line", gsi, level)
        self.lines[gsi] = level

    def set_routes(self, msi: Iterable[tuple[int, int, int]]) -> None:
        """Note the MSI routes, which replace the old ones."""
        routes = {gsi: (address, data) for gsi, address, data in msi}
        self._note("set_routes", routes)
        self.routes = routes

    def irqfd(self, fd: int, gsi: int, assign: bool) -> None:
        """Note an irqfd, assigned or removed."""
        self._note("irqfd", fd, gsi, assign)
        if (fd in self.irqfds) == assign:
            raise OSError(f"irqfd {fd}: assign={assign}, but it is {self.irqfds.get(fd)}")
        if assign:
            self.irqfds[fd] = gsi
        else:
            del self.irqfds[fd]

    def ioeventfd(self, fd: int, address: int, length: int, assign: bool) -> None:
        """Note an ioeventfd, assigned or removed."""
        self._note("ioeventfd", fd, address, length, assign)
        key = (address, length)
        if (key in self.ioeventfds) == assign:
            raise OSError(f"ioeventfd at {address:#x}: assign={assign}")
        if assign:
            self.ioeventfds[key] = fd
        else:
            del self.ioeventfds[key]

    def _note(self, name: str, *arguments: object) -> None:
        self.calls.append(Call(name, arguments))


class FakeVcpu(Vcpu):
    """A :class:`godwit.host.kvm.handles.Vcpu` whose guest idles until a kick.

    Attributes:
        exits: the guest's next actions, each a call in the vCPU's thread.
        structs: request -> the struct that was set.
        tsc_hertz: of the guest's TSC, which follows the host's time.
        cpuid: the entries that were set last.
    """

    tsc_hertz = 1_000_000_000

    def __init__(self, index: int, cpu: FakeCpu | None = None) -> None:
        self.fd = -1
        self._cpu = cpu or FakeCpu()
        self.tsc_hertz = self._cpu.tsc_khz * 1000
        self.cpuid: list[Entry] = []
        self.index = index
        self.run_page = mmap.mmap(-1, _RUN_SIZE)
        self.xsave_size = abi.XSAVE_SIZE
        self.exits: deque[Callable[[], None]] = deque()
        self.structs: dict[int, bytes] = {}
        self.msrs: dict[int, int] = dict.fromkeys((*self._cpu.msrs, *self._cpu.unlisted_msrs), 0)
        self._offset = 0
        self._kicked = threading.Condition()

    def run(self) -> None:
        """Do the work that a test has queued, or idle until a kick."""
        with self._kicked:
            self._kicked.wait_for(
                lambda: self.exits or self.run_page[abi.RUN_IMMEDIATE_EXIT], timeout=60
            )
            if self.run_page[abi.RUN_IMMEDIATE_EXIT]:
                raise InterruptedError
            work = self.exits.popleft()
        work()

    def kick(self, thread: int | None) -> None:
        """Have :meth:`run` return to its caller."""
        with self._kicked:
            self.run_page[abi.RUN_IMMEDIATE_EXIT] = 1
            self._kicked.notify_all()

    def do(self, work: Callable[[], None]) -> None:
        """Have the guest do ``work`` next, which fills the shared page."""
        with self._kicked:
            self.exits.append(work)
            self._kicked.notify_all()

    def out(self, port: int, value: int) -> None:
        """Have the guest write a byte to a port next."""

        def exit_for_port() -> None:
            page = memoryview(self.run_page)
            page[abi.RUN_EXIT_REASON : abi.RUN_EXIT_REASON + 4] = abi.EXIT_IO.to_bytes(4, "little")
            abi.RUN_IO.pack_into(page, abi.RUN_UNION, 1, 1, port, 1, 4096)
            page[4096] = value
            page.release()

        self.do(exit_for_port)

    def get(self, request: int, size: int, first: bytes = b"") -> bytes:
        """Return the struct that was set, or zeros."""
        return self.structs.get(_SET_OF.get(request, request), bytes(size))

    def set(self, request: int, data: bytes) -> int:
        """Keep a struct for :meth:`get`."""
        self.structs[request] = data
        return 0

    def set_cpuid(self, entries: Iterable[Entry]) -> None:
        """Keep a guest's CPUID entries."""
        if self.cpuid and self._cpu.stubborn:
            raise OSError(22, "Invalid argument")
        self.cpuid = list(entries)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC's rate, or, as KVM where it cannot scale one, only take it."""
        if self._cpu.tsc_scaling:
            self.tsc_hertz = khz * 1000

    def ioctl(self, request: int, argument: int = 0) -> int:
        """Answer KVM_GET_MSRS of the TSC, whose struct is at an address."""
        if request == abi.GET_MSRS:
            entry = abi.MSR_ENTRY.pack(abi.MSR_TSC, 0, self.tsc())
            _store(argument, abi.MSRS_HEADER.pack(1, 0) + entry)
            return 1
        if request == abi.GET_TSC_KHZ and not self.tsc_hertz:
            raise OSError(5, "Input/output error")
        if request == abi.GET_TSC_KHZ:
            return self.tsc_hertz // 1000
        return 0

    def tsc(self) -> int:
        """Return the guest's present TSC."""
        return time.monotonic_ns() * self.tsc_hertz // 10**9 + self._offset & (1 << 64) - 1

    def tsc_offset(self) -> int | None:
        """Return how far the guest's TSC is ahead of the host's."""
        return self._offset & (1 << 64) - 1

    def set_tsc_offset(self, offset: int) -> None:
        """Set how far the guest's TSC is ahead of the host's."""
        self._offset = offset

    def get_msrs(self, indices: list[int]) -> list[tuple[int, int]]:
        """Return (index, value) of MSRs up to the first that is not there."""
        found = []
        for index in indices:
            if index not in self.msrs:
                break
            found.append((index, self.msrs[index]))
        return found

    def set_msrs(self, msrs: list[tuple[int, int]]) -> int:
        """Set MSRs, and return how many were taken."""
        for count, (index, value) in enumerate(msrs):
            if index not in self.msrs:
                return count
            self.msrs[index] = value
        return len(msrs)


#: KVM's requests that read -> the requests that write the same.
_SET_OF = {
    abi.GET_REGS: abi.SET_REGS,
    abi.GET_SREGS: abi.SET_SREGS,
    abi.GET_XSAVE: abi.SET_XSAVE,
    abi.GET_XCRS: abi.SET_XCRS,
    abi.GET_LAPIC: abi.SET_LAPIC,
    abi.GET_MP_STATE: abi.SET_MP_STATE,
    abi.GET_VCPU_EVENTS: abi.SET_VCPU_EVENTS,
    abi.GET_DEBUGREGS: abi.SET_DEBUGREGS,
}


class FakeSystem(System):
    """A :class:`godwit.host.kvm.handles.System` without a kernel, with its VMs in :attr:`vms`."""

    def __init__(self, cpu: FakeCpu | None = None) -> None:
        self.fd = -1
        self.cpu = cpu or FakeCpu()
        self.vcpu_mmap_size = _RUN_SIZE
        self.vms: list[FakeVm] = []

    def check(self, capability: int) -> int:
        """Return 1 for every capability but the larger XSAVE, and TSC scaling as the CPU has it."""
        if capability == abi.CAP_TSC_CONTROL:
            return int(self.cpu.tsc_scaling)
        return 0 if capability == abi.CAP_XSAVE2 else 1

    def create_vm(self) -> FakeVm:
        """Return a new fake VM."""
        self.vms.append(FakeVm(self.cpu))
        return self.vms[-1]

    def supported_cpuid(self) -> list[Entry]:
        """Return the host's CPUID."""
        return list(self.cpu.cpuid)

    def feature_msr(self, index: int) -> int:
        """Return the host's ARCH_CAPABILITIES, and 0 for other MSRs."""
        return self.cpu.arch_capabilities if index == abi.MSR_ARCH_CAPABILITIES else 0

    def msr_indices(self) -> list[int]:
        """Return the MSRs of the fake vCPUs, the TSC, and one that no vCPU has."""
        return [*self.cpu.msrs, abi.MSR_TSC, 0xDEAD]


def _store(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))
