"""What the tests of other projects' networks share: a guest that boots there, and its dark time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from vm_bench import Bench, Guest, Watched

from lab import guest as guest_image
from lab import kernels
from lab.agent import Agent
from lab.errors import LabError
from lab.network import Client, Host
from lab.traffic import Flow, Ping

#: No pause of a flow may be longer from the guest's resume on, seconds.
DARK_S = 1.0
#: So long after the resume each flow is watched, seconds: a network may first forget, then learn.
_WATCHED_S = 3.0
#: A flow that does not answer so long afterwards does not recover, seconds.
_LOST_S = 15.0
_TAP = "tap0"


def boot(
    bench: Bench, host: Host, agent: Agent, keep: Sequence[Watched] = (), nic: str = ""
) -> Guest:
    """Boot a guest on a host's tap, and wait for its agent; others but those to ``keep`` end."""
    bench.drop_guest(keep)
    image = kernels.cached("cloud-6.12")
    assert image is not None, "no kernel cloud-6.12 in the cache: run scripts/setup"
    argv = ["--kernel", str(image.vmlinuz), "--initrd", str(guest_image.build(image))]
    vm = bench.run(host, *argv, "--append", guest_image.CMDLINE, tap=_TAP, nic=nic)
    vm.wait_ready(120)
    agent.ping(60)
    bench.guest = Guest(vm, agent, time.time(), nic)
    return bench.guest


def await_at(bench: Bench, host: Host, nic: str = "") -> Watched:
    """Start a process on a host's tap that a guest can migrate to."""
    return bench.run(host, "--incoming", "defer", tap=_TAP, nic=nic)


def ping(bench: Bench, peer: Client, address: str, number: int) -> Ping:
    """Return a running ping of the guest, by a peer."""
    family = "ipv6" if ":" in address else "ipv4"
    flow = Flow(number, "peer", 0, family, address, "")
    return Ping(peer.netns, flow, bench.folder, 0.05)


def dark_s(ping: Ping, resumed: float) -> float:
    """Return the longest time without an answer from the resume on, in seconds.

    The flow is watched for some seconds, and then until it answers: for ever (``inf``) is dark what
    does not.
    """
    try:
        end = ping.wait_answer(resumed + _WATCHED_S, _LOST_S)
    except LabError:
        return math.inf
    times = [resumed, *(at for at, _ in ping.answers().times if resumed < at <= end)]
    return max(later - earlier for earlier, later in itertools.pairwise(times))
