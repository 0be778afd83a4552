"""A vhost-vsock device that carries what a test puts there, and refuses as the kernel does."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from struct import Struct

from godwit.host import vhost, vhost_vsock
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC

_DESC, _USED = Struct("<QIHH"), Struct("<II")


class FakeVhostVsock(vhost_vsock.VhostVsock):
    """A :class:`godwit.host.vhost_vsock.VhostVsock` without a kernel.

    ``taken`` has the CIDs of the host: all fakes that share it are on one host.

    Attributes:
        running: the rings are served.
        bases: of each ring, the position in the avail ring.
        calls, kicks: of each ring, its eventfds.
        refuses: names of methods that fail from now on.
    """

    def __init__(self, taken: dict[int, FakeVhostVsock] | None = None) -> None:
        self.taken = {} if taken is None else taken
        self.cid: int | None = None
        self.owned = self.running = self.closed = False
        self.bases, self.calls, self.kicks = [0, 0], [-1, -1], [-1, -1]
        self.sizes = [0, 0]
        self.addresses = [(0, 0, 0), (0, 0, 0)]
        self.regions: list[tuple[int, int, int]] = []
        self.refuses: set[str] = set()

    def own(self) -> None:
        """Note the owner, of whom there is one."""
        assert not self.owned
        self.owned = True

    def features(self) -> int:
        """Return all features that the device knows."""
        return F_EVENT_IDX | F_INDIRECT_DESC | 1 << 1 | 1 << 32 | vhost.F_LOG_ALL

    def set_features(self, features: int) -> None:
        """Refuse features that were not offered."""
        assert not features & ~self.features()

    def set_memory(self, regions: Iterable[tuple[int, int, int]]) -> None:
        """Note the regions of guest memory."""
        assert self.owned
        self.regions = list(regions)

    def set_cid(self, cid: int) -> bool:
        """Take a CID, unless another device of the host has it."""
        if self.taken.get(cid, self) is not self:
            return False
        self._give_up()
        self.taken[cid], self.cid = self, cid
        return True

    def set_size(self, index: int, size: int) -> None:
        """Note a ring's size, or refuse while it is served."""
        self._idle()
        self.sizes[index] = size

    def set_addresses(
        self, index: int, parts: tuple[int, int, int], log: bool, used_in_guest: int
    ) -> None:
        """Note where a ring is, or refuse an alignment that the kernel refuses."""
        if parts[0] % 16 or parts[1] % 4 or parts[2] % 2:
            raise OSError(errno.EINVAL, "alignment")
        self.addresses[index] = parts

    def set_base(self, index: int, position: int) -> None:
        """Note the base, or refuse while the ring is served."""
        self._idle()
        self.bases[index] = position

    def base(self, index: int) -> int:
        """Return a ring's position, while it is not served."""
        self._idle()
        return self.bases[index]

    def set_kick(self, index: int, fd: int) -> None:
        """Note a ring's eventfd for kicks."""
        self.kicks[index] = fd

    def set_call(self, index: int, fd: int) -> None:
        """Note a ring's eventfd for interrupts."""
        self.calls[index] = fd

    def set_running(self, running: bool) -> None:
        """Serve the rings, or no longer."""
        if running and "set_running" in self.refuses:
            raise OSError(errno.EFAULT, "set_running")
        self.running = running

    def close(self) -> None:
        """Give the CID up."""
        self._give_up()
        self.running, self.closed = False, True

    # --- what the kernel does ---------------------------------------------------------------------
    def receive(self, data: bytes) -> bool:
        """Put ``data`` into the next buffer of ring 0, as the kernel does, or return False."""
        assert self.running
        desc, used, avail = self.addresses[0]
        size = self.sizes[0]
        if self._u16(avail + 2) == self.bases[0] & 0xFFFF:
            return False
        head = self._u16(avail + 4 + 2 * (self.bases[0] % size))
        left, index = data, head
        while True:
            address, length, flags, following = _DESC.unpack(
                ctypes.string_at(desc + 16 * index, _DESC.size)
            )
            piece, left = left[:length], left[length:]
            ctypes.memmove(self._host(address), piece, len(piece))
            if not flags & 1:
                break
            index = following
        assert not left, "the buffer is too short"
        at = self._u16(used + 2)
        ctypes.memmove(used + 4 + 8 * (at % size), _USED.pack(head, len(data)), _USED.size)
        ctypes.c_uint16.from_address(used + 2).value = at + 1 & 0xFFFF
        self.bases[0] = self.bases[0] + 1 & 0xFFFF
        if self.calls[0] >= 0:
            os.eventfd_write(self.calls[0], 1)
        return True

    def _host(self, address: int) -> int:
        for start, size, host in self.regions:
            if start <= address < start + size:
                return host + address - start
        raise AssertionError(f"{address:#x} is not in RAM")

    @staticmethod
    def _u16(address: int) -> int:
        return int(ctypes.c_uint16.from_address(address).value)

    def _give_up(self) -> None:
        if self.cid is not None:
            del self.taken[self.cid]
            self.cid = None

    def _idle(self) -> None:
        if self.running:
            raise OSError(errno.EBUSY, "the ring is served")
