"""The control queue's filter commands (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3)."""

from __future__ import annotations

from .rxfilter import RxFilter

OK, ERR = 0, 1

_CLASS_RX, _CLASS_MAC, _CLASS_VLAN = 0, 1, 2
_RX_SWITCHES = (
    "promiscuous",
    "all_multicast",
    "all_unicast",
    "no_multicast",
    "no_unicast",
    "no_broadcast",
)
F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA = 1 << 18, 1 << 19, 1 << 20


class Control:
    """The filter commands, of which those the driver did not negotiate fail."""

    def __init__(self, rx_filter: RxFilter, negotiated: int) -> None:
        self._filter = rx_filter
        self._negotiated = negotiated

    def execute(self, kind: int, command: int, data: bytes) -> int:
        """Execute a request on the filter, and return VIRTIO_NET_OK or VIRTIO_NET_ERR."""
        if kind == _CLASS_RX:
            return self._rx(command, data)
        if kind == _CLASS_MAC and command == 0:
            return self._tables(data)
        if kind == _CLASS_VLAN:
            return self._vlan(command, data)
        return ERR

    def _rx(self, command: int, data: bytes) -> int:
        needed = F_CTRL_RX if command < 2 else F_CTRL_RX_EXTRA
        if command >= len(_RX_SWITCHES) or not self._negotiated & needed or len(data) != 1:
            return ERR
        setattr(self._filter, _RX_SWITCHES[command], bool(data[0]))
        return OK

    def _tables(self, data: bytes) -> int:
        if not self._negotiated & F_CTRL_RX:
            return ERR
        tables: list[list[bytes]] = []
        at = 0
        for _ in range(2):
            if at + 4 > len(data):
                return ERR
            count = int.from_bytes(data[at : at + 4], "little")
            at += 4
            if count > (len(data) - at) // 6:
                return ERR
            tables.append([data[at + 6 * i : at + 6 * i + 6] for i in range(count)])
            at += 6 * count
        if at != len(data):
            return ERR
        self._filter.set_tables(*tables)
        return OK

    def _vlan(self, command: int, data: bytes) -> int:
        if not self._negotiated & F_CTRL_VLAN or command > 1 or len(data) != 2:
            return ERR
        vid = int.from_bytes(data, "little")
        if vid >= 4096:
            return ERR
        vlans = self._filter.vlans
        if command == 0 and vid not in vlans:
            vlans.append(vid)
        elif command == 1 and vid in vlans:
            vlans.remove(vid)
        return OK
