"""A host's CPU, described without a guest."""

from __future__ import annotations

from contextlib import ExitStack

from godwit.errors import KvmError
from godwit.host.kvm import abi
from godwit.host.kvm.cpuid import guest_cpuid
from godwit.host.kvm.handles import System

from .description import Cpu
from .msrs import told_of


def describe(system: System) -> Cpu:
    """Return the most this host can tell a guest, as for a guest with one vCPU.

    Raises:
        KvmError: KVM does not show what a vCPU is like.
    """
    listed = [index for index in system.msr_indices() if index != abi.MSR_TSC]  # a clock
    deadline = bool(system.check(abi.CAP_TSC_DEADLINE_TIMER))
    entries = guest_cpuid(system.supported_cpuid(), 0, 1, deadline)
    try:
        with ExitStack() as undo:
            vcpu = undo.enter_context(undo.enter_context(system.create_vm()).create_vcpu(0))
            vcpu.set_cpuid(entries)
            return Cpu(
                cpuid=entries,
                tsc_khz=vcpu.tsc_khz(),
                tsc_scaling=bool(system.check(abi.CAP_TSC_CONTROL)),
                msrs=told_of(vcpu.readable_msrs(listed), entries),
                arch_capabilities=system.feature_msr(abi.MSR_ARCH_CAPABILITIES),
            )
    except OSError as error:
        raise KvmError(f"KVM does not show what a vCPU is like: {error}") from error
