"""A vhost-net device that moves nothing by itself, and refuses what the kernel refuses."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from godwit.host import vhost
from godwit.hw.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC

_MRG_RXBUF = 1 << 15
_VERSION_1 = 1 << 32


class FakeVhost(vhost.Vhost):
    """As :class:`godwit.host.vhost.Vhost`. Of each ring, index 0 and 1:

    Attributes:
        backends: the tap's descriptor, or -1.
        bases: where in the avail ring it is.
        calls: the eventfd that interrupts.
        refuses: names of methods that fail from now on.
        done: the calls that gave or took a ring, and those that moved a base, in order.
    """

    def __init__(self) -> None:
        self.backends = [-1, -1]
        self.bases = [0, 0]
        self.calls = [-1, -1]
        self.refuses: set[str] = set()
        self.done: list[tuple[str, int, int]] = []
        self.closed = False

    def features(self) -> int:
        """All that the backend knows of."""
        return F_EVENT_IDX | F_INDIRECT_DESC | _MRG_RXBUF | _VERSION_1 | vhost.F_LOG_ALL

    def set_features(self, features: int) -> None:
        """Not looked at."""
        self._may("set_features")

    def set_memory(self, regions: Iterable[tuple[int, int, int]]) -> None:
        """Not looked at."""
        self._may("set_memory")

    def set_log(self, address: int) -> None:
        """Not looked at."""

    def set_size(self, index: int, size: int) -> None:
        """Refused while the ring is served (drivers/vhost/vhost.c, vhost_vring_set_num)."""
        self._idle(index)

    def set_addresses(
        self, index: int, parts: tuple[int, int, int], log: bool, used_in_guest: int
    ) -> None:
        """Not looked at; allowed while the ring is served, for the log's sake."""
        self._may("set_addresses")

    def set_base(self, index: int, position: int) -> None:
        """Refused while the ring is served (vhost_vring_ioctl: EBUSY)."""
        self._idle(index)
        self.bases[index] = position
        self.done.append(("base", index, position))

    def base(self, index: int) -> int:
        """Where it is."""
        self._idle(index)  # the kernel tells it all the same, but then it is soon wrong
        return self.bases[index]

    def set_kick(self, index: int, fd: int) -> None:
        """Not looked at."""

    def set_call(self, index: int, fd: int) -> None:
        """Note it."""
        self.calls[index] = fd

    def set_backend(self, index: int, fd: int) -> None:
        """Serve a ring, or not."""
        self._may(f"set_backend {index}" if fd >= 0 else "no backend")
        self.backends[index] = fd
        self.done.append(("backend", index, fd))

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def _may(self, name: str) -> None:
        if name in self.refuses:
            raise OSError(errno.EFAULT, name)

    def _idle(self, index: int) -> None:
        if self.backends[index] >= 0:
            raise OSError(errno.EBUSY, f"ring {index} is served")
