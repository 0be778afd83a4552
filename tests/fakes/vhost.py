"""A vhost-net device that carries no frames, and refuses calls as the kernel does."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from godwit.host import vhost
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC

_MRG_RXBUF = 1 << 15
_VERSION_1 = 1 << 32


class FakeVhost(vhost.VhostNet):
    """A :class:`godwit.host.vhost.VhostNet` without a kernel, with rings of index 0 and 1.

    Attributes:
        backends: of each ring, the tap's descriptor, or -1.
        bases: of each ring, the position in the avail ring.
        calls: of each ring, the eventfd that interrupts.
        refuses: names of methods that fail from now on.
        done: the calls that gave or took a ring or set a base, in order.
    """

    def __init__(self) -> None:
        self.backends = [-1, -1]
        self.bases = [0, 0]
        self.calls = [-1, -1]
        self.refuses: set[str] = set()
        self.done: list[tuple[str, int, int]] = []
        self.closed = False

    def features(self) -> int:
        """Return all features that the backend knows."""
        return F_EVENT_IDX | F_INDIRECT_DESC | _MRG_RXBUF | _VERSION_1 | vhost.F_LOG_ALL

    def set_features(self, features: int) -> None:
        """Ignore the features, unless refused."""
        self._may("set_features")

    def set_memory(self, regions: Iterable[tuple[int, int, int]]) -> None:
        """Ignore the regions, unless refused."""
        self._may("set_memory")

    def set_log(self, address: int) -> None:
        """Ignore the dirty log's address."""

    def set_size(self, index: int, size: int) -> None:
        """Refuse the call while the ring is served (drivers/vhost/vhost.c, vhost_vring_set_num)."""
        self._idle(index)

    def set_addresses(
        self, index: int, parts: tuple[int, int, int], log: bool, used_in_guest: int
    ) -> None:
        """Ignore the addresses, which the log needs set also while the ring is served."""
        self._may("set_addresses")

    def set_base(self, index: int, position: int) -> None:
        """Note the base, or refuse the call while the ring is served (vhost_vring_ioctl: EBUSY)."""
        self._idle(index)
        self.bases[index] = position
        self.done.append(("base", index, position))

    def base(self, index: int) -> int:
        """Return the ring's position, or refuse the call while the ring is served."""
        self._idle(index)  # the kernel answers all the same, but then the position is soon wrong
        return self.bases[index]

    def set_kick(self, index: int, fd: int) -> None:
        """Ignore a ring's eventfd for kicks."""

    def set_call(self, index: int, fd: int) -> None:
        """Note a ring's eventfd for interrupts."""
        self.calls[index] = fd

    def set_backend(self, index: int, fd: int) -> None:
        """Serve a ring, or no longer."""
        self._may(f"set_backend {index}" if fd >= 0 else "no backend")
        self.backends[index] = fd
        self.done.append(("backend", index, fd))

    def close(self) -> None:
        """Note that the device is closed."""
        self.closed = True

    def _may(self, name: str) -> None:
        if name in self.refuses:
            raise OSError(errno.EFAULT, name)

    def _idle(self, index: int) -> None:
        if self.backends[index] >= 0:
            raise OSError(errno.EBUSY, f"ring {index} is served")
