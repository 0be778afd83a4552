"""A ring of 16-byte descriptors (SDM 3.2.6, 3.4), whose registers are checked at each use."""

from __future__ import annotations

from godwit.errors import GuestError
from godwit.hw.memory import GuestMemory

from . import regs

#: The written-back status is in the upper half: DD, and on a received frame's last one EOP.
DONE = 1 << 32


class Ring:
    """A ring whose registers, shared with the device, are at ``base`` of ``registers``."""

    def __init__(
        self, name: str, memory: GuestMemory, registers: dict[int, int], base: int
    ) -> None:
        self._name = name
        self._memory = memory
        self._registers = registers
        self._base = base
        self._at = 0
        self._quads: memoryview = memoryview(b"")
        self.count = 0

    def owned(self) -> int:
        """Return how many descriptors are the device's: from the head up to the tail.

        Raises:
            GuestError: head or tail is beyond the ring, or the ring is not in RAM.
        """
        registers, base = self._registers, self._base
        head, tail = registers[base + regs.HEAD], registers[base + regs.TAIL]
        if head == tail:
            return 0
        size = registers[base + regs.LEN]
        self.count = size // 16
        if head >= self.count or tail >= self.count:
            raise GuestError(
                f"{self._name} ring: head {head} and tail {tail} in a ring of {self.count}"
            )
        self._at = registers[base + regs.BAH] << 32 | registers[base + regs.BAL]
        self._quads = self._memory.view(self._at, size).cast("Q")
        return (tail - head) % self.count

    def peek(self, index: int = 0) -> tuple[int, int]:
        """Return both halves of an owned descriptor, ``index`` places behind the head."""
        at = (self._registers[self._base + regs.HEAD] + index) % self.count
        return self._quads[2 * at], self._quads[2 * at + 1]

    def write_back(self, upper: int, index: int = 0) -> None:
        """Store the upper half of a descriptor in one access."""
        at = (self._registers[self._base + regs.HEAD] + index) % self.count
        self._quads[2 * at + 1] = upper
        self._memory.mark_dirty(self._at + 16 * at + 8, 8)

    def advance(self, by: int) -> None:
        """Give the first ``by`` descriptors back to the driver."""
        head = self._base + regs.HEAD
        self._registers[head] = (self._registers[head] + by) % self.count
