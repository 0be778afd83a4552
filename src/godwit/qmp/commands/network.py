"""Commands for the NICs: show their receive filters."""

from __future__ import annotations

from godwit.qmp.controller import NetworkController

from .registry import Arguments, Command


class FilterArguments(Arguments, frozen=True):
    """Arguments of query-rx-filter: all NICs, or one."""

    name: str | None = None


def _query_rx_filter(controller: NetworkController, arguments: FilterArguments) -> object:
    return [
        {
            "name": name,
            "promiscuous": view.promiscuous,
            "multicast": view.multicast,
            "unicast": view.unicast,
            "vlan": view.vlan,
            "broadcast-allowed": view.broadcast,
            "multicast-overflow": view.multicast_overflow,
            "unicast-overflow": view.unicast_overflow,
            "main-mac": view.main_mac.hex(":"),
            "vlan-table": list(view.vlan_table),
            "unicast-table": [mac.hex(":") for mac in view.unicast_table],
            "multicast-table": [mac.hex(":") for mac in view.multicast_table],
        }
        for name, view in controller.rx_filters(arguments.name)
    ]


COMMANDS = {"query-rx-filter": Command(_query_rx_filter, FilterArguments)}
