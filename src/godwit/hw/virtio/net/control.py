"""The control queue's commands (virtio 1.2, 5.1.6.5): filter, MAC address, acknowledgement."""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import GuestError
from godwit.hw.virtio.budget import Budget
from godwit.hw.virtio.queue import Virtqueue

from .rxfilter import RxFilter

OK, ERR = 0, 1

_RX, _MAC, _VLAN, _ANNOUNCE = range(4)  # classes
_MAC_TABLE_SET, _MAC_ADDR_SET = 0, 1
_ANNOUNCE_ACK = 0
_LONGEST = 1 << 16  # bytes of a request
#: The requests of one turn, by number, bytes and pieces. Linux sends one and waits for its answer;
#: its longest has some hundred addresses, in four pieces.
_REQUESTS, _BYTES, _PIECES = 64, 64 << 10, 1024
_RX_SWITCHES = (
    "promiscuous",
    "all_multicast",
    "all_unicast",
    "no_multicast",
    "no_unicast",
    "no_broadcast",
)
F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA = 1 << 18, 1 << 19, 1 << 20
F_GUEST_ANNOUNCE, F_CTRL_MAC_ADDR = 1 << 21, 1 << 23


class Control:
    """The commands of the control queue, and all that the driver sets by them.

    A command that the driver did not negotiate fails.

    Attributes:
        configured_mac: the operator's MAC address.
        mac: the MAC address in force.
        filter: the receive filter.
        announce_pending: True while a requested announcement was not acknowledged.
        requests, acknowledgements: how many there were.
    """

    def __init__(self, configured_mac: bytes) -> None:
        self.configured_mac = configured_mac
        self.requests = self.acknowledgements = 0
        self.reset()

    def reset(self) -> None:
        """Forget all that the driver set by commands."""
        self.mac = self.configured_mac
        self.filter = RxFilter()
        self.announce_pending = False

    def serve(self, queue: Virtqueue, negotiated: int) -> bool:
        """Execute the queue's requests, and return whether more wait.

        A driver waits for each answer, so more than a ring's worth in one go is not honest work,
        and a turn has a budget.

        Raises:
            GuestError: a request without space for its command or its answer.
        """
        budget = Budget(min(queue.size, _REQUESTS), _BYTES, _PIECES)
        while budget.left:
            chain = queue.pop()
            if chain is None:
                return False
            budget.spend(chain)
            if chain.readable_size() < 2 or not chain.writable_size():
                raise GuestError("a request needs a class, a command and a byte for the answer")
            self.requests += 1
            request = chain.read(_LONGEST)
            answer = next(part for part in chain.writable if len(part))
            answer[0] = self.execute(negotiated, request[0], request[1], request[2:])
            queue.push(chain, 1)
        return True

    def execute(self, negotiated: int, kind: int, command: int, data: bytes) -> int:
        """Execute a command, and return VIRTIO_NET_OK or VIRTIO_NET_ERR."""
        done: Callable[[int, int, bytes], bool] | None = {
            _RX: self._receive_mode,
            _MAC: self._mac_command,
            _VLAN: self._vlan,
            _ANNOUNCE: self._acknowledge,
        }.get(kind)
        return OK if done is not None and done(negotiated, command, data) else ERR

    def _acknowledge(self, negotiated: int, command: int, data: bytes) -> bool:
        """Clear the status bit, before the buffer is used (5.1.6.5.4.2)."""
        if command != _ANNOUNCE_ACK or data or not negotiated & F_GUEST_ANNOUNCE:
            return False
        if not self.announce_pending:
            return False
        self.announce_pending = False
        self.acknowledgements += 1
        return True

    def _receive_mode(self, negotiated: int, command: int, data: bytes) -> bool:
        needed = F_CTRL_RX if command < 2 else F_CTRL_RX_EXTRA
        if command >= len(_RX_SWITCHES) or not negotiated & needed or len(data) != 1:
            return False
        setattr(self.filter, _RX_SWITCHES[command], bool(data[0]))
        return True

    def _mac_command(self, negotiated: int, command: int, data: bytes) -> bool:
        if command == _MAC_TABLE_SET and negotiated & F_CTRL_RX:
            return self._set_tables(data)
        if command != _MAC_ADDR_SET or not negotiated & F_CTRL_MAC_ADDR:
            return False
        if len(data) != 6 or data[0] & 1 or not any(data):
            return False
        self.mac = bytes(data)
        return True

    def _set_tables(self, data: bytes) -> bool:
        tables: list[list[bytes]] = []
        at = 0
        for _ in range(2):
            if at + 4 > len(data):
                return False
            count = int.from_bytes(data[at : at + 4], "little")
            at += 4
            if count > (len(data) - at) // 6:
                return False
            tables.append([data[at + 6 * i : at + 6 * i + 6] for i in range(count)])
            at += 6 * count
        if at != len(data):
            return False
        self.filter.set_tables(*tables)
        return True

    def _vlan(self, negotiated: int, command: int, data: bytes) -> bool:
        if not negotiated & F_CTRL_VLAN or command > 1 or len(data) != 2:
            return False
        vid = int.from_bytes(data, "little")
        if vid >= 4096:
            return False
        vlans = self.filter.vlans
        if command == 0 and vid not in vlans:
            vlans.append(vid)
        elif command == 1 and vid in vlans:
            vlans.remove(vid)
        return True
