"""Commands for the devices: list them with their counters, and answer for disks."""

from __future__ import annotations

import msgspec

from godwit.qmp.controller import DeviceController

from .registry import Arguments, Command


class DeviceInfo(msgspec.Struct, frozen=True):
    """A device, what the guest sees of its configuration, and its counters, if it has any."""

    id: str
    kind: str
    counters: dict[str, int]
    properties: dict[str, str | int | None]


def _query_devices(controller: DeviceController, _: Arguments) -> list[DeviceInfo]:
    return [
        DeviceInfo(id, kind, dict(counters), dict(properties))
        for id, kind, counters, properties in controller.devices()
    ]


def _query_block(_: DeviceController, __: Arguments) -> list[object]:
    # Disks are in query-devices; who asks for all that there is gets no refusal.
    return []


COMMANDS = {
    "query-devices": Command(_query_devices, returns=list[DeviceInfo]),
    "query-block": Command(_query_block, returns=list[dict[str, object]]),
}
