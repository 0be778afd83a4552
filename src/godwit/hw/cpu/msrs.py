"""The MSRs of a vCPU's state: which belong to what the guest was told, and their names.

KVM lists what the host's CPU and its own version have. What a guest was not told of it cannot have
used, since KVM refuses a guest's access then (arch/x86/kvm/x86.c, kvm_get_msr_common and
kvm_set_msr_common; hyperv.c, hv_check_msr_access), and a destination may well lack.
"""

from __future__ import annotations

from collections.abc import Iterable

from godwit.host.kvm.cpuid import Entry

from .features import features, has

#: Intel SDM volume 4; AMD APM volume 2, appendix A; arch/x86/include/asm/msr-index.h.
_WORDS = (
    "10:TSC 11:KVM_WALL_CLOCK 12:KVM_SYSTEM_TIME 34:SMI_COUNT 3A:FEATURE_CONTROL "
    "3B:TSC_ADJUST 48:SPEC_CTRL 8B:UCODE_REV 9E:SMBASE CE:PLATFORM_INFO E1:UMWAIT_CONTROL "
    "10A:ARCH_CAPABILITIES 122:TSX_CTRL 140:MISC_FEATURES_ENABLES 174:SYSENTER_CS "
    "175:SYSENTER_ESP 176:SYSENTER_EIP 17A:MCG_STATUS 17B:MCG_CTL 1A0:MISC_ENABLE 1C4:XFD "
    "1C5:XFD_ERR 1D9:DEBUGCTL 1FC:POWER_CTL 277:PAT 345:PERF_CAPABILITIES 4D0:MCG_EXT_CTL "
    "6E0:TSC_DEADLINE D90:BNDCFGS DA0:XSS C0000080:EFER C0000081:STAR C0000082:LSTAR "
    "C0000083:CSTAR C0000084:SYSCALL_MASK C0000102:KERNEL_GS_BASE C0000103:TSC_AUX "
    "C0000104:AMD64_TSC_RATIO C0010015:K7_HWCR C0010117:VM_HSAVE_PA "
    "C001011F:AMD64_VIRT_SPEC_CTRL C0011029:AMD64_DE_CFG 4B564D00:KVM_WALL_CLOCK_NEW "
    "4B564D01:KVM_SYSTEM_TIME_NEW 4B564D02:KVM_ASYNC_PF_EN 4B564D03:KVM_STEAL_TIME "
    "4B564D04:KVM_PV_EOI_EN 4B564D05:KVM_POLL_CONTROL 4B564D06:KVM_ASYNC_PF_INT "
    "4B564D07:KVM_ASYNC_PF_ACK 4B564D08:KVM_MIGRATION_CONTROL"
)
_NAMES = {int(number, 16): name for number, name in (w.split(":") for w in _WORDS.split())}
_SPECULATION = (
    *("spec_ctrl", "intel_stibp", "ssbd", "ibrs", "ibpb", "amd_stibp", "amd_ssbd", "amd_psfd"),
)
#: MSRs, and the features of which a guest must have been told one to use them.
_OF_FEATURES: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = (
    ((0x48,), _SPECULATION),
    ((0xE1,), ("waitpkg",)),
    ((0x10A,), ("arch_capabilities",)),
    ((0x122,), ("arch_capabilities", "rtm")),
    ((0x1C4, 0x1C5), ("xfd",)),
    ((0x345,), ("pdcm",)),
    ((0x6E0,), ("tsc-deadline",)),
    ((0xD90,), ("mpx",)),
    ((0xDA0,), ("xsaves",)),
    ((0x6A0, 0x6A2, *range(0x6A4, 0x6A9)), ("shstk", "ibt")),
    ((*range(0x560, 0x562), *range(0x570, 0x573), *range(0x580, 0x588)), ("intel_pt",)),
    ((*range(0x480, 0x494),), ("vmx",)),
    ((0xC0000103,), ("rdtscp", "rdpid")),
    ((0xC0000104,), ("svm",)),
    ((0xC001011F,), ("virt_ssbd",)),
    ((*range(0xC0000300, 0xC0000304),), ("perfmon_v2",)),
    ((*range(0xC0010200, 0xC001020C),), ("perfctr_core",)),
)
_REQUIRED = {index: names for indices, names in _OF_FEATURES for index in indices}
#: Of Hyper-V's interface, of which no guest is told here (asm/hyperv-tlfs.h).
_HYPERV = range(0x40000000, 0x40000200)
#: Of Intel's architectural performance monitoring, leaf 0xA.
_PERFORMANCE = frozenset(
    (
        *range(0xC1, 0xD1),
        *range(0x186, 0x196),
        *range(0x309, 0x31A),
        *range(0x38D, 0x391),
        *range(0x4C1, 0x4D0),
        *(0x3F1, 0x3F2, 0x3F6, 0x1A6, 0x1A7),
    )
)


def told_of(indices: Iterable[int], entries: list[Entry]) -> list[int]:
    """Return the MSRs among ``indices`` that a guest with this CPUID can have used."""
    bits = features(entries)
    counters = any(entry[0] == 0xA and entry[3] & 0xFF for entry in entries)

    def can_use(index: int) -> bool:
        if index in _HYPERV:
            return False
        if index in _PERFORMANCE:
            return counters
        names = _REQUIRED.get(index)
        return names is None or any(has(bits, name) for name in names)

    return [index for index in indices if can_use(index)]


def named(index: int) -> str:
    """Return an MSR in hexadecimal, with the name if there is one."""
    name = _NAMES.get(index)
    return f"{index:#x} ({name})" if name else f"{index:#x}"
