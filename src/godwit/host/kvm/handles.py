"""The three handles of KVM (the system, a VM, a vCPU), each closed by a ``with``."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from collections.abc import Iterable
from functools import lru_cache
from typing import Self

from godwit.errors import HostError, KvmError
from godwit.host.ioctl import address_of, ioctl, ioctl_in, ioctl_out

from . import abi
from .probe import why_unusable

_NEEDED = {
    abi.CAP_IRQCHIP: "an in-kernel interrupt controller",
    abi.CAP_USER_MEMORY: "user memory regions",
    abi.CAP_IRQFD: "irqfd",
    abi.CAP_IOEVENTFD: "ioeventfd",
    abi.CAP_PIT2: "an in-kernel PIT",
    abi.CAP_XSAVE: "XSAVE state",
    abi.CAP_IMMEDIATE_EXIT: "immediate_exit (Linux 4.13 or later)",
}

#: Interrupts a vCPU's thread in KVM_RUN.
KICK_SIGNAL = signal.SIGUSR1

#: Where KVM keeps three pages of its own on Intel, and one more; under the 4 GiB line, above the
#: I/O APIC, where no device is.
_TSS_ADDRESS = 0xFFFBD000
_IDENTITY_MAP_ADDRESS = 0xFFFBC000


@lru_cache(maxsize=8)
def msr_query(indices: tuple[int, ...]) -> bytes:
    """Return the struct of a KVM_GET_MSRS request, which KVM fills in."""
    entries = [abi.MSR_ENTRY.pack(index, 0, 0) for index in indices]
    return abi.MSRS_HEADER.pack(len(indices), 0) + b"".join(entries)


def _tsc_attribute(value: bytearray) -> bytes:
    return abi.DEVICE_ATTR.pack(0, *abi.VCPU_TSC_OFFSET, address_of(value))


class _Handle:
    """A descriptor that is closed exactly once.

    All methods of a handle raise OSError when the kernel refuses.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor, unless closed already."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ioctl(self, request: int, argument: int = 0) -> int:
        """Call ioctl with an integer or an address. Raises OSError."""
        return ioctl(self.fd, request, argument)

    def get(self, request: int, size: int, first: bytes = b"") -> bytes:
        """Read a struct of ``size`` bytes, in which ``first`` fills the beginning (an id, say)."""
        buffer = bytearray(size)
        buffer[: len(first)] = first
        ioctl_out(self.fd, request, buffer)
        return bytes(buffer)

    def set(self, request: int, data: bytes) -> int:
        """Pass a struct to the kernel and return the result."""
        return ioctl_in(self.fd, request, data)


class System(_Handle):
    """A handle of KVM itself, ``/dev/kvm``.

    Raises:
        HostError: KVM is missing or cannot run stock kernels; the message names the remedy.
    """

    def __init__(self, device: str = "/dev/kvm") -> None:
        reason = why_unusable(device)
        if reason is not None:
            raise HostError(reason)
        super().__init__(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        for capability, what in _NEEDED.items():
            if not self.check(capability):
                self.close()
                raise HostError(f"this host's KVM lacks {what}; a newer kernel has it")
        self.vcpu_mmap_size = self.ioctl(abi.GET_VCPU_MMAP_SIZE)

    def check(self, capability: int) -> int:
        """Return the answer to KVM_CHECK_EXTENSION, 0 for absent."""
        return self.ioctl(abi.CHECK_EXTENSION, capability)

    def create_vm(self) -> Vm:
        """Make a new VM with interrupt controllers and PIT."""
        return Vm(self)

    def supported_cpuid(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """Return the CPUID entries KVM offers: function, index, flags, eax, ebx, ecx, edx."""
        count = 256
        raw = self.get(
            abi.GET_SUPPORTED_CPUID,
            abi.CPUID_HEADER.size + count * abi.CPUID_ENTRY.size,
            abi.CPUID_HEADER.pack(count, 0),
        )
        used, _ = abi.CPUID_HEADER.unpack_from(raw)
        start = abi.CPUID_HEADER.size
        return [
            abi.CPUID_ENTRY.unpack_from(raw, start + i * abi.CPUID_ENTRY.size) for i in range(used)
        ]

    def feature_msr(self, index: int) -> int:
        """Return the value of an MSR with features as KVM shows it to a guest, 0 without one."""
        buffer = bytearray(msr_query((index,)))
        try:
            got = ioctl_out(self.fd, abi.GET_MSRS, buffer)
        except OSError:  # before Linux 4.17
            return 0
        return int.from_bytes(buffer[-8:], "little") if got == 1 else 0

    def msr_indices(self) -> list[int]:
        """Return the indices of the MSRs that make up a vCPU's state."""
        count = 1024
        raw = self.get(abi.GET_MSR_INDEX_LIST, 4 + 4 * count, count.to_bytes(4, "little"))
        used = int.from_bytes(raw[:4], "little")
        return list(memoryview(raw)[4 : 4 + 4 * used].cast("I"))


class Vm(_Handle):
    """A VM with memory slots, interrupt routes and a clock."""

    def __init__(self, system: System) -> None:
        self.system = system
        try:
            super().__init__(system.ioctl(abi.CREATE_VM))
        except OSError as error:
            raise KvmError(f"KVM could not make a VM: {error}") from error
        try:
            self.ioctl(abi.SET_TSS_ADDR, _TSS_ADDRESS)
            self.set(abi.SET_IDENTITY_MAP_ADDR, _IDENTITY_MAP_ADDRESS.to_bytes(8, "little"))
            self.ioctl(abi.CREATE_IRQCHIP)
            self.set(abi.CREATE_PIT2, abi.PIT_CONFIG.pack(abi.PIT_SPEAKER_DUMMY))
        except OSError as error:
            self.close()
            raise KvmError(f"KVM could not make a VM: {error}") from error

    def create_vcpu(self, index: int) -> Vcpu:
        """Make vCPU ``index``, which has the same number as APIC id."""
        return Vcpu(self.ioctl(abi.CREATE_VCPU, index), index, self.system)

    def set_memory(self, slot: int, address: int, size: int, host: int, log: bool) -> None:
        """Back ``size`` bytes at guest address ``address`` by host address ``host``."""
        flags = abi.MEM_LOG_DIRTY_PAGES if log else 0
        self.set(
            abi.SET_USER_MEMORY_REGION,
            abi.MEMORY_REGION.pack(slot, flags, address, size, host),
        )

    def dirty_log(self, slot: int, bitmap_address: int) -> None:
        """Read and clear the dirty bitmap of ``slot``: a bit per 4 KiB page, u64 little endian."""
        self.set(abi.GET_DIRTY_LOG, abi.DIRTY_LOG.pack(slot, 0, bitmap_address))

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set the level of interrupt line ``gsi``."""
        self.set(abi.IRQ_LINE, abi.IRQ_LEVEL.pack(gsi, level))

    def set_routes(self, msi: Iterable[tuple[int, int, int]]) -> None:
        """Set the routing table: the fixed lines, and MSIs as ``(gsi, address, data)``.

        Lines 0-15 reach both PICs and the I/O APIC, 16-23 the I/O APIC alone, as KVM's own default
        has it (arch/x86/kvm/irq_comm.c).
        """
        chip = abi.ROUTING_IRQCHIP.pack
        kind = abi.ROUTING_TYPE_IRQCHIP
        entries = [chip(pin, kind, 0, 0, abi.IRQCHIP_IOAPIC, pin) for pin in range(24)]
        entries += [chip(pin, kind, 0, 0, pin // 8, pin % 8) for pin in range(16)]
        entries += [
            abi.ROUTING_MSI.pack(
                gsi, abi.ROUTING_TYPE_MSI, 0, 0, address & 0xFFFFFFFF, address >> 32, data, 0
            )
            for gsi, address, data in msi
        ]
        self.set(abi.SET_GSI_ROUTING, abi.ROUTING_HEADER.pack(len(entries), 0) + b"".join(entries))

    def irqfd(self, fd: int, gsi: int, assign: bool) -> None:
        """Connect eventfd ``fd`` to interrupt ``gsi``, or disconnect the eventfd."""
        flags = 0 if assign else abi.IRQFD_FLAG_DEASSIGN
        self.set(abi.KVM_IRQFD, abi.IRQFD.pack(fd, gsi, flags, 0))

    def ioeventfd(self, fd: int, address: int, length: int, assign: bool) -> None:
        """Connect guest writes at MMIO ``address`` to eventfd ``fd``, or disconnect the eventfd."""
        flags = 0 if assign else abi.IOEVENTFD_FLAG_DEASSIGN
        self.set(abi.KVM_IOEVENTFD, abi.IOEVENTFD.pack(0, address, length, fd, flags))

    def set_clock(self, clock: int) -> None:
        """Set the guest's clock in nanoseconds, which runs on even while vCPUs do not."""
        self.set(abi.SET_CLOCK, abi.CLOCK_DATA.pack(clock, 0, 0, 0, 0))


class Vcpu(_Handle):
    """A vCPU and the shared ``kvm_run`` page."""

    def __init__(self, fd: int, index: int, system: System) -> None:
        super().__init__(fd)
        self.index = index
        self.run_page = mmap.mmap(fd, system.vcpu_mmap_size)
        size = system.check(abi.CAP_XSAVE2)
        self.xsave_size = max(size, abi.XSAVE_SIZE)

    def run(self) -> None:
        """Run the guest until an exit, which the shared page describes (KVM_RUN).

        ``fcntl.ioctl`` releases the GIL, as its argument is an integer.

        Raises:
            InterruptedError: a signal came, or :meth:`kick`.
            OSError: KVM cannot run the guest.
        """
        fcntl.ioctl(self.fd, abi.RUN, 0)

    def kick(self, thread: int | None) -> None:
        """Have :meth:`run` return, also before its start. ``thread`` is the one inside, if any."""
        self.run_page[abi.RUN_IMMEDIATE_EXIT] = 1
        if thread is not None:
            signal.pthread_kill(thread, KICK_SIGNAL)

    def close(self) -> None:
        """Close the descriptor and unmap the shared page."""
        if self.fd >= 0:
            self.run_page.close()
        super().close()

    def set_cpuid(self, entries: Iterable[tuple[int, int, int, int, int, int, int]]) -> None:
        """Set the CPUID entries, before the vCPU runs first."""
        packed = [abi.CPUID_ENTRY.pack(*entry) for entry in entries]
        self.set(abi.SET_CPUID2, abi.CPUID_HEADER.pack(len(packed), 0) + b"".join(packed))

    def tsc_khz(self) -> int:
        """Return the frequency of the guest's TSC in kilohertz."""
        return self.ioctl(abi.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the frequency of the guest's TSC in kilohertz.

        Where KVM lacks CAP_TSC_CONTROL, a higher one is taken and not given
        (arch/x86/kvm/x86.c, set_tsc_khz).
        """
        self.ioctl(abi.SET_TSC_KHZ, khz)

    def get_msrs(self, indices: list[int]) -> list[tuple[int, int]]:
        """Return (index, value) of the MSRs before the first KVM cannot read."""
        buffer = bytearray(msr_query(tuple(indices)))
        got = ioctl_out(self.fd, abi.GET_MSRS, buffer)
        start, size = abi.MSRS_HEADER.size, abi.MSR_ENTRY.size
        entries = abi.MSR_ENTRY.iter_unpack(memoryview(buffer)[start : start + got * size])
        return [(index, value) for index, _, value in entries]

    def readable_msrs(self, indices: list[int]) -> list[int]:
        """Return which of ``indices`` KVM can read: KVM lists some this CPU lacks."""
        readable: list[int] = []
        left = list(indices)
        while left:
            got = self.get_msrs(left)
            readable += [index for index, _ in got]
            left = left[len(got) + 1 :]
        return readable

    def tsc(self) -> int:
        """Return the guest's TSC as of now.

        Raises:
            KvmError: KVM does not report the TSC.
        """
        msrs = self.get_msrs([abi.MSR_TSC])
        if not msrs:
            raise KvmError(f"vCPU {self.index}: its TSC could not be read")
        return msrs[0][1]

    def tsc_offset(self) -> int | None:
        """Return how far the guest's TSC is ahead of the host's, modulo 2**64.

        None: KVM does not report the offset (before Linux 5.16).
        """
        value = bytearray(8)
        try:
            self.set(abi.GET_DEVICE_ATTR, _tsc_attribute(value))
        except OSError:
            return None
        return int.from_bytes(value, "little")

    def set_tsc_offset(self, offset: int) -> None:
        """Set the TSC offset, which is exact however long the call takes, unlike a written TSC.

        Where KVM calls the host's own TSC unstable, and makes up for the drift, no offset is exact.
        """
        value = bytearray(offset.to_bytes(8, "little"))
        self.set(abi.SET_DEVICE_ATTR, _tsc_attribute(value))

    def set_msrs(self, msrs: list[tuple[int, int]]) -> int:
        """Set MSRs in order and return how many KVM took."""
        entries = b"".join(abi.MSR_ENTRY.pack(index, 0, value) for index, value in msrs)
        return self.set(abi.SET_MSRS, abi.MSRS_HEADER.pack(len(msrs), 0) + entries)
