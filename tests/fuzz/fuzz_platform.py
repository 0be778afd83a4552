"""A guest at serial port, power and reset ports and PCI configuration; and a kernel's header.

Findings: an exception (but ConfigError from a boot file); a port that reads as more than its width;
more input kept than a UART may; an interrupt line that differs from its registers; a state that is
saved and is not the same when loaded; a write to RAM that no dirty log has.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from hypothesis import strategies as st

from godwit.errors import ConfigError
from godwit.hw import boot, layout
from godwit.hw.bus import MmioBus
from godwit.hw.memory import GuestMemory
from godwit.hw.pci import CONFIG_ADDRESS
from godwit.hw.power import Pm1, ResetPorts
from godwit.hw.serial import _RX_LIMIT, PORT, Serial
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.rng import VirtioRng
from godwit.spec.saved import decode, encode
from tests.fakes.slot import Board

from . import records
from .guests import logged_memory
from .records import Record
from .target import Target, allowed, require

#: The first byte of an input: a guest's accesses, or a kernel with its initrd's size.
ACCESSES, KERNEL = 0, 1
#: The bytes of a boot file that the input gives; the rest are zeros.
_IMAGE = 0x400


class _Sink:
    """A terminal that is full now and then."""

    def __init__(self) -> None:
        self.taken = 0

    def has_space(self) -> bool:
        return self.taken % 7 != 6

    def write(self, data: bytes) -> None:
        self.taken += len(data)


class Platform:
    """The platform's own devices, and a virtio-rng with MSI-X on the bus."""

    def __init__(self, memory: GuestMemory) -> None:
        self.board = board = Board(memory)
        self.ports, self.mmio = board.ports, board.mmio
        self.sink = _Sink()
        self.levels = {"serial": False, "power": False}
        self.offs = self.resets = 0
        self.serial = Serial(self.sink, lambda level: self._set("serial", level))
        self.pm1 = Pm1(lambda level: self._set("power", level), self._off)
        self.ports.map(PORT, 8, self.serial)
        self.ports.map(layout.PM1_EVENT, 8, self.pm1)
        for port in (layout.RESET_PORT, layout.KEYBOARD_COMMAND):
            self.ports.map(port, 1, ResetPorts(port, self._reset))
        self.rng = VirtioPci(VirtioRng("rng0", memory, board.loop, None, 1.0), board.slot(1))
        self.rng.resume()

    def _set(self, name: str, level: bool) -> None:
        require(level != self.levels[name], f"{name}: the line has level {level} already")
        self.levels[name] = level

    def _off(self) -> None:
        self.offs += 1

    def _reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        """Close all of the devices."""
        self.rng.pause()
        self.rng.close()
        self.board.close()


def run(data: bytes) -> None:
    """Play accesses, or boot a kernel."""
    how = data[0] if data else 0
    with logged_memory() as memory:
        if how & 1:
            _boot(memory, data)
            return
        platform = Platform(memory)
        try:
            for record in records.read(data[1:]):
                _OPS[record.op % len(_OPS)](platform, record)
                _check(platform)
                platform.board.loop.run_once(0)
        finally:
            platform.close()


def _check(platform: Platform) -> None:
    require(len(platform.serial._rx) <= _RX_LIMIT, "more input kept than a UART may")
    require(
        platform.levels["serial"] == (platform.serial._cause() != 1),
        "the serial line differs from the UART's cause",
    )


# --- operations -----------------------------------------------------------------------------------
_PORTS = (
    *range(PORT, PORT + 8),
    *range(layout.PM1_EVENT, layout.PM1_EVENT + 8),
    *range(CONFIG_ADDRESS, CONFIG_ADDRESS + 8),
    *(layout.RESET_PORT, layout.KEYBOARD_COMMAND),
)


def _port(r: Record) -> int:
    return _PORTS[r.a % len(_PORTS)] if r.a < 0x400 else r.b & 0xFFFF


def _out(platform: Platform, r: Record) -> None:
    platform.ports.write(_port(r), r.port_width, r.limited(r.port_width))


def _in(platform: Platform, r: Record) -> None:
    value = platform.ports.read(_port(r), r.port_width)
    require(0 <= value < 1 << 8 * r.port_width, f"port {_port(r):#x} reads as {value:#x}")


def _config(platform: Platform, r: Record) -> None:
    """Access the configuration space of some device at some offset, aligned or not."""
    platform.ports.write(CONFIG_ADDRESS, 4, 1 << 31 | (r.b & 0xFF) << 8 | r.a & 0xFC)
    at = CONFIG_ADDRESS + 4 + (r.a & 3)
    platform.ports.write(at, r.port_width, r.limited(r.port_width))
    value = platform.ports.read(at, r.port_width)
    require(0 <= value < 1 << 8 * r.port_width, f"configuration reads as {value:#x}")


def _decode(platform: Platform, r: Record) -> None:
    """Switch the decoding of a device's memory on, at its place or another."""
    platform.ports.write(CONFIG_ADDRESS, 4, 1 << 31 | 1 << 11 | 0x10)
    platform.ports.write(CONFIG_ADDRESS + 4, 4, r.b if r.a & 1 else 0xE000_0000)
    platform.ports.write(CONFIG_ADDRESS, 4, 1 << 31 | 1 << 11 | 0x04)
    platform.ports.write(CONFIG_ADDRESS + 4, 2, 6)


def _msix(platform: Platform, r: Record) -> None:
    """Access the MSI-X table and the pending bits, or another place of the BAR."""
    base = platform.rng.bar or 0xE000_0000
    at = base + (0x1000 + r.a % 0x40 if r.a < 0x8000 else r.a % 0x4400)
    platform.mmio.write(at, r.width, r.limited(r.width))
    value = platform.mmio.read(at, r.width)
    require(0 <= value < 1 << 8 * r.width, f"{at:#x} reads as {value:#x}")


def _msix_control(platform: Platform, r: Record) -> None:
    platform.ports.write(CONFIG_ADDRESS, 4, 1 << 31 | 1 << 11 | 0x40)
    platform.ports.write(CONFIG_ADDRESS + 6, 2, r.limited(2))
    if r.a & 1:
        with platform.rng.device.lock:
            platform.rng.signal_config()
            platform.rng.signal_queue(0)


def _outside(platform: Platform, r: Record) -> None:
    """Input comes, the terminal has space again, or the power button is pressed."""
    if r.a % 3 == 0:
        platform.serial.receive(bytes([r.value & 0xFF]) * (r.b % 70_000))
    elif r.a % 3 == 1:
        platform.serial.space_again()
    else:
        platform.pm1.press()


def _migrate(platform: Platform, r: Record) -> None:
    """Save each device, and load another one, which saves the same."""
    others: tuple[tuple[Any, Any], ...] = (
        (platform.serial, Serial(_Sink(), lambda level: None)),
        (platform.pm1, Pm1(lambda level: None, lambda: None)),
        (platform.board.bus, type(platform.board.bus)(MmioBus())),
    )
    for device, other in others:
        state = device.save()
        other.load(decode(encode(state), device.State))
        require(other.save() == state, f"{device.kind}: the loaded state differs")


def _pause(platform: Platform, r: Record) -> None:
    platform.rng.pause()
    state = platform.rng.save()
    if r.a & 1:
        platform.rng.reset()
        platform.rng.load(decode(encode(state), platform.rng.State))
        require(platform.rng.save() == state, "virtio-rng: the loaded state differs")
    platform.rng.resume()


_OPS = (
    *(_out, _out, _out, _in, _in, _config, _decode, _msix, _msix, _msix_control, _outside),
    *(_migrate, _pause),
)
OPS = {operation.__name__.strip("_"): index for index, operation in enumerate(_OPS)}


# --- a kernel's header ----------------------------------------------------------------------------
def _boot(memory: GuestMemory, data: bytes) -> None:
    """Load a kernel whose first bytes are the input's, and an initrd of some size."""
    size, initrd_size = struct.unpack("<II", data[1:9].ljust(8, b"\0"))
    image = data[9 : 9 + _IMAGE]
    # Under /proc the two have names, as files have; sizes cost nothing there.
    kernel, initrd = (os.memfd_create(name) for name in ("kernel", "initrd"))
    try:
        os.write(kernel, image)
        os.ftruncate(kernel, max(len(image), size % (40 << 20)))
        os.ftruncate(initrd, initrd_size % (40 << 20))
        names = [f"/proc/self/fd/{fd}" for fd in (kernel, initrd)]
        files = boot.BootFiles()
        try:
            with allowed(ConfigError):
                found = boot.load(memory, names[0], names[1], "console=ttyS0", files)
                require(found.entry < memory.size, "an entry beyond RAM")
                zero = memory.read(found.zero_page, 4096)
                at, length = struct.unpack_from("<II", zero, 0x218)
                require(at + length <= memory.size, "an initrd beyond RAM")
                require(zero[0x1E8] == 3, "not the map of memory that the kernel shall have")
        finally:
            files.close()
    finally:
        os.close(kernel)
        os.close(initrd)


def kernel(image: bytes, size: int, initrd: int) -> bytes:
    """Return a kernel as the target reads it."""
    return bytes([KERNEL]) + struct.pack("<II", size, initrd) + image


def header(**fields: int) -> bytes:
    """Return the start of a bzImage, with other values in some fields (boot.rst)."""
    image = bytearray(0x280)
    image[0x202:0x206] = b"HdrS"
    values = {"setup": 4, "jump": 0x66, "version": 0x20F, "flags": 1, "initrd_max": 0x7FFFFFFF}
    values |= {"line": 2047, "preferred": 0x100_0000, "init_size": 0x80_0000} | fields
    for name, form, at in (
        *(("setup", "<B", 0x1F1), ("jump", "<B", 0x201), ("version", "<H", 0x206)),
        *(("flags", "<H", 0x236), ("initrd_max", "<I", 0x22C), ("line", "<I", 0x238)),
        *(("preferred", "<Q", 0x258), ("init_size", "<I", 0x260)),
    ):
        struct.pack_into(form, image, at, values[name])
    return bytes(image)


_kernels = st.builds(
    lambda fields, size, initrd: kernel(header(**fields), size, initrd),
    st.fixed_dictionaries(
        {},
        optional={
            "setup": st.integers(0, 255),
            "jump": st.integers(0, 255),
            "version": st.integers(0, 0xFFFF),
            "flags": st.integers(0, 3),
            "initrd_max": st.integers(0, 0xFFFF_FFFF),
            "line": st.integers(0, 0xFFFF_FFFF),
            "preferred": st.one_of(st.integers(0, 1 << 26), st.integers(0, (1 << 64) - 1)),
            "init_size": st.integers(0, 0xFFFF_FFFF),
        },
    ),
    st.integers(0, 1 << 26),
    st.integers(0, 1 << 26),
)
TARGET = Target(
    "platform",
    run,
    (
        *("/godwit/hw/serial", "/godwit/hw/power", "/godwit/hw/pci", "/godwit/hw/irq"),
        *("/godwit/hw/boot", "/godwit/hw/bus", "/godwit/hw/virtio/rng", "/godwit/hw/virtio/pci"),
    ),
    st.one_of(records.strategy(len(_OPS), st.just(b"\0")), _kernels),
    record=records.SIZE,
    head=1,
)
