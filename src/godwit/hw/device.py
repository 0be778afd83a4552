"""The device interface: one lifecycle for all devices.

A device is made with its :class:`Slot`, so that a half-made one does not exist. A machine drives
all of its devices the same way (:mod:`.devices`), and what some can do beside is a capability
(:mod:`.capabilities`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec

from godwit.errors import GuestError
from godwit.host.kvm.handles import Vm
from godwit.host.loop import Loop
from godwit.spec.machine_types import MachineType

from .irq import IntxLines, Routes
from .memory import GuestMemory

if TYPE_CHECKING:
    from .pci import PciBus

_FIRST_BAR = 0xE000_0000
_BAR_STRIDE = 1 << 20  # space for any device's BAR, aligned to its size
#: I/O BARs: ports above all that a PC has by tradition.
_FIRST_PORT, _PORT_STRIDE = 0xC000, 0x100

#: Receives a device's id and the rule that the guest broke.
OnGuestError = Callable[[str, str], None]


class Slot(NamedTuple):
    """All a device is made from beside its configuration."""

    memory: GuestMemory
    vm: Vm
    routes: Routes
    intx: IntxLines
    pci: PciBus
    loop: Loop
    machine: MachineType
    #: How many vCPUs the machine has.
    cpus: int
    #: The device's number on the PCI bus, for a device that is plugged in there.
    number: int
    on_guest_error: OnGuestError

    @property
    def bar(self) -> int:
        """The guest address where firmware would put BAR 0."""
        return _FIRST_BAR + (self.number - 1) * _BAR_STRIDE

    @property
    def port(self) -> int:
        """The port where firmware would put an I/O BAR."""
        return _FIRST_PORT + (self.number - 1) * _PORT_STRIDE


class Device(ABC):
    """A device of the machine. vCPUs run only between :meth:`resume` and :meth:`pause`.

    Attributes:
        kind: the device's name in the registry, the stream and error texts.
        id: the device's own name within its machine.
        version: version of :attr:`State`.
        State: the type of the saved state.
    """

    kind: ClassVar[str]
    id: str
    version: ClassVar[int] = 1
    State: ClassVar[Any]

    def properties(self) -> Mapping[str, str | int | None]:
        """Return what the guest sees of the configuration, and a destination must have alike."""
        return {}

    def parts(self) -> Sequence[object]:
        """Return the objects in which capabilities are looked for."""
        return (self,)

    def resume(self) -> None:
        """Serve the guest: its vCPUs are about to run."""

    def pause(self) -> None:
        """Begin to stop serving: the vCPUs have stopped. Work in flight may go on."""

    def paused(self, timeout: float) -> bool:
        """Wait until no work is in flight, at most ``timeout`` seconds, and return whether so.

        Called after :meth:`pause` without any lock, so that workers can finish.
        """
        return True

    @abstractmethod
    def reset(self) -> None:
        """Return to the state after power-on, while paused."""

    @abstractmethod
    def save(self) -> msgspec.Struct:
        """Return the saved state, a :attr:`State`, while paused."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Take over a saved state, a :attr:`State`, while paused.

        Raises:
            StreamError: the device cannot be in the state; the message names the field.
        """

    def close(self) -> None:
        """Give the host's resources back, while paused. Closing twice is harmless."""


class Guard:
    """A context manager that reports a guest error raised inside, and goes on behind the block."""

    __slots__ = ("_report", "_where")

    def __init__(self, report: Callable[[str], None], where: str) -> None:
        self._report, self._where = report, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, GuestError):
            return False
        self._report(f"{self._where}: {error}" if self._where else str(error))
        return True


def guarded(report: Callable[[str], None], where: str = "") -> Guard:
    """Return what reports a guest error that is raised inside, and goes on behind the block."""
    return Guard(report, where)
