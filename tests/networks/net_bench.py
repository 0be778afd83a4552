"""What the tests of other projects' networks share: a guest that boots there, and its dark time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vm_bench import Bench, Guest, Watched, stamp

from lab import guest as guest_image
from lab import kernels, qemu
from lab.agent import Agent
from lab.errors import LabError
from lab.network import Client, Host
from lab.scenario import MAC
from lab.traffic import Flow, Ping

#: The guest's untagged addresses.
GUEST = ("10.0.0.2", "fd00::2")
#: No pause of a flow may be longer from the guest's resume on, seconds.
DARK_S = 1.0
#: So long after the resume each flow is watched, seconds: a network may first forget, then learn.
_WATCHED_S = 3.0
#: A flow that does not answer so long afterwards does not recover, seconds.
_LOST_S = 15.0
_TAP = "tap0"
_CPUS = 2
_MEMORY_MB = 128


def _kernel() -> tuple[str, str, str]:
    """Return the guest's kernel, initrd and command line."""
    image = kernels.cached("cloud-6.12")
    assert image is not None, "no kernel cloud-6.12 in the cache: run scripts/setup"
    return str(image.vmlinuz), str(guest_image.build(image)), guest_image.CMDLINE


def boot(bench: Bench, host: Host, agent: Agent, keep: Sequence[Watched] = ()) -> Guest:
    """Boot a guest on a host's tap, and wait for its agent; others but those to ``keep`` end."""
    bench.drop_guest(keep)
    kernel, initrd, cmdline = _kernel()
    argv = ["--kernel", kernel, "--initrd", initrd, "--append", cmdline]
    vm = bench.run(host, *argv, tap=_TAP)
    vm.wait_ready(120)
    agent.ping(60)
    bench.guest = Guest(vm, agent, time.time())
    return bench.guest


def await_at(bench: Bench, host: Host) -> Watched:
    """Start a process on a host's tap that a guest can migrate to."""
    return bench.run(host, "--incoming", "defer", tap=_TAP)


@contextmanager
def pings(folder: Path, peer: Client) -> Iterator[list[Ping]]:
    """Have a peer ping the guest by IPv4 and IPv6, and wait until both answer."""
    with ExitStack() as stack:
        found = []
        for number, (family, address) in enumerate(zip(("ipv4", "ipv6"), GUEST, strict=True)):
            flow = Flow(number, "peer", 0, family, address, "")
            found.append(stack.enter_context(Ping(peer.netns, flow, folder, 0.05)))
        for ping in found:
            ping.wait_answer(0.0, 60)
        yield found


def dark(flows: Sequence[Ping], resumed: float) -> dict[str, float]:
    """Return each family's longest time without an answer from the resume on, in seconds.

    A flow is watched for some seconds, and then until it answers. What never does is dark for ever
    (``inf``).
    """
    return {ping.flow.family: round(_dark_s(ping, resumed), 3) for ping in flows}


def _dark_s(ping: Ping, resumed: float) -> float:
    try:
        end = ping.wait_answer(resumed + _WATCHED_S, _LOST_S)
    except LabError:
        return math.inf
    return ping.answers().dark_s(resumed, end)


@dataclass
class QemuPair:
    """A guest on QEMU at one host, and a QEMU at another to migrate to."""

    source: qemu.Qemu
    target: qemu.Qemu
    uri: str
    agent: Agent

    def migrate(self) -> float:
        """Migrate the guest, and return when it resumed (realtime, seconds)."""
        self.target.qmp.events()
        self.source.start_migration(self.uri)
        info = self.source.wait_migration()
        assert info["status"] == "completed", info
        return stamp(self.target.qmp.wait_event("RESUME", 60))


@contextmanager
def qemu_pair(bench: Bench, a: Host, b: Host, agent: Agent) -> Iterator[QemuPair]:
    """Boot a guest on QEMU at A, with a QEMU at B that waits for it."""
    bench.drop_guest()
    uri = f"unix:{bench.folder}/qemu.move"
    waits = qemu.arguments(_MEMORY_MB, _CPUS, _TAP, MAC, _kernel(), uri)
    runs = qemu.arguments(_MEMORY_MB, _CPUS, _TAP, MAC, _kernel())
    with (
        agent,
        qemu.Qemu("qemu-b", bench.folder, waits, b.netns) as target,
        qemu.Qemu("qemu-a", bench.folder, runs, a.netns) as source,
    ):
        source.wait_ready(150)
        agent.ping(60)
        yield QemuPair(source, target, uri, agent)
