"""The receive filter of a virtio NIC: the tables a driver sets, and the verdict on a frame.

virtio 1.2, 5.1.6.5 'Control Virtqueue' defines each switch. vhost-net does not filter, as with
every VMM: the tap then delivers all, and the guest's kernel drops what is not its own.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.host.net.ethernet import BROADCAST
from godwit.hw.nic.nic import RxFilterInfo
from godwit.spec.saved import Mac

#: More addresses than this and the table is given up: all of that kind are taken.
TABLE_LIMIT = 64


def _how(none: bool, every: bool) -> str:
    return "none" if none else "all" if every else "normal"


_Vid = Annotated[int, msgspec.Meta(ge=0, lt=4096)]


class RxFilterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved tables, without defaults: what a stream lacks is not made up."""

    promiscuous: bool
    all_multicast: bool
    all_unicast: bool
    no_multicast: bool
    no_unicast: bool
    no_broadcast: bool
    unicast: Annotated[list[Mac], msgspec.Meta(max_length=TABLE_LIMIT)]
    multicast: Annotated[list[Mac], msgspec.Meta(max_length=TABLE_LIMIT)]
    unicast_overflow: bool
    multicast_overflow: bool
    vlans: Annotated[list[_Vid], msgspec.Meta(max_length=4096)]


class RxFilter(msgspec.Struct):
    """The tables of the filter, of which none is derived."""

    promiscuous: bool = True  # until the driver sets the filter
    all_multicast: bool = False
    all_unicast: bool = False
    no_multicast: bool = False
    no_unicast: bool = False
    no_broadcast: bool = False
    unicast: list[bytes] = []
    multicast: list[bytes] = []
    unicast_overflow: bool = False
    multicast_overflow: bool = False
    vlans: list[int] = []

    def save(self) -> RxFilterState:
        """Return a copy of the tables as a saved state."""
        return RxFilterState(**msgspec.structs.asdict(self.copy()))

    @classmethod
    def load(cls, state: RxFilterState) -> RxFilter:
        """Return the saved tables as a filter that shares nothing with ``state``."""
        return cls(**msgspec.structs.asdict(state)).copy()

    def accepts(self, frame: memoryview | bytes, mac: bytes, filter_vlans: bool) -> bool:
        """Return whether the guest wants ``frame`` (Ethernet, no FCS)."""
        if len(frame) < 14:
            return False
        if self.promiscuous:
            return True
        tagged = len(frame) >= 16 and frame[12] == 0x81 and frame[13] == 0
        if filter_vlans and tagged and (frame[14] & 0x0F) << 8 | frame[15] not in self.vlans:
            return False
        to = bytes(frame[:6])
        if to[0] & 1:
            if to == BROADCAST:
                return not self.no_broadcast
            if self.no_multicast:
                return False
            return self.all_multicast or self.multicast_overflow or to in self.multicast
        if self.no_unicast:
            return False
        return to == mac or self.all_unicast or self.unicast_overflow or to in self.unicast

    def view(self, mac: bytes, filter_vlans: bool) -> RxFilterInfo:
        """Return the filter as operators see it.

        ``filter_vlans``: the driver asked for VLANs one by one.
        """
        return RxFilterInfo(
            promiscuous=self.promiscuous,
            unicast=_how(self.no_unicast, self.all_unicast or self.unicast_overflow),
            multicast=_how(self.no_multicast, self.all_multicast or self.multicast_overflow),
            vlan="normal" if filter_vlans else "all",
            broadcast=not self.no_broadcast,
            unicast_overflow=self.unicast_overflow,
            multicast_overflow=self.multicast_overflow,
            main_mac=mac,
            unicast_table=tuple(self.unicast),
            multicast_table=tuple(self.multicast),
            vlan_table=tuple(self.vlans) if filter_vlans else (),
        )

    def copy(self) -> RxFilter:
        """Return a copy that shares nothing with this filter."""
        return msgspec.structs.replace(
            self,
            unicast=self.unicast.copy(),
            multicast=self.multicast.copy(),
            vlans=self.vlans.copy(),
        )

    def set_tables(self, unicast: list[bytes], multicast: list[bytes]) -> None:
        """Replace both of the tables."""
        self.unicast_overflow = len(unicast) > TABLE_LIMIT
        self.unicast = [] if self.unicast_overflow else unicast
        self.multicast_overflow = len(multicast) > TABLE_LIMIT
        self.multicast = [] if self.multicast_overflow else multicast
