"""A guest that attacks its VMM by each port, window and ring, beside a guest that does not.

What has to hold: the operator is answered within a second, the other guest keeps its network, no
message is anything but a guest error, and 'quit' and SIGTERM end the VM within a second.
"""

from __future__ import annotations

import os
import re
import signal
import time
from itertools import pairwise

import pytest
from vm_bench import Bench, Watched, resident

from lab import guest as guest_image
from lab import kernels
from lab.traffic import FLOWS

#: Seconds: five minutes by ``--whole``.
SHORT, WHOLE = 30, 300
#: An answer of QMP, and the end after 'quit' or SIGTERM. The lab's two emulated CPUs are the
#: attackers' and everybody's; a guest there costs as much as ten on a real one.
ANSWER_S = 1.0
#: The longest time without an answer of the other guest's flows, and what the VMM may grow by.
GAP_S, GROWTH = 2.0, 64 << 20
ATTACKER = "52:54:00:66:66:66"


def _attack(bench: Bench, seconds: int, seed: int, keys: str) -> Watched:
    image = kernels.cached("cloud-6.12")
    assert image is not None
    line = f"{guest_image.CMDLINE} godwit.net=off godwit.hostile={seconds},{seed}"
    return bench.run(
        bench.net.b,
        *("--kernel", str(image.vmlinuz), "--initrd", str(guest_image.build(image))),
        *("--append", line, "--rng", "id=dice"),
        nic=keys,
        mac=ATTACKER,
    )


@pytest.mark.parametrize(
    ("keys", "end"),
    [("", "quit"), ("vhost=off", "SIGTERM"), ("model=e1000", "quit")],
    ids=["vhost", "in-process", "e1000"],
)
def test_a_hostile_guest_harms_itself_alone(
    bench: Bench, request: pytest.FixtureRequest, keys: str, end: str
) -> None:
    seconds = WHOLE if request.config.getoption("--whole") else SHORT
    other = bench.traveller()
    vm = _attack(bench, seconds, 1 + len(keys), keys)
    vm.wait_console("GODWIT-GUEST-HOSTILE cpus=2", 120)
    before = resident(vm.pid)
    pings = [bench.ping(flow.id) for flow in FLOWS]
    began, slowest = time.monotonic(), 0.0
    while time.monotonic() < began + seconds - 2:
        asked = time.monotonic()
        vm.qmp.execute("query-status")
        vm.qmp.execute("query-devices")
        slowest = max(slowest, (time.monotonic() - asked) / 2)
        vm.news()
        time.sleep(0.05)  # a client that asks as fast as it can is another test
    assert vm.alive
    assert vm.status() == "running"
    assert slowest < ANSWER_S
    for ping in pings:
        ping.wait_answer(time.time(), 10)
        ping.stop()
        times = [at for at, _ in ping.answers().times]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert max(gaps) < GAP_S, ping.flow
    assert resident(vm.pid) - before < GROWTH
    other.agent.ping(10)
    errors = vm.news("GUEST_ERROR")
    assert (
        len(errors) <= 40 + 4 * seconds // 10
    )  # of four devices: five at once, one in ten seconds
    lines = [line for line in vm.console.splitlines() if line.startswith("godwit: ")]
    odd = [line for line in lines if not re.search("broke the device's rules", line)]
    assert odd == []
    asked = time.monotonic()
    if end == "quit":
        vm.qmp.execute("quit")
    else:
        os.kill(vm.pid, signal.SIGTERM)
    assert vm.wait(30) == 0
    assert time.monotonic() - asked < ANSWER_S + 1.0  # the process' own end is in it
    print(f"{seconds} s: slowest answer {slowest:.3f} s, {len(errors)} guest errors")
