"""Numbers and structs of KVM (include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h)."""

from __future__ import annotations

from struct import Struct

from godwit.host.ioctl import io, ior, iow, iowr

_KVM = 0xAE

# --- structs -------------------------------------------------------------------------------------
MEMORY_REGION = Struct("=IIQQQ")  # slot, flags, guest_phys_addr, memory_size, userspace_addr
DIRTY_LOG = Struct("=IIQ")  # slot, padding, bitmap pointer
IRQ_LEVEL = Struct("=II")  # irq, level
PIT_CONFIG = Struct("=I60x")  # flags
IRQFD = Struct("=IIII16x")  # fd, gsi, flags, resamplefd
IOEVENTFD = Struct("=QQIiI36x")  # datamatch, addr, len, fd, flags
CLOCK_DATA = Struct("=QIIQQ16x")  # clock ns, flags, pad, realtime ns, host tsc
ROUTING_HEADER = Struct("=II")  # nr, flags
ROUTING_IRQCHIP = Struct("=IIIIII24x")  # gsi, type, flags, pad, irqchip, pin
ROUTING_MSI = Struct("=IIIIIIII16x")  # gsi, type, flags, pad, addr_lo, addr_hi, data, devid
CPUID_HEADER = Struct("=II")  # nent, padding
CPUID_ENTRY = Struct("=IIIIIII12x")  # function, index, flags, eax, ebx, ecx, edx
MSRS_HEADER = Struct("=II")  # nmsrs, pad
MSR_ENTRY = Struct("=IIQ")  # index, reserved, data
SEGMENT = Struct("=QIHBBBBBBBBBB")  # base, limit, selector, type, present, dpl, db, s, l, g, avl..
DTABLE = Struct("=QH6x")  # base, limit
MP_STATE = Struct("=I")
DEVICE_ATTR = Struct("=IIQQ")  # flags, group, attribute, pointer to its value

IRQCHIP_SIZE = 520
PIT_STATE_SIZE = 112
REGS_SIZE = 144
SREGS_SIZE = 312
LAPIC_SIZE = 1024
EVENTS_SIZE = 64
DEBUGREGS_SIZE = 128
XSAVE_SIZE = 4096
XCRS_SIZE = 392
MP_STATE_SIZE = 4

# --- system and VM -------------------------------------------------------------------------------
CREATE_VM = io(_KVM, 0x01)
GET_MSR_INDEX_LIST = iowr(_KVM, 0x02, 4)
CHECK_EXTENSION = io(_KVM, 0x03)
GET_VCPU_MMAP_SIZE = io(_KVM, 0x04)
GET_SUPPORTED_CPUID = iowr(_KVM, 0x05, CPUID_HEADER.size)
CREATE_VCPU = io(_KVM, 0x41)
GET_DIRTY_LOG = iow(_KVM, 0x42, DIRTY_LOG.size)
SET_USER_MEMORY_REGION = iow(_KVM, 0x46, MEMORY_REGION.size)
SET_TSS_ADDR = io(_KVM, 0x47)
SET_IDENTITY_MAP_ADDR = iow(_KVM, 0x48, 8)
CREATE_IRQCHIP = io(_KVM, 0x60)
IRQ_LINE = iow(_KVM, 0x61, IRQ_LEVEL.size)
GET_IRQCHIP = iowr(_KVM, 0x62, IRQCHIP_SIZE)
SET_IRQCHIP = ior(_KVM, 0x63, IRQCHIP_SIZE)  # encoded as a read, though it writes: the ABI's own
SET_GSI_ROUTING = iow(_KVM, 0x6A, ROUTING_HEADER.size)
KVM_IRQFD = iow(_KVM, 0x76, IRQFD.size)
CREATE_PIT2 = iow(_KVM, 0x77, PIT_CONFIG.size)
KVM_IOEVENTFD = iow(_KVM, 0x79, IOEVENTFD.size)
SET_CLOCK = iow(_KVM, 0x7B, CLOCK_DATA.size)
GET_CLOCK = ior(_KVM, 0x7C, CLOCK_DATA.size)
GET_PIT2 = ior(_KVM, 0x9F, PIT_STATE_SIZE)
SET_PIT2 = iow(_KVM, 0xA0, PIT_STATE_SIZE)

# --- vCPU ----------------------------------------------------------------------------------------
RUN = io(_KVM, 0x80)
GET_REGS = ior(_KVM, 0x81, REGS_SIZE)
SET_REGS = iow(_KVM, 0x82, REGS_SIZE)
GET_SREGS = ior(_KVM, 0x83, SREGS_SIZE)
SET_SREGS = iow(_KVM, 0x84, SREGS_SIZE)
GET_MSRS = iowr(_KVM, 0x88, MSRS_HEADER.size)
SET_MSRS = iow(_KVM, 0x89, MSRS_HEADER.size)
GET_LAPIC = ior(_KVM, 0x8E, LAPIC_SIZE)
SET_LAPIC = iow(_KVM, 0x8F, LAPIC_SIZE)
SET_CPUID2 = iow(_KVM, 0x90, CPUID_HEADER.size)
GET_MP_STATE = ior(_KVM, 0x98, MP_STATE_SIZE)
SET_MP_STATE = iow(_KVM, 0x99, MP_STATE_SIZE)
GET_VCPU_EVENTS = ior(_KVM, 0x9F, EVENTS_SIZE)
SET_VCPU_EVENTS = iow(_KVM, 0xA0, EVENTS_SIZE)
GET_DEBUGREGS = ior(_KVM, 0xA1, DEBUGREGS_SIZE)
SET_DEBUGREGS = iow(_KVM, 0xA2, DEBUGREGS_SIZE)
SET_TSC_KHZ = io(_KVM, 0xA2)
GET_TSC_KHZ = io(_KVM, 0xA3)
GET_XSAVE = ior(_KVM, 0xA4, XSAVE_SIZE)
SET_XSAVE = iow(_KVM, 0xA5, XSAVE_SIZE)
GET_XCRS = ior(_KVM, 0xA6, XCRS_SIZE)
SET_XCRS = iow(_KVM, 0xA7, XCRS_SIZE)
KVMCLOCK_CTRL = io(_KVM, 0xAD)
GET_XSAVE2 = ior(_KVM, 0xCF, XSAVE_SIZE)
SET_DEVICE_ATTR = iow(_KVM, 0xE1, DEVICE_ATTR.size)
GET_DEVICE_ATTR = iow(_KVM, 0xE2, DEVICE_ATTR.size)
#: (group, attribute) of a vCPU's TSC offset (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
VCPU_TSC_OFFSET = 0, 0

# --- capabilities --------------------------------------------------------------------------------
CAP_IRQCHIP = 0
CAP_USER_MEMORY = 3
CAP_IRQFD = 32
CAP_PIT2 = 33
CAP_IOEVENTFD = 36
CAP_XSAVE = 55
CAP_TSC_CONTROL = 60
CAP_TSC_DEADLINE_TIMER = 72
CAP_IMMEDIATE_EXIT = 136
CAP_XSAVE2 = 208

# --- flags ---------------------------------------------------------------------------------------
MEM_LOG_DIRTY_PAGES = 1
PIT_SPEAKER_DUMMY = 1
IRQFD_FLAG_DEASSIGN = 1
IOEVENTFD_FLAG_DEASSIGN = 1 << 2
ROUTING_TYPE_IRQCHIP = 1
ROUTING_TYPE_MSI = 2
IRQCHIP_IOAPIC = 2
CLOCK_REALTIME = 1 << 2

# --- kvm_run -------------------------------------------------------------------------------------
RUN_IMMEDIATE_EXIT = 1  # offset of the byte
RUN_EXIT_REASON = 8  # offset of the u32
RUN_UNION = 32  # offset of what the exit reason describes
RUN_IO = Struct("=BBHIQ")  # direction, size, port, count, data_offset
RUN_MMIO = Struct("=Q8sIB")  # phys_addr, data, len, is_write
RUN_MMIO_DATA = RUN_UNION + 8

EXIT_IO = 2
EXIT_MMIO = 6
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17

MSR_TSC = 0x10
MSR_ARCH_CAPABILITIES = 0x10A
MSR_TSC_DEADLINE = 0x6E0
