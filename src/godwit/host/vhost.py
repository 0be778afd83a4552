"""vhost: ioctl numbers, structs and handles (include/uapi/linux/vhost.h, vhost_types.h)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from struct import Struct

from godwit.errors import HostError

from .ioctl import io, ioctl, ioctl_in, ioctl_out, ior, iow, iowr

DEVICE = "/dev/vhost-net"

VHOST = 0xAF

MEMORY_HEADER = Struct("=II")  # nregions, padding
MEMORY_REGION = Struct("=QQQQ")  # guest_phys_addr, memory_size, userspace_addr, flags
VRING_STATE = Struct("=II")  # index, num
VRING_ADDR = Struct("=IIQQQQ")  # index, flags, desc, used, avail, log_guest_addr
VRING_FILE = Struct("=Ii")  # index, fd

GET_FEATURES = ior(VHOST, 0x00, 8)
SET_FEATURES = iow(VHOST, 0x00, 8)
SET_OWNER = io(VHOST, 0x01)
SET_MEM_TABLE = iow(VHOST, 0x03, MEMORY_HEADER.size)
SET_LOG_BASE = iow(VHOST, 0x04, 8)
SET_VRING_NUM = iow(VHOST, 0x10, VRING_STATE.size)
SET_VRING_ADDR = iow(VHOST, 0x11, VRING_ADDR.size)
SET_VRING_BASE = iow(VHOST, 0x12, VRING_STATE.size)
GET_VRING_BASE = iowr(VHOST, 0x12, VRING_STATE.size)
SET_VRING_KICK = iow(VHOST, 0x20, VRING_FILE.size)
SET_VRING_CALL = iow(VHOST, 0x21, VRING_FILE.size)
NET_SET_BACKEND = iow(VHOST, 0x30, VRING_FILE.size)

VRING_F_LOG = 1
F_LOG_ALL = 1 << 26
LOG_PAGE = 4096


class Vhost:
    """An open vhost device, whose rings the kernel serves.

    While a ring is served, the kernel refuses another base. All methods raise OSError when the
    kernel refuses.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def own(self) -> None:
        """Give the device this process as its owner, once, before all else."""
        ioctl(self._fd, SET_OWNER)

    def features(self) -> int:
        """Return the feature bits the kernel offers."""
        raw = bytearray(8)
        ioctl_out(self._fd, GET_FEATURES, raw)
        return int.from_bytes(raw, "little")

    def set_features(self, features: int) -> None:
        """Set the feature bits in use.

        :data:`F_LOG_ALL` may change while rings are served.
        """
        self._put(SET_FEATURES, features.to_bytes(8, "little"))

    def set_memory(self, regions: Iterable[tuple[int, int, int]]) -> None:
        """Set the guest's memory, as (guest address, bytes, address in this process)."""
        packed = [MEMORY_REGION.pack(*region, 0) for region in regions]
        self._put(SET_MEM_TABLE, MEMORY_HEADER.pack(len(packed), 0) + b"".join(packed))

    def set_log(self, address: int) -> None:
        """Set the address, in this process, of the bitmap of written pages."""
        self._put(SET_LOG_BASE, address.to_bytes(8, "little"))

    def set_size(self, index: int, size: int) -> None:
        """Set the number of descriptors in a ring."""
        self._put(SET_VRING_NUM, VRING_STATE.pack(index, size))

    def set_addresses(
        self, index: int, parts: tuple[int, int, int], log: bool, used_in_guest: int
    ) -> None:
        """Set where a ring's descriptors, used and avail ring are in this process.

        With ``log``, writes to the used ring are logged as at guest address ``used_in_guest``.
        """
        flags = VRING_F_LOG if log else 0
        self._put(SET_VRING_ADDR, VRING_ADDR.pack(index, flags, *parts, used_in_guest))

    def set_base(self, index: int, position: int) -> None:
        """Set the position in the avail ring to go on from, modulo 65,536."""
        self._put(SET_VRING_BASE, VRING_STATE.pack(index, position))

    def base(self, index: int) -> int:
        """Return the position in the avail ring the kernel would go on from, modulo 65,536."""
        state = bytearray(VRING_STATE.pack(index, 0))
        ioctl_out(self._fd, GET_VRING_BASE, state)
        position: int = VRING_STATE.unpack(state)[1]
        return position & 0xFFFF

    def set_kick(self, index: int, fd: int) -> None:
        """Set the eventfd by which the guest notifies the host of a ring."""
        self._put(SET_VRING_KICK, VRING_FILE.pack(index, fd))

    def set_call(self, index: int, fd: int) -> None:
        """Set the eventfd by which a ring interrupts the guest, -1 for none."""
        self._put(SET_VRING_CALL, VRING_FILE.pack(index, fd))

    def close(self) -> None:
        """Close the descriptor, unless closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _put(self, request: int, data: bytes) -> None:
        ioctl_in(self._fd, request, data)


class VhostNet(Vhost):
    """An open ``/dev/vhost-net`` with two rings: 0 to the guest, 1 from the guest.

    Raises:
        HostError: vhost-net is missing, or refuses; the message names the other backend.
    """

    def __init__(self) -> None:
        try:
            fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"{DEVICE}: {error.strerror}; load the module (modprobe vhost_net), or use the "
                "in-process backend (vhost=off)"
            ) from error
        super().__init__(fd)
        try:
            self.own()
        except OSError as error:
            self.close()
            raise HostError(f"{DEVICE}: {error}; use the in-process backend (vhost=off)") from error

    def set_backend(self, index: int, fd: int) -> None:
        """Set the tap that serves a ring, -1 for none.

        With -1 the kernel gives back the descriptors that were prefetched.
        """
        self._put(NET_SET_BACKEND, VRING_FILE.pack(index, fd))
