"""Real machines on a fake KVM, with taps without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from unittest import mock

from godwit.host.loop import Loop
from godwit.host.net.tap import F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, F_UFO
from godwit.hw.console import Console
from godwit.machine.board import Board
from godwit.machine.machine import Machine
from godwit.machine.vcpu import StopReason
from godwit.spec.config import VmConfig, parse_devices

from .kvm import FakeCpu, FakeSystem, FakeVcpu, FakeVm
from .tap import FakeTap

#: The offloads of a tap on a present kernel.
ALL_OFFLOADS = F_CSUM | F_TSO4 | F_TSO6 | F_TSO_ECN | F_UFO
#: A NIC whose frames this process carries.
NIC = ("--nic", "tap=tap0,mac=52:54:00:12:34:56,vhost=off")


@contextmanager
def taps(offloads: int = ALL_OFFLOADS) -> Iterator[dict[str, FakeTap]]:
    """Replace new taps by fakes for the block, and collect each name's newest."""
    made: dict[str, FakeTap] = {}

    def make(name: str, mtu: int | None = None) -> FakeTap:
        made[name] = tap = FakeTap(offloads, name)
        return tap

    with (
        mock.patch("godwit.hw.virtio.net.device.Tap", make),
        mock.patch("godwit.hw.nic.e1000.nic.Tap", make),
    ):
        yield made


class Silent:
    """A console that keeps all output and shows none."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.on_space: Callable[[], None] | None = None

    def has_space(self) -> bool:
        """Return that there is space always."""
        return True

    def write(self, data: bytes) -> None:
        """Keep the output for a test."""
        self.written += data


def config(*devices: tuple[str, str], memory: int = 32 << 20, **given: object) -> VmConfig:
    """Return a configuration with these devices, as options and values."""
    return VmConfig(memory=memory, devices=parse_devices(devices), **given)  # type: ignore[arg-type]


class Host:
    """A machine on a fake KVM, paused at first.

    Attributes:
        exits: (stop reason, detail) of each exit.
        errors: (device's id, message) of each guest error.
    """

    def __init__(
        self,
        made_of: VmConfig,
        loop: Loop | None = None,
        offloads: int = ALL_OFFLOADS,
        cpu: FakeCpu | None = None,
    ) -> None:
        self.console = Silent()
        self.loop = loop or Loop()
        self.system = FakeSystem(cpu)
        self.exits: list[tuple[StopReason, str]] = []
        self.errors: list[tuple[str, str]] = []
        board = Board(made_of, lambda: self.system)
        try:
            with taps(offloads) as self.taps:
                self.machine = Machine(
                    board,
                    self.loop,
                    cast(Console, self.console),
                    lambda reason, detail: self.exits.append((reason, detail)),
                    lambda device, message: self.errors.append((device, message)),
                )
        except BaseException:
            board.close()
            raise

    @property
    def vm(self) -> FakeVm:
        """The handle of the only VM."""
        return self.system.vms[0]

    @property
    def vcpus(self) -> list[FakeVcpu]:
        """The handles of the VM's vCPUs."""
        return [thread.vcpu for thread in self.machine.vcpus]  # type: ignore[misc]

    def close(self) -> None:
        """Close the machine and the loop."""
        self.machine.close()
        self.loop.close()
