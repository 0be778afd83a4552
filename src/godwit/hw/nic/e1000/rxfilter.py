"""The controller's receive filter (SDM 3.2.1 'Packet Address Filtering', 13.5)."""

from __future__ import annotations

from godwit.errors import StreamError
from godwit.host.net.ethernet import BROADCAST
from godwit.hw.nic.nic import RxFilterInfo

from . import regs
from .state import FilterState

#: RAH: the address is valid, and it is compared with a frame's destination (address select 0).
_VALID = 1 << 31
_VALID_MASK = _VALID | 3 << 16
_RAH_BITS = _VALID_MASK | 0xFFFF
#: By RCTL.MO: how far the 12 bits that index the MTA are shifted within the last two bytes.
_HASH_SHIFT = (4, 3, 2, 0)


def hash_of(address: bytes, offset: int) -> int:
    """Return the bit of the MTA that stands for ``address``, by RCTL.MO (e1000_hash_mc_addr)."""
    return (address[4] | address[5] << 8) >> _HASH_SHIFT[offset] & 0xFFF


class RxFilter:
    """The three tables, and the verdict on a frame."""

    def __init__(self, mac: bytes) -> None:
        self._configured = mac
        self.reset()

    def reset(self) -> None:
        """Clear the tables, and set the first address to the EEPROM's."""
        self._ra = [0] * regs.RA_COUNT
        self._mta = [0] * regs.MTA_COUNT
        self._vfta = [0] * regs.VFTA_COUNT
        self._ra[0] = int.from_bytes(self._configured[:4], "little")
        self._ra[1] = int.from_bytes(self._configured[4:], "little") | _VALID
        self._update()

    def table(self, offset: int) -> tuple[list[int], int] | None:
        """Return the table that has the register at ``offset``, and the register's index."""
        for table, first in ((self._ra, regs.RA), (self._mta, regs.MTA), (self._vfta, regs.VFTA)):
            if first <= offset < first + 4 * len(table):
                return table, (offset - first) // 4
        return None

    def write(self, table: list[int], index: int, value: int) -> None:
        """Store a register of ``table``."""
        if table is self._ra:
            table[index] = value & _RAH_BITS if index & 1 else value
            self._update()
        else:
            table[index] = value

    def _update(self) -> None:
        self._exact = [
            self._ra[i].to_bytes(4, "little") + (self._ra[i + 1] & 0xFFFF).to_bytes(2, "little")
            for i in range(0, regs.RA_COUNT, 2)
            if self._ra[i + 1] & _VALID_MASK == _VALID
        ]

    @property
    def mac(self) -> bytes:
        """The address in force: the first, if valid and one a NIC may have."""
        own = self._exact[0] if self._ra[1] & _VALID_MASK == _VALID else self._configured
        return self._configured if own[0] & 1 or own == bytes(6) else own

    def accepts(self, frame: memoryview, rctl: int, vet: int) -> bool:
        """Return whether the guest wants ``frame`` (Ethernet, no FCS)."""
        if len(frame) < 14:
            return False
        if rctl & regs.RCTL_VFE and len(frame) >= 16 and frame[12] << 8 | frame[13] == vet:
            vid = (frame[14] & 0x0F) << 8 | frame[15]
            if not self._vfta[vid >> 5] >> (vid & 31) & 1:
                return False
        to = bytes(frame[:6])
        if not to[0] & 1:
            return bool(rctl & regs.RCTL_UPE) or to in self._exact
        if rctl & regs.RCTL_MPE or (to == BROADCAST and rctl & regs.RCTL_BAM):
            return True
        if to in self._exact:
            return True
        bit = hash_of(to, rctl >> regs.RCTL_MO_SHIFT & 3)
        return bool(self._mta[bit >> 5] >> (bit & 31) & 1)

    def view(self, rctl: int) -> RxFilterInfo:
        """Return the filter as operators see it. The MTA is a hash: its addresses are not known."""
        vlans = [
            32 * index + bit
            for index, word in enumerate(self._vfta)
            if word
            for bit in range(32)
            if word >> bit & 1
        ]
        by_table = bool(rctl & regs.RCTL_VFE)
        every = bool(rctl & regs.RCTL_MPE)
        return RxFilterInfo(
            promiscuous=bool(rctl & regs.RCTL_UPE) and every,
            unicast="all" if rctl & regs.RCTL_UPE else "normal",
            multicast="all" if every else "normal",
            vlan="normal" if by_table else "all",
            broadcast=bool(rctl & regs.RCTL_BAM),
            unicast_overflow=False,
            multicast_overflow=any(self._mta),
            main_mac=self.mac,
            unicast_table=tuple(one for one in self._exact[1:] if not one[0] & 1),
            multicast_table=tuple(one for one in self._exact if one[0] & 1),
            vlan_table=tuple(vlans) if by_table else (),
        )

    def save(self) -> FilterState:
        """Return the tables for saving."""
        return FilterState(list(self._ra), list(self._mta), list(self._vfta))

    def load(self, state: FilterState) -> None:
        """Take over the saved tables.

        Raises:
            StreamError: a register has bits the controller lacks.
        """
        for index in range(1, regs.RA_COUNT, 2):
            if state.ra[index] & ~_RAH_BITS:
                raise StreamError(f"filter.ra: RAH{index // 2} is {state.ra[index]:#x}")
        self._ra[:] = state.ra
        self._mta[:], self._vfta[:] = state.mta, state.vfta
        self._update()
