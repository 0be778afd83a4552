"""vhost's numbers and structs (include/uapi/linux/vhost.h, vhost_types.h)."""

from __future__ import annotations

from struct import Struct

from .ioctl import io, ior, iow, iowr

_VHOST = 0xAF

MEMORY_HEADER = Struct("=II")  # nregions, padding
MEMORY_REGION = Struct("=QQQQ")  # guest_phys_addr, memory_size, userspace_addr, flags
VRING_STATE = Struct("=II")  # index, num
VRING_ADDR = Struct("=IIQQQQ")  # index, flags, desc, used, avail, log_guest_addr
VRING_FILE = Struct("=Ii")  # index, fd

GET_FEATURES = ior(_VHOST, 0x00, 8)
SET_FEATURES = iow(_VHOST, 0x00, 8)
SET_OWNER = io(_VHOST, 0x01)
SET_MEM_TABLE = iow(_VHOST, 0x03, MEMORY_HEADER.size)
SET_LOG_BASE = iow(_VHOST, 0x04, 8)
SET_VRING_NUM = iow(_VHOST, 0x10, VRING_STATE.size)
SET_VRING_ADDR = iow(_VHOST, 0x11, VRING_ADDR.size)
SET_VRING_BASE = iow(_VHOST, 0x12, VRING_STATE.size)
GET_VRING_BASE = iowr(_VHOST, 0x12, VRING_STATE.size)
SET_VRING_KICK = iow(_VHOST, 0x20, VRING_FILE.size)
SET_VRING_CALL = iow(_VHOST, 0x21, VRING_FILE.size)
NET_SET_BACKEND = iow(_VHOST, 0x30, VRING_FILE.size)

VRING_F_LOG = 1
F_LOG_ALL = 1 << 26
LOG_PAGE = 4096
