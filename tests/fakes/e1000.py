"""A guest's driver of an e1000, in real guest memory, by registers alone.

The driver sets rings up as Linux does (e1000_main.c), and where a test wants to break rules, every
field can be stored by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import NamedTuple

from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000 import regs

_DESC = Struct("<QQ")
_BROADCAST_ACCEPTED = regs.RCTL_BAM
BUFFER = 2048

#: ICR: the link changed, which never happens here.
ICR_LSC = 1 << 2
RS, EOP, IFCS, DEXT, VLE = 0x08, 0x01, 0x02, 0x20, 0x40
TSE = IC = 0x04


class Received(NamedTuple):
    """A frame from the ring, with its number of descriptors."""

    data: bytes
    status: int
    special: int
    descriptors: int


class Driver:
    """The driver of a controller behind ``read`` and ``write``, with rings from ``base`` on."""

    def __init__(
        self,
        memory: GuestMemory,
        read: Callable[[int], int],
        write: Callable[[int, int], None],
        *,
        size: int = 16,
        base: int = 0x10_0000,
    ) -> None:
        self.memory = memory
        self.read = read
        self.write = write
        self.size = size
        self.tx = base
        self.rx = base + 0x1_0000
        self.tx_room = base + 0x2_0000
        self.rx_buffers = base + 0x20_0000
        self.tx_next = 0
        self.rx_next = 0
        self._placed = 0

    def start(self, rctl: int = _BROADCAST_ACCEPTED) -> None:
        """Set up empty rings, and enable both units and interrupts as Linux does."""
        self.memory.write(self.tx, bytes(16 * self.size))
        self.memory.write(self.rx, bytes(16 * self.size))
        self.tx_next = self.rx_next = 0
        for base, at in ((regs.TDBAL, self.tx), (regs.RDBAL, self.rx)):
            self.write(base + regs.LEN, 16 * self.size)
            self.write(base + regs.BAH, at >> 32)
            self.write(base + regs.BAL, at & 0xFFFF_FFFF)
            self.write(base + regs.TAIL, 0)
            self.write(base + regs.HEAD, 0)
        self.write(regs.TCTL, regs.TCTL_EN | regs.TCTL_PSP)
        self.write(regs.RCTL, rctl | regs.RCTL_EN)
        self.write(regs.IMS, regs.ICR_TXDW | ICR_LSC | regs.ICR_RXDMT0 | regs.ICR_RXT0)

    # --- transmit ---------------------------------------------------------------------------------
    def place(self, data: bytes) -> int:
        """Place a buffer with ``data``, and return its guest address."""
        if self._placed + len(data) > 0x10_0000:
            self._placed = 0
        at = self.tx_room + self._placed
        self.memory.write(at, data)
        self._placed += -(-len(data) // 16) * 16
        return at

    def put(self, lower: int, upper: int) -> None:
        """Store the next transmit descriptor, valid or not."""
        self.memory.write(self.tx + 16 * self.tx_next, _DESC.pack(lower, upper))
        self.tx_next = (self.tx_next + 1) % self.size

    def legacy(self, data: bytes, command: int, *, special: int = 0, rest: int = 0) -> None:
        """Store a legacy descriptor, with ``rest`` as more bits of the upper half."""
        self.put(self.place(data), len(data) | command << 24 | special << 48 | rest)

    def data(self, data: bytes, command: int, *, popts: int = 0, special: int = 0) -> None:
        """Store a data descriptor for ``data``."""
        upper = len(data) | 1 << 20 | (command | DEXT) << 24 | popts << 40 | special << 48
        self.put(self.place(data), upper)

    def context(
        self,
        ip: tuple[int, int, int],
        tu: tuple[int, int, int],
        command: int = 0,
        *,
        header_length: int = 0,
        mss: int = 0,
    ) -> None:
        """Store a context descriptor with starts, offsets and ends of both checksums."""
        lower = ip[0] | ip[1] << 8 | ip[2] << 16 | tu[0] << 32 | tu[1] << 40 | tu[2] << 48
        self.put(lower, (command | DEXT) << 24 | header_length << 40 | mss << 48)

    def kick(self) -> None:
        """Notify the controller of the new descriptors."""
        self.write(regs.TDT, self.tx_next)

    def send(self, *pieces: bytes, command: int = 0, special: int = 0) -> None:
        """Send a frame with a legacy descriptor for each piece, reported when sent."""
        for piece in pieces[:-1]:
            self.legacy(piece, IFCS)
        self.legacy(pieces[-1], EOP | IFCS | RS | command, special=special)
        self.kick()

    def tx_done(self, index: int) -> bool:
        """Return whether the controller reported transmit descriptor ``index``."""
        return bool(self.memory.read(self.tx + 16 * index + 12, 1)[0] & 1)

    # --- receive ----------------------------------------------------------------------------------
    def offer(self, count: int) -> None:
        """Give the controller ``count`` more buffers."""
        tail = self.read(regs.RDT)
        for index in range(tail, tail + count):
            at = index % self.size
            lower = self.rx_buffers + BUFFER * at
            self.memory.write(self.rx + 16 * at, _DESC.pack(lower, 0))
        self.write(regs.RDT, (tail + count) % self.size)

    def offer_at(self, addresses: Sequence[int]) -> None:
        """Give the controller buffers at these addresses, RAM or not."""
        tail = self.read(regs.RDT)
        for i, address in enumerate(addresses):
            self.memory.write(self.rx + 16 * ((tail + i) % self.size), _DESC.pack(address, 0))
        self.write(regs.RDT, (tail + len(addresses)) % self.size)

    def received(self) -> list[Received]:
        """Take the received frames, FCS included if the controller stores one."""
        frames: list[Received] = []
        data, count = b"", 0
        while True:
            lower, upper = _DESC.unpack(self.memory.read(self.rx + 16 * self.rx_next, 16))
            if not upper >> 32 & 1:
                return frames
            self.memory.write(self.rx + 16 * self.rx_next, _DESC.pack(lower, 0))
            self.rx_next = (self.rx_next + 1) % self.size
            data += self.memory.read(lower, upper & 0xFFFF)
            count += 1
            if upper >> 32 & 2:
                frames.append(Received(data, upper >> 32 & 0xFF, upper >> 48, count))
                data, count = b"", 0
