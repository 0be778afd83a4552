"""A CPU as HELLO, and the files of ``godwit cpu``, describe one."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.errors import StreamError
from godwit.host.kvm.cpuid import Entry
from godwit.spec.saved import U32, U64

#: KVM takes so many CPUID entries (arch/x86/include/asm/kvm_host.h, KVM_MAX_CPUID_ENTRIES).
MAX_ENTRIES = 256
_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

_Flags = Annotated[int, msgspec.Meta(ge=0, le=_SIGNIFICANT_INDEX)]


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A guest's CPU, as the guest was told, or the most a host can tell a guest.

    Attributes:
        cpuid: the first vCPU's CPUID: function, index, flags, EAX, EBX, ECX, EDX. The layout of the
            XSAVE area is leaf 0xD.
        tsc_khz: the rate of the TSC; 0: not known.
        tsc_scaling: True if KVM can give a guest another rate there.
        msrs: indices of the MSRs of a vCPU's state.
        arch_capabilities: the MSR ARCH_CAPABILITIES: what a guest need not mitigate.
    """

    cpuid: Annotated[
        list[tuple[U32, U32, _Flags, U32, U32, U32, U32]],
        msgspec.Meta(min_length=1, max_length=MAX_ENTRIES),
    ]
    tsc_khz: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    tsc_scaling: bool
    msrs: Annotated[list[U32], msgspec.Meta(max_length=1024)]
    arch_capabilities: U64 = 0


def check_entries(entries: list[Entry]) -> None:
    """Refuse CPUID entries unless each leaf and index has exactly one.

    Raises:
        StreamError: a leaf is there twice, or with and without indices.
    """
    seen: dict[int, dict[int, int]] = {}
    for function, index, flags, *_ in entries:
        others = seen.setdefault(function, {})
        if index in others or (others and (not flags or not all(others.values()))):
            raise StreamError(f"CPUID: leaf {function:#x}, index {index}, is there twice")
        if index and not flags:
            raise StreamError(f"CPUID: leaf {function:#x} has index {index}, but no indices")
        others[index] = flags
