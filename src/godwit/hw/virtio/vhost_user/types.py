"""The types of devices that vhost-user serves: their numbers, features and configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct, pack_into, unpack_from
from typing import NamedTuple

from godwit.host.vhost_user import BackEnd
from godwit.spec.back_ends import VhostUserConfig

#: Disks (5.2.3): SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD,
#: WRITE_ZEROES. Not CONFIG_WCE: the configuration is read only.
_BLK = (1, 2, 4, 5, 6, 9, 10, 12, 13, 14)
F_RO, F_MQ = 1 << 5, 1 << 12
#: struct virtio_blk_config up to write zeroes, and its num_queues.
_BLK_CONFIG, _NUM_QUEUES = 60, 34
_SECTOR = 512
_FS_CONFIG = Struct("<36sI")  # tag, num_request_queues (5.11.4)


class Type(NamedTuple):
    """A type of device, with the numbers of QEMU's (hw/virtio/vhost-user-*-pci.c)."""

    device_id: int
    class_code: int
    #: Feature bits that a back end may bring.
    features: int
    #: Queues beside those that the configuration counts.
    more_queues: int
    #: Returns the configuration space, which the back end knows or we do, with so many queues.
    config: Callable[[VhostUserConfig, int, BackEnd], bytes]
    #: Returns what of the configuration space a destination must have alike.
    properties: Callable[[bytes], Mapping[str, str | int | None]]


def _blk_config(_: VhostUserConfig, queues: int, back_end: BackEnd) -> bytes:
    raw = bytearray(back_end.config(_BLK_CONFIG))
    pack_into("<H", raw, _NUM_QUEUES, queues)
    return bytes(raw)


def _blk_properties(config: bytes) -> Mapping[str, str | int | None]:
    return {"size": unpack_from("<Q", config)[0] * _SECTOR}


def _fs_config(config: VhostUserConfig, queues: int, _: BackEnd) -> bytes:
    return _FS_CONFIG.pack(config.tag.encode(), queues)


def _fs_properties(config: bytes) -> Mapping[str, str | int | None]:
    return {"tag": _FS_CONFIG.unpack(config)[0].rstrip(b"\0").decode(errors="replace")}


TYPES = {
    "vhost-user-blk": Type(
        *(2, 0x010000, sum(1 << bit for bit in _BLK), 0, _blk_config, _blk_properties)
    ),
    "vhost-user-fs": Type(26, 0x018000, 0, 1, _fs_config, _fs_properties),
}
