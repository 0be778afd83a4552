"""The kinds of devices that can be configured: a new one is a file with a class, and a row here.

A device's module has ``make(config, slot)``. A module is imported when the first device of its kind
is made, so that a guest does not wait for the code of devices the guest lacks.
"""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import ConfigError
from godwit.spec.config import DeviceConfig

from .device import Device, Slot

#: Makes a device. Raises ConfigError, HostError.
Make = Callable[[DeviceConfig, Slot], Device]


def _from(module: str) -> Make:
    def make(config: DeviceConfig, slot: Slot) -> Device:
        # Not importlib, which nothing else on the way to a running guest needs.
        loaded = __import__(f"godwit.hw.{module}", fromlist=["make"])
        device: Device = loaded.make(config, slot)
        return device

    return make


KINDS: dict[str, Make] = {
    "virtio-net": _from("virtio.net.device"),
    "e1000": _from("nic.e1000.nic"),
    "virtio-rng": _from("virtio.rng"),
}


def make(config: DeviceConfig, slot: Slot) -> Device:
    """Return a device of the configured kind.

    Raises:
        ConfigError: no kind has that name (the message lists them), or the kind has no such option.
        HostError: the host lacks what the device needs.
    """
    try:
        kind = KINDS[config.kind]
    except KeyError:
        known = ", ".join(KINDS)
        raise ConfigError(f"device kind '{config.kind}' is unknown; there are {known}") from None
    return kind(config, slot)
