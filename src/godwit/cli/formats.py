"""The formats of disk images: which are served by the VM itself, and which by another program."""

from __future__ import annotations

import os
from collections.abc import Iterable
from struct import Struct

from godwit.errors import ConfigError
from godwit.spec.back_ends import ImageFile, VhostUserConfig
from godwit.spec.config import QUEUE_SIZE, DeviceConfig, DiskConfig, OnError

#: The first fields of a qcow2 image (QEMU's docs/interop/qcow2.txt): magic, version, where the
#: name of a backing file is, and the disk's bytes. From version 3 on, features from byte 72.
_QCOW2, _MAGIC = Struct(">4sIQ8xQ"), b"QFI\xfb"
_FEATURES, _EXTERNAL_DATA = Struct(">72xQ"), 1 << 2
_LARGEST = 1 << 60


def with_formats(devices: Iterable[DeviceConfig]) -> tuple[DeviceConfig, ...]:
    """Return the devices, with disks other than raw ones as devices of another program.

    Raises:
        ConfigError: a disk's format is not to be guessed, or has no use for a key.
    """
    return tuple(_format(one) if isinstance(one, DiskConfig) else one for one in devices)


def _format(disk: DiskConfig) -> DeviceConfig:
    head = _head(disk.path)
    found = disk.format or _found(disk.path, head)
    if found == "raw":
        return disk
    for key, given in (
        ("serial", disk.serial != ""),
        ("on-error", disk.on_error is not OnError.ENOSPC),
        ("queue-size", disk.queue_size != QUEUE_SIZE),
    ):
        if given:
            raise ConfigError(f"--disk path={disk.path}: {key}= is for raw images; leave it out")
    direct = disk.cache == "none"
    size = _size(disk.path, head) if found == "qcow2" else None
    alone = size is not None and not _names_files(head)
    image = ImageFile(disk.path, found, disk.readonly, direct, disk.discard, size, alone)
    return VhostUserConfig(disk.id, "vhost-user-blk", queues=disk.queues, serves=image)


def _head(path: str) -> bytes:
    """Return the first bytes of an image, or none where there is none to be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return b""  # whoever opens the image explains that
    try:
        return os.read(fd, _FEATURES.size)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _found(path: str, head: bytes) -> str:
    """Return the format by an image's first bytes.

    A guest can write these into a raw disk. So what names further files is not believed.

    Raises:
        ConfigError: the image names a further file.
    """
    if not head.startswith(_MAGIC) or len(head) < _FEATURES.size:
        return "raw"
    if _names_files(head):
        raise ConfigError(
            f"--disk path={path}: it looks like qcow2 that names a further file, which a guest may "
            "have written there; give format=qcow2 if it is yours, or format=raw"
        )
    return "qcow2"


def _names_files(head: bytes) -> bool:
    """Return whether a qcow2 image has a backing file, or keeps data elsewhere."""
    _, version, backing, _ = _QCOW2.unpack_from(head)
    if version > 2 and len(head) >= _FEATURES.size:
        return bool(backing or _FEATURES.unpack(head)[0] & _EXTERNAL_DATA)
    return bool(backing)


def _size(path: str, head: bytes) -> int:
    """Return the bytes of the disk in a qcow2 image.

    Raises:
        ConfigError: the file is no such image.
    """
    size = 0
    if head.startswith(_MAGIC) and len(head) >= _QCOW2.size:
        size = _QCOW2.unpack_from(head)[3]
    if not 0 < size <= _LARGEST:
        raise ConfigError(
            f"--disk path={path}: there is no qcow2 image to be read; make one with: "
            "qemu-img create -f qcow2 FILE 10G"
        )
    return size
