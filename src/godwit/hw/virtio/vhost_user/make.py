"""The way from a configuration to a vhost-user device."""

from __future__ import annotations

import socket

from godwit.errors import HostError
from godwit.host.storage_daemon import StorageDaemon
from godwit.host.vhost_user import BackEnd, connect
from godwit.hw.device import Slot
from godwit.hw.virtio.pci import VirtioPci
from godwit.spec.back_ends import ImageFile, VhostUserConfig
from godwit.spec.config import DeviceConfig

from .device import VirtioVhostUser
from .image import OpenedImage


def make(config: DeviceConfig, slot: Slot) -> VirtioPci:
    """Return a device behind PCI that a back end serves.

    Raises:
        HostError: no back end listens, or one cannot serve the device.
    """
    assert isinstance(config, VhostUserConfig)
    try:
        image = _image(config)
        device = VirtioVhostUser(config, slot.memory, slot.loop, _connect, image, slot.cpus)
    except HostError as error:
        where = f" at '{config.socket}'" if config.socket else ""
        raise HostError(
            f"device '{config.id}': the vhost-user back end{where}: {error}; see that it runs"
        ) from error
    return VirtioPci(device, slot)


def _image(config: VhostUserConfig) -> OpenedImage | None:
    if config.control < 0:
        return None
    assert isinstance(config.serves, ImageFile)
    return OpenedImage(config.serves, StorageDaemon(socket.socket(fileno=config.control)))


def _connect(config: VhostUserConfig) -> BackEnd:
    if config.serves is not None:
        return BackEnd(socket.socket(fileno=config.connection))
    return BackEnd(connect(config.socket))
