"""One guest of one VMM in the lab's network, on either host."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lab.addresses import LANS
from lab.agent import Agent
from lab.network import Network
from lab.traffic import FLOWS, Flow
from lab.vm import LabVm

from . import machines, plan
from .machines import Image


class Guest:
    """One guest from its boot on, on either host, closed with the stack."""

    def __init__(
        self,
        job: plan.Job,
        rates: plan.Rates,
        image: Image,
        net: Network,
        folder: Path,
        stack: ExitStack,
    ) -> None:
        self.job = job
        self.rates = rates
        self._image = image
        self.net = net
        self.folder = folder
        self.stack = stack
        self.memory_mb = plan.MEMORY_MB[job.guest]
        self.host = net.a
        self.last_target: LabVm | None = None
        self._count = 0
        self.vm = stack.enter_context(
            machines.boot(job.vmm, "vm0", folder, net.a, self.memory_mb, image)
        )
        # Beside the boot if that is not measured: a process takes its time on an emulated CPU.
        self._spare = None if {"boot", "network"} & {*job.parts} else self._start_target()
        self.boot_s = self.vm.wait_ready(90)
        self.agent = stack.enter_context(Agent(LANS[0].guest[0], net.client.netns))
        self.agent.ping(30)

    def target(self) -> tuple[LabVm, str]:
        """Return a process on the other host that waits for the guest, and its URI."""
        target, uri = self._spare or self._start_target()
        self._spare = None
        self.last_target = target
        target.qmp.execute("query-status", deadline=60)
        return target, uri

    def printed(self) -> dict[str, str]:
        """Return the end of each process's output, the guest's console included."""
        vms = [self.vm, *([self.last_target] if self.last_target else [])]
        return {vm.name: vm.console[-1500:] for vm in vms}

    def _start_target(self) -> tuple[LabVm, str]:
        self._count += 1
        host = self.net.a if self.host is self.net.b else self.net.b
        target, uri = machines.await_guest(
            self.job.vmm, f"vm{self._count}", self.folder, host, self.memory_mb, self._image
        )
        self.stack.enter_context(target)
        return target, uri

    def arrive(self, target: LabVm) -> None:
        """Take ``target`` for the guest's process, and close the one that the guest left."""
        self.agent.ping(30)
        self.vm.close()
        self.vm = target
        self.host = self.net.a if self.host is self.net.b else self.net.b

    def flows(self, families: int, later: int = 0) -> list[Flow]:
        """Return the flows whose turn comes in this repetition, or ``later`` turns later."""
        count = self.rates.networks_at_once
        first = self.job.repetition * count + later
        chosen = [plan.NETWORKS[(first + n) % len(plan.NETWORKS)] for n in range(count)]
        found = [[flow for flow in FLOWS if flow.network == name] for name in chosen]
        # One family at a time: the other one the next time round.
        turn = self.job.repetition * count // len(plan.NETWORKS) % 2
        return [flow for pair in found for flow in (pair if families == 2 else pair[turn:][:1])]
