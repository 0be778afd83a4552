"""The kinds of devices that can be configured: a new one is a file with a class, and a row here.

A device's module has ``make(config, slot)``. A module is imported when the first device of its kind
is made, so that a guest does not wait for the code of devices the guest lacks.
"""

from __future__ import annotations

from typing import NamedTuple

from godwit.errors import ConfigError
from godwit.spec.back_ends import VhostUserConfig
from godwit.spec.config import (
    DeviceConfig,
    DiskConfig,
    NicConfig,
    RngConfig,
    VsockConfig,
)

from .device import Device, Slot


class Kind(NamedTuple):
    """The configuration a kind of device takes, and the kind's module below ``godwit.hw``."""

    config: type[DeviceConfig]
    module: str


KINDS: dict[str, Kind] = {
    "virtio-net": Kind(NicConfig, "virtio.net.device"),
    "e1000": Kind(NicConfig, "nic.e1000.nic"),
    "virtio-blk": Kind(DiskConfig, "virtio.blk.device"),
    "virtio-rng": Kind(RngConfig, "virtio.rng"),
    "vhost-user-blk": Kind(VhostUserConfig, "virtio.vhost_user.make"),
    "vhost-user-fs": Kind(VhostUserConfig, "virtio.vhost_user.make"),
    "virtio-vsock": Kind(VsockConfig, "virtio.vsock.device"),
}


def make(config: DeviceConfig, slot: Slot) -> Device:
    """Return a device of the configured kind.

    Raises:
        ConfigError: no kind with such a configuration has that name (the message lists them), or
            the kind has no such option.
        HostError: the host lacks what the device needs.
    """
    kind = KINDS.get(config.kind)
    if kind is None or kind.config is not type(config):
        known = ", ".join(name for name, kind in KINDS.items() if kind.config is type(config))
        raise ConfigError(
            f"device '{config.id}': kind '{config.kind}' is unknown; there are {known}"
        )
    # Not importlib, which nothing else on the way to a running guest needs.
    module = __import__(f"godwit.hw.{kind.module}", fromlist=["make"])
    device: Device = module.make(config, slot)
    return device
