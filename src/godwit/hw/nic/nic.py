"""The NIC capability: the view the announcement and a migration have of a network card."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from struct import Struct
from typing import ClassVar, NamedTuple

from godwit.host.net.tap import HEADER
from godwit.hw.capabilities import HasIdentity

from .rx_backlog import RxBacklog

#: A virtio_net_hdr's flags, and the places of a checksum that is to be computed
#: (include/uapi/linux/virtio_net.h).
_CHECKSUM = Struct("<B5xHH")
_NEEDS_CSUM = 1


class RxFilterInfo(NamedTuple):
    """The receive filter that the guest set. QEMU's RxFilterInfo (qapi/net.json) has the same.

    Attributes:
        promiscuous: everything is received.
        unicast, multicast, vlan: ``normal`` (by the table), ``all`` or ``none``.
        broadcast: whether broadcasts are received.
        unicast_overflow, multicast_overflow: there were too many for the table.
        main_mac: the address in force, six bytes.
        unicast_table, multicast_table: further addresses, six bytes each.
        vlan_table: VLAN ids.
    """

    promiscuous: bool
    unicast: str
    multicast: str
    vlan: str
    broadcast: bool
    unicast_overflow: bool
    multicast_overflow: bool
    main_mac: bytes
    unicast_table: tuple[bytes, ...]
    multicast_table: tuple[bytes, ...]
    vlan_table: tuple[int, ...]


class Nic(HasIdentity):
    """A network card on a tap, whatever its model.

    Attributes:
        id: the NIC's name, as configured: ``nic0``.
        tap: name of the tap.
        tap_fd: the tap's descriptor: readable while frames wait there.
        rx_backlog: frames on their way to the guest, for the packet handover of a migration.
        on_ack: called for each announcement the guest acknowledged, perhaps under the NIC's
            lock.
        on_filter: called when the guest changed the filter or its MAC address; never under the
            NIC's lock.
    """

    id: str
    tap: str
    tap_fd: int
    rx_backlog: RxBacklog
    on_ack: Callable[[], None]
    on_filter: Callable[[], None]
    #: Returns whether a frame (Ethernet) may leave, where the kernel will store a checksum at an
    #: offset or not; None: every frame may.
    gate: Callable[[bytes, int | None], bool] | None = None
    identity: ClassVar[frozenset[str]] = frozenset({"mac"})

    @property
    @abstractmethod
    def mac(self) -> bytes:
        """The MAC address in force, six bytes: the guest's, if the guest set one."""

    def lets_out(self, data: bytes) -> bool:
        """Return whether a frame of the guest's, behind its virtio_net_hdr, may leave."""
        if self.gate is None:
            return True
        flags, start, offset = _CHECKSUM.unpack_from(data)
        return self.gate(data[HEADER:], start + offset if flags & _NEEDS_CSUM else None)

    def problems(self) -> list[str]:
        """Return what the guest was promised and this host cannot give, in words."""
        return []

    @abstractmethod
    def announce(self) -> bool:
        """Have the guest announce itself, or return False if the model cannot, or declines.

        Called with the VM running, from any thread; never blocks on the guest.
        """

    @abstractmethod
    def rx_filter(self) -> RxFilterInfo:
        """Return the receive filter the guest set, from any thread."""

    @abstractmethod
    def send_from_host(self, frame: bytes) -> None:
        """Put ``frame`` (Ethernet, no FCS) on the network as if the guest had sent the frame.

        Raises:
            OSError: the tap did not take the frame.
        """
