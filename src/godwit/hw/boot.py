"""Loading a bzImage by the 64-bit boot protocol (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from struct import Struct, pack, pack_into, unpack_from
from typing import NamedTuple, Self

from godwit.errors import ConfigError
from godwit.host.kvm import abi
from godwit.host.kvm.handles import Vcpu

from . import acpi
from .memory import HUGE, PAGE, GuestMemory

_ZERO_PAGE = 0x7000
_GDT = 0x8000
_PAGE_TABLES = 0x9000  # PML4, PDPT, four page directories
_COMMAND_LINE = 0x20000
_KERNEL = 0x100000

_HEADER_AT = 0x1F1
_MIN_PROTOCOL = 0x020C  # 2.12: xloadflags
_XLF_KERNEL_64 = 1
_LOADED_HIGH = 1
_E820 = Struct("<QQI")
_E820_RAM, _E820_RESERVED = 1, 2


#: Opens a path with flags, as os.open does.
Opener = Callable[[str, int], int]


class Boot(NamedTuple):
    """The entry point of the first vCPU, and the address of its zero page."""

    entry: int
    zero_page: int


class BootFiles:
    """The kernel's and the initrd's files, which stay open: a guest may boot again.

    By then the process may have lost the right to open them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, int] = {}

    def keep(self, path: str) -> None:
        """Open a regular file for a boot to come.

        Raises:
            OSError: the file cannot be opened.
        """
        os.close(self.open(path, os.O_RDONLY | os.O_NONBLOCK))

    def open(self, path: str, flags: int) -> int:
        """Return a descriptor for a path, of the file found there at the first boot.

        Raises:
            OSError: the file cannot be opened.
        """
        if path in self._kept:
            return os.dup(self._kept[path])
        fd = os.open(path, flags | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe has an end
            self._kept[path] = os.dup(fd)
        return fd

    def close(self) -> None:
        """Close the descriptors of both files."""
        while self._kept:
            os.close(self._kept.popitem()[1])


def load(
    memory: GuestMemory,
    kernel: str,
    initrd: str | None,
    command_line: str,
    files: BootFiles | None = None,
) -> Boot:
    """Put kernel, initrd, command line, page tables and the zero page into RAM.

    Raises:
        ConfigError: a file cannot be read, is no 64-bit bzImage, or does not fit.
    """
    opener = files.open if files is not None else None
    with _File(kernel, "kernel", memory.regions[0].size, opener) as file:
        return _load(memory, kernel, file, initrd, command_line, opener)


def _load(
    memory: GuestMemory,
    kernel: str,
    file: _File,
    initrd: str | None,
    command_line: str,
    opener: Opener | None,
) -> Boot:
    image = file.read(0, PAGE)
    if len(image) < 0x270 or image[0x202:0x206] != b"HdrS":
        raise ConfigError(f"kernel {kernel}: not a bzImage (no 'HdrS' at 0x202)")
    version, flags = unpack_from("<H", image, 0x206)[0], unpack_from("<H", image, 0x236)[0]
    if version < _MIN_PROTOCOL or not flags & _XLF_KERNEL_64:
        raise ConfigError(
            f"kernel {kernel}: boot protocol {version >> 8}.{version & 0xFF} without a 64-bit "
            "entry; a 64-bit kernel, Linux 3.8 or later, is needed"
        )
    setup = (image[0x1F1] or 4) * 512 + 512
    body = file.size - setup
    if body <= 0:
        raise ConfigError(f"kernel {kernel}: ends within its setup code; the file is cut off")
    initrd_max, max_line = unpack_from("<I", image, 0x22C)[0], unpack_from("<I", image, 0x238)[0]
    init_size = unpack_from("<I", image, 0x260)[0]
    # The kernel moves up to its preferred address and unpacks itself there (head_64.S).
    init_end = max(_KERNEL, unpack_from("<Q", image, 0x258)[0]) + init_size
    line = os.fsencode(command_line)
    if len(line) > max_line:
        raise ConfigError(f"command line has {len(line)} bytes; this kernel takes {max_line}")

    low = memory.regions[0].size
    if max(init_end, _KERNEL + body) > low:
        raise ConfigError(f"kernel {kernel} needs more than {low >> 20} MiB; give --memory more")
    file.into(memory.writable(_KERNEL, body), setup)
    memory.write(_COMMAND_LINE, line + b"\0")

    zero = bytearray(PAGE)
    end = 0x202 + image[0x201]
    zero[_HEADER_AT:end] = image[_HEADER_AT:end]
    if initrd is not None:
        with _File(initrd, "initrd", low, opener) as disk:
            at = (min(low, initrd_max + 1) - disk.size) // PAGE * PAGE
            if at < max(init_end, _KERNEL + body):
                raise ConfigError(
                    f"initrd {initrd} ({disk.size >> 20} MiB) does not fit beside the kernel in "
                    f"{low >> 20} MiB; give --memory more"
                )
            disk.into(memory.writable(at, disk.size), 0)
            pack_into("<II", zero, 0x218, at, disk.size)
    zero[0x210] = 0xFF  # type_of_loader: undefined
    zero[0x211] |= _LOADED_HIGH
    pack_into("<I", zero, 0x228, _COMMAND_LINE)
    pack_into("<Q", zero, 0x070, acpi.RSDP_ADDRESS)
    _e820(zero, memory)
    memory.write(_ZERO_PAGE, zero)
    _page_tables(memory)
    # Null, null, 64-bit code (0x10), data (0x18): what the protocol asks for.
    memory.write(_GDT, pack("<QQQQ", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))
    return Boot(_KERNEL + 0x200, _ZERO_PAGE)


def start_vcpu(vcpu: Vcpu, boot: Boot) -> None:
    """Put the first vCPU into 64-bit mode at the kernel's entry, RSI at the zero page."""
    segment = abi.SEGMENT.pack
    # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
    code = segment(0, 0xFFFFFFFF, 0x10, 0xB, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    data = segment(0, 0xFFFFFFFF, 0x18, 0x3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    task = segment(0, 0xFFFF, 0, 0xB, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    local = segment(0, 0xFFFF, 0, 0x2, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    old = vcpu.get(abi.GET_SREGS, abi.SREGS_SIZE)
    apic_base = unpack_from("<Q", old, 272)[0]
    new = code + data * 5 + task + local
    new += abi.DTABLE.pack(_GDT, 31) + abi.DTABLE.pack(0, 0)
    cr0, cr4, efer = 0x80050033, 0x20, 0x500  # PE MP ET NE WP AM PG; PAE; LME LMA
    new += pack("<QQQQQQQ", cr0, 0, _PAGE_TABLES, cr4, 0, efer, apic_base) + bytes(32)
    vcpu.set(abi.SET_SREGS, new)
    regs = [0] * 18
    regs[4] = boot.zero_page  # rsi
    regs[6] = 0x6FF0  # rsp
    regs[16], regs[17] = boot.entry, 2  # rip, rflags
    vcpu.set(abi.SET_REGS, pack("<18Q", *regs))


class _File:
    """A file that goes into RAM, without a copy on the way if the file is a regular one.

    Raises:
        ConfigError: the file cannot be read, or has no end within ``most`` bytes.
    """

    def __init__(self, path: str, what: str, most: int, opener: Opener | None) -> None:
        self._name = f"{what} {path}"
        self._whole: bytes | None = None
        try:
            self._file = open(path, "rb", buffering=0, opener=opener)  # noqa: SIM115 (by __exit__)
            try:
                found = os.fstat(self._file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    self._whole = self._read_all(most)
            except BaseException:
                self._file.close()
                raise
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        #: Bytes.
        self.size = found.st_size if self._whole is None else len(self._whole)

    def _read_all(self, most: int) -> bytes:
        """Return what a pipe or a device gives until its end."""
        data = bytearray()
        while more := self._file.read(min(1 << 20, most + 1 - len(data))):
            data += more
            if len(data) > most:
                raise ConfigError(
                    f"{self._name}: more than {most >> 20} MiB, all of the guest's low memory; "
                    "give another file, or --memory more"
                )
        return bytes(data)

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on.

        Raises:
            ConfigError: the file cannot be read.
        """
        data = bytearray(max(0, min(length, self.size - offset)))
        self.into(memoryview(data), offset)
        return bytes(data)

    def into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with the file's bytes from ``offset`` on.

        Raises:
            ConfigError: the file cannot be read, or has become shorter.
        """
        if self._whole is not None:
            target[:] = self._whole[offset : offset + len(target)]
            return
        done = 0
        try:
            while done < len(target):
                got = os.preadv(self._file.fileno(), [target[done:]], offset + done)
                if not got:
                    raise ConfigError(f"{self._name}: it became shorter while it was read")
                done += got
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError | ValueError) -> ConfigError:
        reason = error.strerror if isinstance(error, OSError) else error
        return ConfigError(f"{self._name}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _e820(zero: bytearray, memory: GuestMemory) -> None:
    low = memory.regions[0].size
    entries = [
        (0, 0x9FC00, _E820_RAM),
        (0x9FC00, 0x100000 - 0x9FC00, _E820_RESERVED),
        (0x100000, low - 0x100000, _E820_RAM),
    ]
    entries += [(region.start, region.size, _E820_RAM) for region in memory.regions[1:]]
    for index, entry in enumerate(entries):
        _E820.pack_into(zero, 0x2D0 + index * _E820.size, *entry)
    zero[0x1E8] = len(entries)


def _page_tables(memory: GuestMemory) -> None:
    """Map the first 4 GiB one to one by 2 MiB pages."""
    pdpt = _PAGE_TABLES + PAGE
    directory = pdpt + PAGE
    memory.write(_PAGE_TABLES, pack("<Q", pdpt | 3))
    memory.write(pdpt, pack("<4Q", *(directory + i * PAGE | 3 for i in range(4))))
    memory.write(directory, pack("<2048Q", *(i * HUGE | 0x83 for i in range(2048))))
