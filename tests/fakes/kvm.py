"""A VM's handle that notes what is asked of it, and asks no kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from godwit.host.kvm.handles import Vm


class Call(NamedTuple):
    """One call: its name and arguments."""

    name: str
    arguments: tuple[object, ...]


class FakeVm(Vm):
    """As :class:`godwit.host.kvm.handles.Vm`; :attr:`calls` has all calls.

    It refuses what KVM refuses of an irqfd or ioeventfd: to have one twice, to take away
    what is not there.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.calls: list[Call] = []
        #: eventfd -> GSI
        self.irqfds: dict[int, int] = {}
        #: (address, bytes) -> eventfd
        self.ioeventfds: dict[tuple[int, int], int] = {}
        #: GSI -> (address, data)
        self.routes: dict[int, tuple[int, int]] = {}
        self.lines: dict[int, bool] = {}
        self.memory: dict[int, tuple[int, int, int, bool]] = {}
        #: slot -> the bitmap that the next :meth:`dirty_log` gives, and clears.
        self.dirty: dict[int, bytes] = {}

    def count(self, name: str) -> int:
        """How often a method was called."""
        return sum(call.name == name for call in self.calls)

    def set_memory(self, slot: int, address: int, size: int, host: int, log: bool) -> None:
        """Note a memory slot."""
        self._note("set_memory", slot, address, size, host, log)
        self.memory[slot] = (address, size, host, log)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Note a line's level."""
        self._note("irq_line", gsi, level)
        self.lines[gsi] = level

    def set_routes(self, msi: Iterable[tuple[int, int, int]]) -> None:
        """Note the MSI routes; they replace the old ones."""
        routes = {gsi: (address, data) for gsi, address, data in msi}
        self._note("set_routes", routes)
        self.routes = routes

    def irqfd(self, fd: int, gsi: int, assign: bool) -> None:
        """Note an irqfd."""
        self._note("irqfd", fd, gsi, assign)
        if (fd in self.irqfds) == assign:
            raise OSError(f"irqfd {fd}: assign={assign}, but it is {self.irqfds.get(fd)}")
        if assign:
            self.irqfds[fd] = gsi
        else:
            del self.irqfds[fd]

    def ioeventfd(self, fd: int, address: int, length: int, assign: bool) -> None:
        """Note an ioeventfd."""
        self._note("ioeventfd", fd, address, length, assign)
        key = (address, length)
        if (key in self.ioeventfds) == assign:
            raise OSError(f"ioeventfd at {address:#x}: assign={assign}")
        if assign:
            self.ioeventfds[key] = fd
        else:
            del self.ioeventfds[key]

    def _note(self, name: str, *arguments: object) -> None:
        self.calls.append(Call(name, arguments))
