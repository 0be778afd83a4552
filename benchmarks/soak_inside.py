"""``python -m benchmarks.soak_inside GIVEN``: migrations in a row under load, where KVM works.

One guest migrates to and fro between two hosts, as often as asked or until the time is up. Each
migration's outcome is a row, on the disk before the next begins: the emulated host may die at any
time.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from godwit.client.errors import ClientError
from lab import clocks, guest, qemu
from lab.agent import Agent
from lab.errors import LabError
from lab.network import Host, Network
from lab.scenario import wait_for
from lab.traffic import FLOWS, Flow, Sender, Stream
from lab.vm import LabVm, vm_folder

from .inside import Rows, log
from .machines import MAC, migrate
from .plan import QEMU

_MEMORY_MB = 256
_HOT_MB, _PATTERN_MB = 8, 16
#: Starts a timer every two milliseconds, beside the network's and the memory's load.
_TIMERS = "(while :; do usleep 2000; done) </dev/null >/dev/null 2>&1 & echo"
_LOG = "dmesg | grep -i -e unstable -e stall -e lockup -e 'clocksource.*skew' || true"
#: Time of numbered packets before and after each migration, seconds.
_MARGIN_S = 0.5
_ASKED = 15


class Soak:
    """A guest under load, with its present process."""

    def __init__(self, given: dict[str, Any], net: Network, folder: Path, stack: ExitStack) -> None:
        self._given, self._net, self._folder, self._stack = given, net, folder, stack
        self._count = 0
        self._host = net.a
        self._migrations = 0
        self.vm = self._start(net.a)
        self.vm.wait_ready(90)
        self.agent = stack.enter_context(Agent("10.0.0.2", net.client.netns))
        self.agent.ping(30)
        self._checksum = self.agent.mem_start(_PATTERN_MB)
        if not given["idle"]:
            self.agent.hot_start(_HOT_MB)
            self.agent.sh(_TIMERS)
        self._stream = Stream(net.client.netns, FLOWS[2].guest)

    def _start(self, host: Host, uri: str | None = None) -> LabVm:
        """Start a process that boots the guest, or waits for the guest at ``uri``."""
        self._count += 1
        given, name = self._given, f"vm{self._count}"
        # The old process has its tap until its exit.
        tap = (host.tap, host.other_tap)[self._count // 2 % 2]
        boot = given["kernel"], given["initrd"], guest.WATCHFUL_CMDLINE
        if given["vmm"] == QEMU:
            arguments = qemu.arguments(_MEMORY_MB, given["cpus"], tap, MAC, boot, uri)
            vm: LabVm = qemu.Qemu(name, self._folder, arguments, host.netns)
        else:
            argv = ["--memory", f"{_MEMORY_MB}M", "--cpus", str(given["cpus"])]
            argv += ["--nic", f"tap={tap},mac={MAC}{given['nic']}"]
            if uri is None:
                argv += ["--kernel", boot[0], "--initrd", boot[1], "--append", boot[2]]
            else:
                argv += ["--incoming", uri]
            vm = LabVm(name, self._folder, argv, host.netns)
        return self._stack.enter_context(vm)

    def _flows(self) -> list[Flow]:
        """Return the flows of this migration's packets.

        The lab's two CPUs bear three flows: IPv4 on each network and IPv6 on each network take
        turns.
        """
        return list(FLOWS) if self._given["all_flows"] else list(FLOWS[self._migrations % 2 :: 2])

    def once(self) -> dict[str, Any]:
        """Migrate the guest once, and return the outcome.

        Raises:
            LabError, ClientError: the guest or the migration broke.
        """
        host = self._net.b if self._host is self._net.a else self._net.a
        uri = f"unix:{self._folder}/migration{self._count}"
        target = self._start(host, uri)
        target.qmp.execute("query-status", deadline=60)
        flows = self._flows()
        self._migrations += 1
        dropped = self._net.dropped()
        before = clocks.read(self.agent, _ASKED)
        self.agent.reset_flows()
        netns, rate = self._net.client.netns, self._given["rate"]
        with Sender(netns, self._folder, rate, flows) as sender:
            time.sleep(_MARGIN_S)
            migrated = migrate(self.vm, target, uri)
            self.agent.ping(30)
            time.sleep(_MARGIN_S)
            sender.stop()
        sent = sender.counts()
        handover = self._handover()
        self.vm.quit()
        self.vm.close()
        self.vm, self._host = target, host
        try:
            wait_for(lambda: not self._lost(sent), 3)
        except TimeoutError:
            pass
        counted = self.agent.flows()
        after = clocks.read(self.agent, _ASKED)
        return {
            "idle": self._given["idle"],
            "flows": [f"{flow.network} {flow.family}" for flow in flows],
            "total_ms": migrated.info["godwit"]["total-ms"],
            "downtime_ms": migrated.info["godwit"]["downtime-ms"],
            "sent": sum(sent.values()),
            "lost": self._lost(sent),
            "duplicates": sum(flow.duplicates for flow in counted.values()),
            "reordered": sum(flow.reordered for flow in counted.values()),
            "longest_gap_ms": max(flow.longest_gap_us for flow in counted.values()) / 1000,
            "handover": handover,
            # The places of the losses, if on the way.
            "dropped": {
                place: count - dropped.get(place, 0)
                for place, count in self._net.dropped().items()
                if count != dropped.get(place, 0)
            },
            "clock_ms": [
                (after.realtime - before.realtime) * 1000,
                (after.monotonic - before.monotonic) * 1000,
            ],
            "clock_error_ms": (before.error + after.error) * 1000,
            "hot_passes": 0 if self._given["idle"] else self.agent.hot_check(),
            "stream": self._stream.exchange(),
            "memory": self.agent.mem_check() == self._checksum,
            "log": self.agent.sh(_LOG),
        }

    def _handover(self) -> dict[str, Any]:
        """Return the source's report of its frames, once it looks for late ones no more."""
        report: dict[str, Any] = {}

        def over() -> bool:
            nonlocal report
            report = self.vm.qmp.execute("query-migrate").get("godwit", {}).get("handover", {})
            return bool(report.get("over") or not report)

        try:
            wait_for(over, 5)
        except TimeoutError:
            pass
        return report

    def _lost(self, sent: dict[int, int]) -> int:
        counted = self.agent.flows()
        return sum(
            counted[flow].lost(count) if flow in counted else count for flow, count in sent.items()
        )


def main() -> None:
    """Migrate as often as the command line's file asks."""
    given = json.loads(Path(sys.argv[1]).read_text())
    rows = Rows(Path(given["rows"]))
    with ExitStack() as stack:
        folder = stack.enter_context(vm_folder())
        net = stack.enter_context(Network())
        rows.add(state="boots", vmm=given["vmm"], cpus=given["cpus"])
        soak = Soak(given, net, folder, stack)
        for number in range(given["moves"]):
            rows.add(state="began")
            try:
                row = soak.once()
            except (LabError, ClientError, OSError, KeyError) as error:
                text = f"{type(error).__name__}: {error}"
                rows.add(state="broke", error=text[-600:], console=soak.vm.console[-1500:])
                raise
            rows.add(state="moved", cpus=given["cpus"], nic=given["nic"], **row)
            log(
                f"migration {number + 1}: {row['downtime_ms']:.0f} ms, of {row['sent']} packets "
                f"{row['lost']} lost, {row['duplicates']} twice, {row['reordered']} late"
            )


if __name__ == "__main__":
    main()
