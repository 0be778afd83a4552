"""The receive ring, by which frames of the tap go into the guest's buffers (SDM 3.2)."""

from __future__ import annotations

import zlib

from godwit.host.net.tap import HEADER
from godwit.hw.memory import GuestMemory

from . import regs
from .ring import DONE, Ring
from .rxfilter import RxFilter
from .statistics import Statistics

_MIN_FRAME = 60
_FCS = 4
#: The longest frames, tag and FCS included: without and with RCTL.LPE (SDM 13.4 RCTL).
_MAX_NORMAL, _MAX_LONG = 1522, 16384

# Bits of a descriptor's upper half (3.2.3).
_EOP, _IXSM, _VP = 1 << 33, 1 << 34, 1 << 35
_SPECIAL_SHIFT = 48


def buffer_size(rctl: int) -> int:
    """Return the bytes of each of the driver's buffers."""
    size = 2048 >> (rctl >> regs.RCTL_BSIZE_SHIFT & 3)
    return min(size * 16, 16384) if rctl & regs.RCTL_BSEX else size


class Receiver:
    """The receive unit of the controller."""

    def __init__(
        self,
        memory: GuestMemory,
        registers: dict[int, int],
        rx_filter: RxFilter,
        statistics: Statistics,
    ) -> None:
        self._memory = memory
        self._registers = registers
        self._ring = Ring("receive", memory, registers, regs.RDBAL)
        self._filter = rx_filter
        self._statistics = statistics

    def accepts(self, frame: memoryview) -> bool:
        """Return whether the guest wants ``frame``, and the frame is not too long."""
        rctl = self._registers[regs.RCTL]
        limit = _MAX_LONG if rctl & regs.RCTL_LPE else _MAX_NORMAL
        if len(frame) + _FCS > limit:
            return False
        return self._filter.accepts(frame, rctl, self._registers[regs.VET])

    def deliver(self, frame: bytes) -> bool:
        """Put a frame (with the tap's header) into the ring, or return False for lack of space.

        Raises:
            GuestError: the ring or a buffer is not in RAM.
        """
        registers = self._registers
        data = frame[HEADER:].ljust(_MIN_FRAME, b"\0")
        # The tap's frames are finished, but nobody has looked at their checksums: hence IXSM.
        upper = DONE | _IXSM
        payload = data
        if not registers[regs.RCTL] & regs.RCTL_SECRC:
            payload += zlib.crc32(data).to_bytes(_FCS, "little")
        kind = data[12] << 8 | data[13]
        if registers[regs.CTRL] & regs.CTRL_VME and kind == registers[regs.VET]:
            upper |= _VP | (data[14] << 8 | data[15]) << _SPECIAL_SHIFT
            payload = payload[:12] + payload[16:]
        size = buffer_size(registers[regs.RCTL])
        needed = -(-len(payload) // size)
        owned = self._ring.owned()
        if needed > owned:
            # One that would never fit is dropped; a ring is full with one descriptor unused.
            return owned > 0 and needed >= self._ring.count
        for index in range(needed):
            address, _ = self._ring.peek(index)
            self._memory.write(address, payload[index * size : (index + 1) * size])
        for index in range(needed):
            if index + 1 < needed:
                self._ring.write_back(DONE | size, index)
            else:
                self._ring.write_back(upper | _EOP | len(payload) - index * size, index)
        self._ring.advance(needed)
        self._statistics.received(data)
        return True

    def is_low(self) -> bool:
        """Return whether few descriptors are left, as RCTL.RDMTS has it (SDM 3.2.6)."""
        threshold = 1 + (self._registers[regs.RCTL] >> regs.RCTL_RDMTS_SHIFT & 3)
        count = self._registers[regs.RDBAL + regs.LEN] // 16
        return self._ring.owned() <= count >> threshold
