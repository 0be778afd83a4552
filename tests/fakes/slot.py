"""A slot for one device under test: buses, routes and a loop, with a fake KVM below."""

from __future__ import annotations

from godwit.host.loop import Loop
from godwit.hw.bus import MmioBus, PortBus
from godwit.hw.device import Slot
from godwit.hw.irq import IntxLines, Routes
from godwit.hw.memory import GuestMemory
from godwit.hw.pci import CONFIG_ADDRESS, PciBus
from godwit.spec.machine_types import DEFAULT, machine_type

from .kvm import FakeVm


class Board:
    """The machine's side of a device: everything but vCPUs.

    Attributes:
        errors: (device's id, message) of each guest error.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.vm = FakeVm()
        self.loop = Loop()
        self.ports, self.mmio = PortBus(), MmioBus()
        self.bus = PciBus(self.mmio, self.ports)
        self.ports.map(CONFIG_ADDRESS, 8, self.bus)
        self.routes, self.intx = Routes(self.vm), IntxLines(self.vm)
        self.errors: list[tuple[str, str]] = []

    def slot(self, number: int = 1, cpus: int = 1) -> Slot:
        """Return the slot of this number, in a machine of so many vCPUs."""
        return Slot(
            memory=self.memory,
            vm=self.vm,
            routes=self.routes,
            intx=self.intx,
            pci=self.bus,
            loop=self.loop,
            machine=machine_type(DEFAULT),
            cpus=cpus,
            number=number,
            on_guest_error=lambda device, message: self.errors.append((device, message)),
        )

    def close(self) -> None:
        """Close the loop, but no device, which its owner closes."""
        self.loop.close()
