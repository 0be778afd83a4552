"""The counters at 0x4000 (SDM 13.7 'Statistics Registers') a wire without errors can have.

A counter is cleared by reading, and one of 64 bits by reading its upper half.
"""

from __future__ import annotations

from godwit.host.net.ethernet import BROADCAST

from . import regs

_PRC64 = 0x405C  # received, by size: six counters
_PTC64 = 0x40D8  # sent, by size: six counters
_SIZES = (64, 127, 255, 511, 1023)
_GPRC, _BPRC, _MPRC, _GPTC = 0x4074, 0x4078, 0x407C, 0x4080
_GORCL, _GOTCL, _TORL, _TOTL = 0x4088, 0x4090, 0x40C0, 0x40C8
_TPR, _TPT, _MPTC, _BPTC = 0x40D0, 0x40D4, 0x40F0, 0x40F4
_WIDE = (_GORCL, _GOTCL, _TORL, _TOTL)
_FCS = 4
_MAX = 0xFFFF_FFFF


class Statistics:
    """The 64 registers, of which those without a meaning here stay at 0."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        self._counters = [0] * regs.STATISTICS_COUNT

    def read(self, offset: int) -> int:
        """Return the register at ``offset`` as the guest reads it."""
        index = (offset - regs.STATISTICS) // 4
        value = self._counters[index]
        if offset not in _WIDE:
            self._counters[index] = 0
            if offset - 4 in _WIDE:
                self._counters[index - 1] = 0
        return value

    def received(self, frame: bytes | memoryview) -> None:
        """Count a frame (Ethernet, no FCS) that was given to the guest."""
        size = len(frame) + _FCS
        self._count(_PRC64, size, _GPRC, _TPR)
        self._add(_MPRC, _BPRC, frame)
        self._add_wide(size, _GORCL, _TORL)

    def sent(self, frame: bytes | bytearray, count: int) -> None:
        """Count a frame of the guest's that was sent, or ``count`` segments made of the frame."""
        size = len(frame) // count + _FCS
        self._count(_PTC64, size, _GPTC, _TPT, count)
        self._add(_MPTC, _BPTC, frame, count)
        self._add_wide(size * count, _GOTCL, _TOTL)

    def _count(self, first_size: int, size: int, good: int, total: int, count: int = 1) -> None:
        by_size = first_size + 4 * sum(size > limit for limit in _SIZES)
        for offset in (by_size, good, total):
            self._bump(offset, count)

    def _add(
        self, multicast: int, broadcast: int, frame: bytes | bytearray | memoryview, count: int = 1
    ) -> None:
        if frame[0] & 1:
            self._bump(broadcast if frame[:6] == BROADCAST else multicast, count)

    def _bump(self, offset: int, count: int) -> None:
        index = (offset - regs.STATISTICS) // 4
        self._counters[index] = min(self._counters[index] + count, _MAX)

    def _add_wide(self, size: int, *offsets: int) -> None:
        for offset in offsets:
            index = (offset - regs.STATISTICS) // 4
            total = self._counters[index] + (self._counters[index + 1] << 32) + size
            self._counters[index] = total & _MAX
            self._counters[index + 1] = total >> 32 & _MAX

    def save(self) -> list[int]:
        """Return the counters for saving."""
        return list(self._counters)

    def load(self, counters: list[int]) -> None:
        """Take over the saved counters."""
        self._counters[:] = counters
