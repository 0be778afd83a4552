"""The guest's CPU on the way to another host: described, compared, and adopted.

Nothing of this is imported before a migration needs it.
"""

from __future__ import annotations

from godwit.errors import StreamError
from godwit.host.kvm import abi
from godwit.host.kvm.cpuid import Entry
from godwit.hw.cpu import xsave
from godwit.hw.cpu.compare import TSC_PPM, lacks, lacks_capabilities, lacks_msrs, same_rate
from godwit.hw.cpu.description import Cpu, check_entries
from godwit.hw.cpu.features import features, has

from .board import Board

_ARCH_CAPABILITIES = "arch_capabilities"


def describe(board: Board) -> Cpu:
    """Return the guest's CPU as the guest was told, from any thread and while the guest runs."""
    return Cpu(
        cpuid=board.cpuid,
        tsc_khz=board.tsc_khz,
        tsc_scaling=_scales(board),
        msrs=board.msrs,
        arch_capabilities=_arch_capabilities(board),
    )


def problems(board: Board, cpu: Cpu) -> list[str]:
    """Return what a guest was told of ``cpu`` and this host cannot give, a sentence each.

    Raises:
        StreamError: the description is not one of a CPU.
    """
    check_entries(cpu.cpuid)
    found = lacks(cpu.cpuid, board.offered_cpuid())
    if has(features(cpu.cpuid), _ARCH_CAPABILITIES):
        here = board.system.feature_msr(abi.MSR_ARCH_CAPABILITIES)
        found += lacks_capabilities(cpu.arch_capabilities, here)
    found += lacks_msrs(cpu.msrs, _settable_msrs(board, cpu.msrs))
    rate = _rate_problem(board, cpu)
    return [*found, rate] if rate else found


def adopt(board: Board, cpu: Cpu) -> None:
    """Give the vCPUs the CPU the guest was told, before any of its state is loaded.

    Raises:
        StreamError: KVM does not take the CPUID, or the rate of the TSC.
    """
    board.arch_capabilities = cpu.arch_capabilities
    board.xsave_components = xsave.layout(cpu.cpuid).user
    try:
        board.adopt_cpu(cpu.cpuid, cpu.tsc_khz)
    except OSError as error:
        raise StreamError(f"KVM refused the CPUID that the guest was told: {error}") from error
    if cpu.tsc_khz and _scales(board):
        # Whatever the rate is now: a source may have come before, and gone.
        _scale(board, cpu.tsc_khz)


def _settable_msrs(board: Board, asked: list[int]) -> list[int]:
    """Return the MSRs KVM lists here, and of the others asked for the ones KVM has as well."""
    unlisted = [index for index in asked if index not in board.readable_msrs]
    return [*board.readable_msrs, *board.vcpus[0].vcpu.readable_msrs(unlisted)]


def _scale(board: Board, khz: int) -> None:
    for thread in board.vcpus:
        vcpu = thread.vcpu
        try:
            if same_rate(khz, vcpu.tsc_khz()):
                continue
            vcpu.set_tsc_khz(khz)
            got = vcpu.tsc_khz()
        except OSError as error:
            raise StreamError(
                f"vCPU {vcpu.index}: KVM refused a TSC of {khz} kHz: {error}"
            ) from error
        if not same_rate(khz, got):
            raise StreamError(f"vCPU {vcpu.index}: KVM made the TSC {got} kHz instead of {khz}")


def _arch_capabilities(board: Board) -> int:
    if board.arch_capabilities is not None:
        return board.arch_capabilities
    if not has(features(board.cpuid), _ARCH_CAPABILITIES):
        return 0
    return board.system.feature_msr(abi.MSR_ARCH_CAPABILITIES)


def _scales(board: Board) -> bool:
    return bool(board.system.check(abi.CAP_TSC_CONTROL))


def _rate_problem(board: Board, cpu: Cpu) -> str | None:
    known = cpu.tsc_khz and board.host_tsc_khz
    if not known or same_rate(cpu.tsc_khz, board.host_tsc_khz) or _scales(board):
        return None
    relied_on = _relied_on(cpu.cpuid)
    if not relied_on:
        return None
    return (
        f"the guest was told {relied_on}, and its TSC has {cpu.tsc_khz} kHz, this host's has "
        f"{board.host_tsc_khz} kHz and its KVM cannot scale it (up to {TSC_PPM} ppm do no harm); "
        "start the guest with --cpu host,invtsc=off or with a baseline"
    )


def _relied_on(entries: list[Entry]) -> str:
    """Return the features by which a guest may count on the TSC's rate."""
    bits = features(entries)
    names = [name for name in ("invtsc", "tsc-deadline") if has(bits, name)]
    return " and ".join(name.upper() for name in names)
