"""Notifications: an eventfd a queue, signalled by KVM itself while the BAR is mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable

from godwit.host import eventfd
from godwit.host.kvm.handles import Vm

STRIDE = 4  # bytes of the notification area for each queue


class Notifications:
    """The eventfds of a device for its whole life, whose ioeventfds come and go."""

    def __init__(self, vm: Vm, count: int) -> None:
        self._vm = vm
        self.fds = [eventfd.make() for _ in range(count)]
        self._registered: list[tuple[int, int]] = []  # (eventfd, guest address)

    def kick(self, index: int) -> None:
        """Signal queue ``index``, if there is one, as if the guest had."""
        if 0 <= index < len(self.fds):
            os.eventfd_write(self.fds[index], 1)

    def register(self, base: int, queues: Iterable[int]) -> None:
        """Have 16-bit writes to the area at ``base`` signal the eventfds, without an exit.

        Other widths are legal too, and arrive as exits, and at :meth:`kick`. What was registered
        before is taken back, unless the same: each costs the kernel a grace period.
        """
        wanted = self.keep(base, queues)
        for fd, address in () if self._registered else wanted:
            try:
                self._vm.ioeventfd(fd, address, 2, True)
            except OSError:
                continue  # a guest may map two devices to one place: these arrive as exits, too
            self._registered.append((fd, address))

    def keep(self, base: int, queues: Iterable[int]) -> list[tuple[int, int]]:
        """Take back what is registered, unless right, and return what should be registered."""
        wanted = [(self.fds[index], base + STRIDE * index) for index in queues]
        if wanted != self._registered:
            self.unregister()
        return wanted

    def unregister(self) -> None:
        """Undo :meth:`register`, if there was a call."""
        while self._registered:
            self._vm.ioeventfd(*self._registered.pop(), 2, False)

    def close(self) -> None:
        """Give all of the descriptors back."""
        self.unregister()
        while self.fds:
            os.close(self.fds.pop())
