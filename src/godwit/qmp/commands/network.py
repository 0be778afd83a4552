"""Commands for the NICs: show their receive filters."""

from __future__ import annotations

import enum

import msgspec

from godwit.qmp.controller import NetworkController

from .registry import Arguments, Command, Name


class FilterArguments(Arguments, frozen=True):
    """Arguments of query-rx-filter: all NICs, or one."""

    name: Name | None = None


class RxState(enum.StrEnum):
    """The frames of one sort that a filter passes: those of its table, none, or all."""

    NORMAL = "normal"
    NONE = "none"
    ALL = "all"


class RxFilter(msgspec.Struct, rename="kebab", frozen=True):
    """The RxFilterInfo of QEMU's qapi/net.json."""

    name: str
    promiscuous: bool
    multicast: RxState
    unicast: RxState
    vlan: RxState
    broadcast_allowed: bool
    multicast_overflow: bool
    unicast_overflow: bool
    main_mac: str
    vlan_table: list[int]
    unicast_table: list[str]
    multicast_table: list[str]


def _query_rx_filter(controller: NetworkController, arguments: FilterArguments) -> list[RxFilter]:
    return [
        RxFilter(
            name=name,
            promiscuous=view.promiscuous,
            multicast=RxState(view.multicast),
            unicast=RxState(view.unicast),
            vlan=RxState(view.vlan),
            broadcast_allowed=view.broadcast,
            multicast_overflow=view.multicast_overflow,
            unicast_overflow=view.unicast_overflow,
            main_mac=view.main_mac.hex(":"),
            vlan_table=list(view.vlan_table),
            unicast_table=[mac.hex(":") for mac in view.unicast_table],
            multicast_table=[mac.hex(":") for mac in view.multicast_table],
        )
        for name, view in controller.rx_filters(arguments.name)
    ]


COMMANDS = {"query-rx-filter": Command(_query_rx_filter, FilterArguments, returns=list[RxFilter])}
