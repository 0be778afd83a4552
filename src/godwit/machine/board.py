"""The board: RAM, vCPUs and empty buses, all that a guest's first instructions need.

This module imports little, because a booting guest waits for these imports alone. A bzImage spends
its first second on an emulated CPU, 0.1 s on a real one, unpacking itself, and leaves the guest for
nothing: meanwhile the rest of Godwit is imported, and devices and NICs are made
(:meth:`Board.start_early`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Self

from godwit.errors import ConfigError, KvmError
from godwit.host.kvm import abi
from godwit.host.kvm.cpuid import Entry, for_vcpu, guest_cpuid
from godwit.host.kvm.handles import System, Vcpu, Vm
from godwit.hw import acpi, smbios
from godwit.hw import boot as linuxboot
from godwit.hw.bus import MmioBus, PortBus
from godwit.hw.memory import GuestMemory
from godwit.spec.config import HOST_CPU, VmConfig

from .vcpu import StopReason, VcpuThread


class Board:
    """A machine without devices, whose vCPUs' threads wait.

    Attributes:
        cpuid: the CPUID of the guest's first vCPU.
        readable_msrs: indices of the MSRs of a vCPU's state here, but for the TSC.
        host_tsc_khz: the rate of a TSC here, unless scaled; 0: not known.
        tsc_khz: the rate the guest was told, perhaps on another host.
        xsave_components: the XSAVE components a guest from elsewhere was told of; a bit each.

    Raises:
        HostError: KVM is missing, or the host lacks what the guest's CPU has.
        ConfigError: the host does not give the memory, or the guest's CPU is not understood.
    """

    def __init__(self, config: VmConfig, open_kvm: Callable[[], System] = System) -> None:
        self.config = config
        #: Called in a vCPU's thread when it will not go on; set before the devices are there.
        self.on_exit: Callable[[StopReason, str], None] = lambda reason, detail: None
        with ExitStack() as undo:
            self.system = undo.enter_context(open_kvm())
            self.memory = GuestMemory(config.memory, shared=config.shared_memory)
            undo.callback(self.memory.close)
            self.vm = undo.enter_context(self.system.create_vm())
            self.set_dirty_log(False)
            self.ports, self.mmio = PortBus(), MmioBus()
            self.cpuid = self._chosen_cpuid()
            vcpus = self.make_vcpus(self.vm, undo)
            #: The TSC is a clock.
            self._listed = [index for index in self.system.msr_indices() if index != abi.MSR_TSC]
            self.readable_msrs = vcpus[0].readable_msrs(self._listed)
            self._msrs: list[int] | None = None
            self.xsave_components: int | None = None
            #: The MSR of that name as a guest from elsewhere was told.
            self.arch_capabilities: int | None = None
            # Once the guest runs, its vCPUs answer nobody else.
            self.host_tsc_khz = self.tsc_khz = _tsc_khz(vcpus[0])
            self.vcpus = [
                VcpuThread(vcpu, self.ports, self.mmio, self._vcpu_exited) for vcpu in vcpus
            ]
            for thread in self.vcpus:
                thread.start()
                undo.callback(thread.stop)
            self._files = linuxboot.BootFiles()
            undo.callback(self._files.close)
            self._undo = undo.pop_all()

    def offered_cpuid(self) -> list[Entry]:
        """Return the CPUID of the first vCPU with all this host offers."""
        deadline = bool(self.system.check(abi.CAP_TSC_DEADLINE_TIMER))
        return guest_cpuid(self.system.supported_cpuid(), 0, self.config.cpus, deadline)

    def _chosen_cpuid(self) -> list[Entry]:
        offered, cpu = self.offered_cpuid(), self.config.cpu
        if cpu.model == HOST_CPU and not cpu.off:
            return offered
        from godwit.hw.cpu.choice import chosen  # its tables only if they are asked for

        return chosen(cpu, offered, self.config.cpus)

    @property
    def msrs(self) -> list[int]:
        """Indices of the MSRs of a vCPU's state for this guest, but for the TSC."""
        if self._msrs is None:
            from godwit.hw.cpu.msrs import told_of  # for a migration alone

            self._msrs = told_of(self.readable_msrs, self.cpuid)
        return self._msrs

    def adopt_cpu(self, cpuid: list[Entry], tsc_khz: int) -> None:
        """Give the vCPUs, none of which has run, the CPUID a guest was told elsewhere.

        Raises:
            OSError: KVM refuses the CPUID.
        """
        self.cpuid, self.tsc_khz = cpuid, tsc_khz
        for index, thread in enumerate(self.vcpus):
            thread.vcpu.set_cpuid(for_vcpu(cpuid, index))
        # Some MSRs are there by what the guest was told.
        self.readable_msrs = self.vcpus[0].vcpu.readable_msrs(self._listed)
        self._msrs = None

    def make_vcpus(self, vm: Vm, undo: ExitStack) -> list[Vcpu]:
        """Make the vCPUs of this configuration for ``vm``, to be closed by ``undo``.

        Raises:
            KvmError: the host does not give the vCPUs.
        """
        vcpus = []
        try:
            for index in range(self.config.cpus):
                vcpu = undo.enter_context(vm.create_vcpu(index))
                vcpu.set_cpuid(for_vcpu(self.cpuid, index))
                vcpus.append(vcpu)
        except OSError as error:
            raise KvmError(f"KVM could not make vCPU {len(vcpus)}: {error}") from error
        return vcpus

    def boot(self) -> None:
        """Load kernel, initrd and tables, and put the first vCPU at the kernel's entry.

        Raises:
            ConfigError: no kernel was given, or the kernel cannot be loaded.
        """
        config = self.config
        if config.kernel is None:
            raise ConfigError("there is nothing to boot; give --kernel, or --incoming")
        acpi.write_tables(self.memory, config.cpus, config.machine.informs)
        if config.machine.informs:
            smbios.write_tables(self.memory, config.system, config.machine.name)
        boot = linuxboot.load(
            self.memory, config.kernel, config.initrd, config.command_line, self._files
        )
        linuxboot.start_vcpu(self.vcpus[0].vcpu, boot)

    def keep_files(self) -> None:
        """Open kernel and initrd for a boot to come, if they can be opened."""
        for path in (self.config.kernel, self.config.initrd):
            if path is not None:
                with suppress(OSError, ValueError):  # the boot will name what is wrong
                    self._files.keep(path)

    def start_early(self) -> None:
        """Let the first vCPU run up to its first exit, which waits for the machine's start.

        Nothing of this is seen outside, and of what KVM serves by itself only clocks run.
        """
        self.vcpus[0].start_early()

    def set_dirty_log(self, on: bool) -> None:
        """Switch KVM's log of the guest's writes on or off."""
        for region in self.memory.regions:
            self.vm.set_memory(region.slot, region.start, region.size, region.host, on)

    def _vcpu_exited(self, reason: StopReason, detail: str) -> None:
        self.on_exit(reason, detail)

    def stop(self) -> None:
        """End the threads of all vCPUs. Harmless the second time."""
        for thread in self.vcpus:
            thread.stop()

    def close(self) -> None:
        """Stop, and give everything back. Harmless the second time."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _tsc_khz(vcpu: Vcpu) -> int:
    try:
        return vcpu.tsc_khz()
    except OSError:
        return 0  # the host's TSC is unstable (Documentation/virt/kvm/api.rst, 4.56)
