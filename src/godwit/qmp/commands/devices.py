"""Commands for the devices: list them, and show their counters. Both are Godwit's own."""

from __future__ import annotations

from godwit.qmp.controller import DeviceController

from .registry import Arguments, Command


def _query_devices(controller: DeviceController, _: Arguments) -> object:
    """Return each device's id, kind, and the counters of those that count."""
    return [
        {"id": id, "kind": kind, "counters": dict(counters)}
        for id, kind, counters in controller.devices()
    ]


COMMANDS = {"query-devices": Command(_query_devices)}
