"""The board: RAM, vCPUs and empty buses, all that a guest's first instructions need.

This module imports little, because a booting guest waits for these imports alone. A bzImage spends
its first second on an emulated CPU, 0.1 s on a real one, unpacking itself, and leaves the guest for
nothing: meanwhile the rest of Godwit is imported, and devices and NICs are made
(:meth:`Board.start_early`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

from godwit.errors import ConfigError, KvmError
from godwit.host.kvm import abi
from godwit.host.kvm.cpuid import guest_cpuid
from godwit.host.kvm.handles import System, Vcpu, Vm
from godwit.hw import acpi
from godwit.hw import boot as linuxboot
from godwit.hw.bus import MmioBus, PortBus
from godwit.hw.memory import GuestMemory
from godwit.spec.config import VmConfig

from .vcpu import StopReason, VcpuThread


class Board:
    """A machine without devices, whose vCPUs' threads wait.

    Raises:
        HostError: KVM is missing.
        ConfigError: the host does not give the memory.
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
            vcpus = self.make_vcpus(self.vm, undo)
            #: Indices of the MSRs that make up a vCPU's state here; the TSC is a clock.
            listed = [index for index in self.system.msr_indices() if index != abi.MSR_TSC]
            self.msrs = vcpus[0].readable_msrs(listed)
            self.vcpus = [
                VcpuThread(vcpu, self.ports, self.mmio, self._vcpu_exited) for vcpu in vcpus
            ]
            for thread in self.vcpus:
                thread.start()
                undo.callback(thread.stop)
            self._files = linuxboot.BootFiles()
            undo.callback(self._files.close)
            self._undo = undo.pop_all()

    def make_vcpus(self, vm: Vm, undo: ExitStack) -> list[Vcpu]:
        """Make the vCPUs of this configuration for ``vm``, to be closed by ``undo``.

        Raises:
            KvmError: the host does not give the vCPUs.
        """
        supported = self.system.supported_cpuid()
        deadline = bool(self.system.check(abi.CAP_TSC_DEADLINE_TIMER))
        vcpus = []
        try:
            for index in range(self.config.cpus):
                vcpu = undo.enter_context(vm.create_vcpu(index))
                vcpu.set_cpuid(guest_cpuid(supported, index, self.config.cpus, deadline))
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
        acpi.write_tables(self.memory, config.cpus)
        boot = linuxboot.load(
            self.memory, config.kernel, config.initrd, config.command_line, self._files
        )
        linuxboot.start_vcpu(self.vcpus[0].vcpu, boot)

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
