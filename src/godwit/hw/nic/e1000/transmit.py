"""The transmit ring, whose descriptors become frames for the tap (SDM 3.3 to 3.5).

Checksums and segmentation are left to the host's kernel, by the virtio_net_hdr in front of each
frame. A frame is sent when all of its descriptors are there, so nothing is kept of half a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from godwit.errors import GuestError
from godwit.host.net.tap import HEADER, MAX_FRAME
from godwit.hw.memory import GuestMemory

from . import regs
from .offload import Context, Offload
from .ring import DONE, Ring
from .statistics import Statistics

#: Descriptors, and bytes of frames, that are worked off before others get a turn: checksums of a
#: frame of 64 KB cost a millisecond.
BUDGET, BUDGET_BYTES = 256, 256 << 10
#: Descriptors of one frame; Linux never needs more than some 60.
_MAX_DESCRIPTORS = 256
_MIN_FRAME = 60

# Bits of a descriptor's upper half: the command byte is at bit 24 in all three formats.
_EOP, _RS, _DEXT, _VLE = 1 << 24, 1 << 27, 1 << 29, 1 << 30
_LEGACY_IC = 1 << 26
_DATA_TSE = 1 << 26
_CONTEXT, _DATA = 0, 1
_POPTS_IXSM, _POPTS_TXSM = 1 << 40, 1 << 41

_VNET_HDR = Struct("<BBHHHHH")  # include/uapi/linux/virtio_net.h


class Transmitter:
    """The transmit unit, whose ``send`` gets each frame with its virtio_net_hdr."""

    def __init__(
        self,
        memory: GuestMemory,
        registers: dict[int, int],
        statistics: Statistics,
        send: Callable[[bytes], None],
    ) -> None:
        self._memory = memory
        self._registers = registers
        self._ring = Ring("transmit", memory, registers, regs.TDBAL)
        self._statistics = statistics
        self._send = send
        self._bytes = 0  # of frames in this turn
        self.reset()

    def reset(self) -> None:
        """Forget the context descriptors, as after a reset."""
        #: The newest context descriptors: for checksums, and for segmentation (3.5.3).
        self.contexts = [Context(0, 0), Context(0, 0)]

    def run(self) -> tuple[int, bool]:
        """Send some of what waits, and return causes for ICR and whether more can be sent at once.

        Raises:
            GuestError: the ring, or what a descriptor points at, is not what it may be.
        """
        left = self._ring.owned()
        causes = spent = 0
        self._bytes = 0
        while left and spent < BUDGET and self._bytes < BUDGET_BYTES:
            used, wants_report = self._next(left)
            if not used:
                return causes, False  # the end of this frame is still to come
            self._ring.advance(used)
            left -= used
            spent += used
            if wants_report:
                causes |= regs.ICR_TXDW
            if not left:
                causes |= regs.ICR_TXQE
        return causes, left > 0

    def _next(self, left: int) -> tuple[int, bool]:
        """Do a context descriptor or a frame, and return its descriptors and if a report is due."""
        lower, upper = self._ring.peek()
        if upper & _DEXT and upper >> 20 & 15 == _CONTEXT:
            self.contexts[bool(upper & _DATA_TSE)] = Context(lower, upper)
            return 1, self._report(0, upper)
        frame = bytearray()
        uppers: list[int] = []
        for index in range(min(left, _MAX_DESCRIPTORS)):
            lower, upper = self._ring.peek(index)
            frame += self._memory.view(lower, self._length(upper))
            if len(frame) > MAX_FRAME - HEADER:
                raise GuestError(f"a frame of more than {MAX_FRAME - HEADER} bytes")
            uppers.append(upper)
            if upper & _EOP:
                break
        else:
            if left >= _MAX_DESCRIPTORS:
                raise GuestError(f"a frame of more than {_MAX_DESCRIPTORS} descriptors")
            return 0, False
        self._bytes += len(frame)
        self._transmit(frame, uppers[0], uppers[-1])
        reports = [self._report(index, upper) for index, upper in enumerate(uppers)]
        return len(uppers), any(reports)

    @staticmethod
    def _length(upper: int) -> int:
        if not upper & _DEXT:
            return upper & 0xFFFF
        if upper >> 20 & 15 != _DATA:
            raise GuestError(f"a descriptor of type {upper >> 20 & 15} within a frame")
        return upper & 0xFFFFF

    def _report(self, index: int, upper: int) -> bool:
        if upper & _RS:
            self._ring.write_back(upper | DONE, index)
        return bool(upper & _RS)

    def _transmit(self, frame: bytearray, first: int, last: int) -> None:
        """Send a frame, or drop one that makes no sense, as a wire would not carry it."""
        if len(frame) < 14:
            return
        offload = Offload(frame)
        if first & _DEXT:
            tse = bool(first & _DATA_TSE)
            context = self.contexts[tse]
            if tse and not offload.segment(context):
                return
            if first & _POPTS_IXSM:
                offload.ip_checksum(context)
            if first & _POPTS_TXSM or tse:
                offload.checksum(context.tucss, context.tucso, 0 if tse else context.tucse)
        elif last & _LEGACY_IC:
            offload.checksum(last >> 40 & 0xFF, last >> 16 & 0xFF, 0)
        if last & _VLE and self._registers[regs.CTRL] & regs.CTRL_VME:
            offload.insert_tag(self._registers[regs.VET], last >> 48)
        if len(frame) < _MIN_FRAME and self._registers[regs.TCTL] & regs.TCTL_PSP:
            frame += bytes(_MIN_FRAME - len(frame))
        self._statistics.sent(frame, offload.segments)
        header = _VNET_HDR.pack(
            offload.flags,
            offload.gso_type,
            offload.header_length,
            offload.gso_size,
            offload.start,
            offload.offset,
            0,
        )
        self._send(header + frame)
