"""CPUID of a vCPU: the features KVM offers, less nesting, with the guest's own topology.

Leaves: Intel SDM vol. 2A 'CPUID'; AMD APM vol. 3 appendix E.
"""

from __future__ import annotations

Entry = tuple[int, int, int, int, int, int, int]

_HYPERVISOR = 1 << 31  # leaf 1 ECX
_TSC_DEADLINE = 1 << 24  # leaf 1 ECX
_VMX = 1 << 5  # leaf 1 ECX
_HTT = 1 << 28  # leaf 1 EDX
_SVM = 1 << 2  # leaf 0x80000001 ECX
_CMP_LEGACY = 1 << 1  # leaf 0x80000001 ECX

#: 'V2 extended topology' and 'extended topology'; levels in ECX, bits 15 to 8.
_TOPOLOGY = (0xB, 0x1F)
_LEVEL_THREADS, _LEVEL_CORES = 1, 2
_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX (arch/x86/include/uapi/asm/kvm.h)

_KVM_FEATURES = 0x40000001  # Documentation/virt/kvm/x86/cpuid.rst
#: Asynchronous page faults: ASYNC_PF, ASYNC_PF_VMEXIT and ASYNC_PF_INT. A guest that waits for a
#: 'page ready' that was lost sleeps for ever: it happens after a restore, on AMD above all, and to
#: directly booted kernels (docs/decisions/0007-no-async-page-faults.md).
_ASYNC_PF = 1 << 4 | 1 << 10 | 1 << 14


def _topology(function: int, index: int, count: int, width: int) -> list[Entry]:
    """Return leaf 0xB or 0x1F: threads, cores, the list's end (Intel SDM, figure 'x2APIC ID')."""
    flags = _SIGNIFICANT_INDEX
    return [
        (function, 0, flags, 0, 1, _LEVEL_THREADS << 8, index),
        (function, 1, flags, width, count, _LEVEL_CORES << 8 | 1, index),
        (function, 2, flags, 0, 0, 2, index),
    ]


def for_vcpu(first: list[Entry], index: int) -> list[Entry]:
    """Return the CPUID of vCPU ``index``, from the first vCPU's: the same but for the APIC id."""
    entries = []
    for function, sub, flags, eax, ebx, ecx, edx in first:
        if function == 1:
            ebx = index << 24 | ebx & 0xFFFFFF
        elif function in _TOPOLOGY:
            edx = index
        elif function == 0x8000001E:
            eax, ebx = index, ebx & ~0xFF | index & 0xFF
        entries.append((function, sub, flags, eax, ebx, ecx, edx))
    return entries


def guest_cpuid(supported: list[Entry], index: int, count: int, deadline: bool) -> list[Entry]:
    """Return the CPUID of vCPU ``index`` of ``count``: one socket, one thread a core.

    ``deadline``: KVM emulates the TSC-deadline timer (which is never in KVM's own list, because the
    timer depends on the in-kernel APIC).
    """
    width = max(count - 1, 0).bit_length()
    entries = []
    for entry in supported:
        function, sub, flags, eax, ebx, ecx, edx = entry
        if function == 1:
            ebx = index << 24 | min(count, 255) << 16 | (ebx & 0xFFFF)
            ecx = (ecx | _HYPERVISOR | (_TSC_DEADLINE if deadline else 0)) & ~_VMX
            edx = edx | _HTT if count > 1 else edx & ~_HTT
        elif function == 4 and eax & 0x1F:
            # Caches: level 3 is shared by all, the others belong to one core.
            shared = (1 << width) - 1 if eax >> 5 & 7 == 3 else 0
            eax = (eax & 0x3FFF) | shared << 14 | ((1 << width) - 1) << 26
        elif function in _TOPOLOGY:
            # KVM lists the first level alone, and a guest that finds no second one takes each
            # vCPU for a socket of its own, with caches that no other shares.
            if sub == 0:
                entries += _topology(function, index, count, width)
            continue
        elif function == _KVM_FEATURES:
            eax &= ~_ASYNC_PF
        elif function == 0x80000001:
            ecx = ecx & ~_SVM & ~_CMP_LEGACY | (_CMP_LEGACY if count > 1 else 0)
        elif function == 0x80000008:
            ecx = width << 12 | (count - 1)
        elif function == 0x8000000A:
            eax = ebx = ecx = edx = 0
        elif function == 0x8000001D and eax & 0x1F:
            shared = count - 1 if eax >> 5 & 7 == 3 else 0
            eax = (eax & 0x3FFF) | shared << 14
        elif function == 0x8000001E:
            eax, ebx, ecx = index, index & 0xFF, 0
        entries.append((function, sub, flags, eax, ebx, ecx, edx))
    return entries
