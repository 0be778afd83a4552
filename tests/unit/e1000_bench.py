"""An e1000 in a machine without KVM, vCPUs and network, and a guest that drives it."""

from __future__ import annotations

import zlib

from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.nic import E1000
from tests.fakes.e1000 import Driver
from tests.fakes.slot import Board
from tests.fakes.tap import FakeTap

MAC = bytes.fromhex("525400123456")
PEER = bytes.fromhex("525400abcdef")
BROADCAST = b"\xff" * 6
BAR, PORT, SLOT = 0xE000_0000, 0xC000, 1
GSI = 17
HEADER = 12
IO, MEMORY, MASTER, INTX_OFF = 1, 2, 4, 1 << 10
ALL_REGISTERS = (1 << 32) - 1


class Bench:
    """The machine's side, and the guest's :attr:`driver`."""

    def __init__(self, memory: GuestMemory, *, size: int = 16, enable: bool = True) -> None:
        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio, self.bus = board.ports, board.mmio, board.bus
        self.errors = board.errors
        self.tap = FakeTap()
        self.nic = E1000("nic0", MAC, self.tap, board.slot(SLOT))
        self.driver = Driver(memory, self.read, self.write, size=size)
        if enable:
            self.write_config(4, 2, IO | MEMORY | MASTER)
            self.nic.resume()

    def close(self) -> None:
        self.nic.pause()
        self.nic.close()
        self.board.close()

    # --- what the guest does ----------------------------------------------------------------------
    def read(self, offset: int) -> int:
        return self.mmio.read(BAR + offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.mmio.write(BAR + offset, 4, value)

    def read_config(self, offset: int, size: int = 4) -> int:
        self.ports.write(0xCF8, 4, 1 << 31 | SLOT << 11 | offset & 0xFC)
        return self.ports.read(0xCFC + (offset & 3), size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.ports.write(0xCF8, 4, 1 << 31 | SLOT << 11 | offset & 0xFC)
        self.ports.write(0xCFC + (offset & 3), size, value)

    # --- what the network does --------------------------------------------------------------------
    def serve(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)

    def sent(self) -> list[bytes]:
        """What came out of the tap, headers included."""
        frames = []
        while (frame := self.tap.get()) is not None:
            frames.append(frame)
        return frames

    def receive(self, *frames: bytes) -> list[bytes]:
        """Frames from the network; what the guest has of them, FCS included."""
        for frame in frames:
            self.tap.put(frame)
        self.serve()
        return [received.data for received in self.driver.received()]

    @property
    def line(self) -> bool:
        """The level of the NIC's interrupt line."""
        return self.vm.lines.get(GSI, False)


def make_frame(number: int = 0, size: int = 60, to: bytes = MAC, kind: int = 0x88B5) -> bytes:
    """A frame from the peer."""
    head = to + PEER + kind.to_bytes(2, "big") + number.to_bytes(4, "little")
    return head.ljust(size, bytes((number & 0xFF,)))


def with_fcs(frame: bytes) -> bytes:
    """As the controller stores it."""
    return frame + zlib.crc32(frame).to_bytes(4, "little")


def tagged(vid: int, to: bytes = MAC, size: int = 64) -> bytes:
    """A frame from the peer in a VLAN."""
    return (to + PEER + b"\x81\x00" + vid.to_bytes(2, "big") + b"\x88\xb5").ljust(size, b"t")


def set_vlan(bench: Bench, vid: int) -> None:
    """Let a VLAN through."""
    at = regs.VFTA + 4 * (vid >> 5)
    bench.write(at, bench.read(at) | 1 << (vid & 31))
