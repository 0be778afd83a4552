"""A VM with its loop on a fake KVM, as its operator has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from unittest import mock

from godwit.errors import HostError
from godwit.host.loop import Loop
from godwit.hw.console import Console
from godwit.machine.board import Board
from godwit.migration.outgoing import Outgoing
from godwit.qmp.commands.migration import MigrationInfo, OwnInfo
from godwit.spec.machine_types import DEFAULT, machine_type
from godwit.spec.runstate import RunState
from godwit.vm.vm import Vmm
from migration_bench import IMPATIENT
from tests.fakes.host import NIC, Silent, config, taps
from tests.fakes.kvm import FakeSystem, FakeVcpu

S = RunState


class StrictOwn(OwnInfo, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """OwnInfo, and nothing else."""


class Strict(MigrationInfo, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """MigrationInfo, and nothing else."""

    godwit: StrictOwn | None = None


RNG = ("--rng", "id=dice")


class Place:
    """A VM, with its events and what its operator reads."""

    def __init__(self, *devices: tuple[str, str], **given: Any) -> None:
        self.loop, self.system = Loop(), FakeSystem()
        self.events: list[tuple[str, dict[str, object]]] = []
        self.text: list[str] = []
        absent = HostError("not in a unit test")
        with (
            taps() as self.taps,
            mock.patch("godwit.announce.monitors.TapWatch", side_effect=absent),
            mock.patch("godwit.announce.monitors.Ports", side_effect=absent),
            mock.patch.object(
                Vmm, "_emit", lambda vmm, name, data: self.events.append((name, data))
            ),
        ):
            machine = machine_type(given.pop("machine", DEFAULT))
            made_of = config(*(devices or (NIC,)), machine=machine)
            board = Board(made_of, lambda: self.system)
            self.vm = Vmm(
                board,
                self.loop,
                cast(Console, Silent()),
                log=self.text.append,
                times=IMPATIENT,
                **given,
            )
        self.vm._emit = lambda name, data: self.events.append((name, data))  # type: ignore[method-assign]
        self.vm.announcer._report = self.vm._emit

    @property
    def vcpu(self) -> FakeVcpu:
        return cast(FakeVcpu, self.vm.machine.vcpus[0].vcpu)

    def run_until(self, done: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        for _ in range(2000):
            if done():
                return
            self.loop.run_once(0.05)
        raise AssertionError("it is never so")

    def named(self, name: str) -> list[dict[str, object]]:
        return [data for event, data in self.events if event == name]

    def finish_migration(self) -> None:
        outgoing = self.vm.migrations._outgoing
        assert isinstance(outgoing, Outgoing)
        assert outgoing._over.wait(60), "its thread may look for late packets on"

    def close(self) -> None:
        self.vm.close()
        self.loop.close()
