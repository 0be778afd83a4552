"""The feature bits of CPUID, each with its name.

Names are QEMU's and Linux's, taken from Intel's SDM (volume 2A, 'CPUID') and AMD's APM
(volume 3, appendix E) in small letters: target/i386/cpu.c, feature_word_info;
arch/x86/include/asm/cpufeatures.h. KVM's own: Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from godwit.host.kvm.cpuid import Entry

#: A CPUID register: function, index, and 0 to 3 for EAX, EBX, ECX and EDX.
Register = tuple[int, int, int]
#: Feature bits by register.
Bits = Mapping[Register, int]

EAX, EBX, ECX, EDX = range(4)
_NAMES_OF_REGISTERS = ("EAX", "EBX", "ECX", "EDX")
#: The function of KVM's own features.
KVM_FEATURES = 0x40000001

# A word for each bit from bit 0; '-': a bit that has no name here.
_WORDS: dict[Register, str] = {
    (1, 0, ECX): (
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cnxt-id sdbg fma cx16 xtpr "
        "pdcm - pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx "
        "f16c rdrand hypervisor"
    ),
    (1, 0, EDX): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - "
        "ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (6, 0, EAX): "dtherm ida arat",
    (7, 0, EBX): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm "
        "zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt "
        "clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (7, 0, ECX): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq "
        "avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid keylocker "
        "bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (7, 0, EDX): (
        "- sgx-keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl "
        "md_clear rtm_always_abort - rtm_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr "
        "ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d "
        "arch_capabilities core_capability ssbd"
    ),
    (7, 1, EAX): (
        "sha512 sm3 sm4 rao-int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs "
        "fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist"
    ),
    (7, 1, EDX): (
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr "
        "prefetchiti user_msr - - - avx10 - apxf"
    ),
    (7, 1, EBX): "",
    (7, 1, ECX): "",
    (7, 2, EDX): "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0xD, 1, EAX): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x19, 0, EBX): "aeskle - aeskle_wide",
    (KVM_FEATURES, 0, EAX): (
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi "
        "kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control "
        "kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range "
        "kvm_migration_control - - - - - - kvmclock_stable"
    ),
    (KVM_FEATURES, 0, EDX): "kvm_hint_dedicated",
    (0x80000001, 0, ECX): (
        "lahf_lm cmp_legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop "
        "skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext "
        "ptsc perfctr_llc mwaitx"
    ),
    (0x80000001, 0, EDX): (
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - "
        "lm 3dnowext 3dnow"
    ),
    (0x80000007, 0, EBX): "overflow_recov succor",
    (0x80000007, 0, EDX): "- - - - - - - - invtsc",
    (0x80000008, 0, EBX): (
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd_stibp - "
        "stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no "
        "ibpb_ret"
    ),
    (0x80000021, 0, EAX): (
        "no_nested_data_bp fs_gs_base_ns lfence_always_serializing - - verw_clear "
        "null_sel_clr_base - auto_ibrs no_smm_ctl_msr fsrs_amd fsrc_amd - - - - - - - - prefetchi "
        "- - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no"
    ),
    (0x80000021, 0, ECX): "- tsa_sq_no tsa_l1_no",
    (0x80000022, 0, EAX): "perfmon_v2",
}
#: Bits that AMD repeats in 0x80000001 EDX from leaf 1 EDX (APM volume 3, appendix E.4.2).
AMD_COPIES = 0x0183F3FF
#: Names as other programs have them, too.
_ALIASES = {
    "pni": "sse3",
    "pclmul": "pclmulqdq",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "lzcnt": "abm",
    "tsc_deadline_timer": "tsc-deadline",
    "sha-ni": "sha_ni",
    "cmpxchg16b": "cx16",
    "constant_tsc": "invtsc",
    "nonstop_tsc": "invtsc",
}

#: The name of each bit, by its register.
NAMES: dict[Register, dict[int, str]] = {
    register: {bit: name for bit, name in enumerate(words.split()) if name != "-"}
    for register, words in _WORDS.items()
}
#: Where each name's bit is.
PLACES: dict[str, tuple[Register, int]] = {
    name: (register, 1 << bit) for register, names in NAMES.items() for bit, name in names.items()
}

#: Bits that follow from something else: the number of vCPUs, or what the guest's kernel set.
DERIVED: Bits = {
    (1, 0, ECX): PLACES["osxsave"][1],
    (1, 0, EDX): PLACES["ht"][1],
    (7, 0, ECX): PLACES["ospke"][1],
    (0x80000001, 0, ECX): PLACES["cmp_legacy"][1],
}
#: Bits that report the lack of something: a guest that was told so loses nothing elsewhere.
DEPRECATIONS: Bits = {
    (7, 0, EBX): PLACES["fdp_excptn_only"][1] | PLACES["zero_fcs_fds"][1],
}


def spelled(name: str) -> str:
    """Return the name of a feature as used here, from one in any of the usual spellings."""
    lower = name.strip().lower()
    if lower in PLACES:
        return lower
    if lower in _ALIASES:
        return _ALIASES[lower]
    return lower.replace("-", "_")


def bits_of(*names: str) -> dict[Register, int]:
    """Return the bits of features by their names, which must be in the table."""
    found: dict[Register, int] = {}
    for name in names:
        register, bit = PLACES[name]
        found[register] = found.get(register, 0) | bit
    return found


def names_of(register: Register, bits: int) -> Iterator[str]:
    """Yield the names of a register's bits, in capitals as the manuals have them."""
    known = NAMES.get(register, {})
    if register == (0x80000001, 0, EDX):
        copies = NAMES[1, 0, EDX].items()
        known = {**{bit: name for bit, name in copies if AMD_COPIES >> bit & 1}, **known}
    for bit in range(32):
        if bits >> bit & 1:
            yield known[bit].upper() if bit in known else _place(register, bit)


def _place(register: Register, bit: int) -> str:
    function, index, which = register
    return f"CPUID {function:X}.{index} {_NAMES_OF_REGISTERS[which]} bit {bit}"


def features(entries: list[Entry]) -> dict[Register, int]:
    """Return the feature bits of CPUID entries, without the derived ones."""
    found = {}
    for function, index, _, *registers in entries:
        for which, value in enumerate(registers):
            register = function, index, which
            if register in NAMES:
                found[register] = value & ~DERIVED.get(register, 0)
    return found


def has(bits: Bits, name: str) -> bool:
    """Return True if a feature is among these bits."""
    register, bit = PLACES[name]
    return bool(bits.get(register, 0) & bit)
