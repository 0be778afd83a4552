"""A NIC's receive filter as operators and the address book see it, the same for every model."""

from __future__ import annotations

from typing import NamedTuple


class RxFilterInfo(NamedTuple):
    """The receive filter the guest set. QEMU's RxFilterInfo (qapi/net.json) has the same.

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
