"""``python -m lab.scenario OUT KERNEL INITRD``: the demo's scenario, where KVM works.

A guest boots on host A, answers six flows, migrates to host B and back, and OUT gets the
observations: ``scenario.json`` and the capture ``client.pcap``. Nothing is judged here.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import guest
from .agent import Agent, Flow
from .network import Host, Network
from .traffic import ANNOUNCING, FLOWS, Capture, Ping, Sender, Stream
from .vm import LabVm, vm_folder

MAC = "52:54:00:67:77:01"
MEMORY = "128M"
_PORT = 4444
_PATTERN_MB = 16
_DONE = ("completed", "failed", "cancelled")


class Scenario:
    """One run of the demo's scenario.

    Raises:
        LabError, ClientError: the run cannot go on.
    """

    def __init__(self, out: Path, kernel: str, initrd: str) -> None:
        self._out = out
        self._kernel = kernel
        self._initrd = initrd
        self._start = time.monotonic()
        self._result: dict[str, Any] = {"moves": []}

    def log(self, text: str) -> None:
        """Print a line of progress with the time since the beginning."""
        print(f"[{time.monotonic() - self._start:6.2f} s] {text}", flush=True)

    def run(self) -> None:
        """Run the scenario from boot to end, and write ``scenario.json``."""
        with ExitStack() as stack:
            # Programs write here, not into the shared folder, which is slow in the lab.
            folder = stack.enter_context(vm_folder())
            net = stack.enter_context(Network())
            client = net.client.netns
            self.log("hosts A and B, a VLAN-filtering switch and a client are there")
            capture = stack.enter_context(
                Capture(client, net.client.interface, folder / "client.pcap", ANNOUNCING)
            )
            source = stack.enter_context(self._boot(net.a))
            took = source.wait_ready(90)
            self._result["boot_s"] = round(took, 3)
            self.log(f"the guest on A is up, {took:.1f} s after its start")
            target = stack.enter_context(self._await(net.b, "b", net.b.tap))
            back = stack.enter_context(self._await(net.a, "a2", net.a.other_tap))
            for vm in (source, target, back):
                vm.qmp.execute("query-status")
            self.log("on B, and on A for the way back, a process waits for the guest")
            agent = stack.enter_context(Agent("10.0.0.2", client))
            agent.ping(30)
            self._result["cpus"] = agent.cpus()
            checksum = agent.mem_start(_PATTERN_MB)
            stream = Stream(client, "10.0.100.2")
            stack.callback(stream.close)
            self._result["tcp"] = [stream.exchange()]
            sender = stack.enter_context(Sender(client, folder))
            pings = [stack.enter_context(Ping(client, flow, folder)) for flow in FLOWS]
            self._settle(pings)
            self.log("six flows answer: three networks, IPv4 and IPv6")

            self._migrate(source, target, net.b, pings)
            self._result["tcp"].append(stream.exchange())
            source.quit()
            self._migrate(target, back, net.a, pings)
            self._result["tcp"].append(stream.exchange())
            target.quit()
            self._result["memory"] = agent.mem_check() == checksum
            self.log("memory checked, TCP still carries data")

            self._settle(pings)
            for ping in pings:
                ping.stop()
            sender.stop()
            flows = agent.flows()
            capture.stop()
            sent = sender.counts()
            shutil.copy(capture.path, self._out)
            self._result["flows"] = [
                self._flow(ping, sent[ping.flow.id], flows.get(ping.flow.id)) for ping in pings
            ]
        (self._out / "scenario.json").write_text(json.dumps(self._result))

    @staticmethod
    def _flow(ping: Ping, sent: int, counted: Flow | None) -> dict[str, Any]:
        answers = ping.answers()
        return {
            "flow": ping.flow.id,
            "ping_sent": answers.sent,
            "ping_received": answers.received,
            "answers": [at for at, _ in answers.times],
            "udp_sent": sent,
            "udp_received": counted.received - counted.duplicates if counted else 0,
            "udp_duplicates": counted.duplicates if counted else 0,
            "udp_reordered": counted.reordered if counted else 0,
        }

    def _nic(self, tap: str) -> str:
        return f"tap={tap},mac={MAC}"

    def _boot(self, host: Host) -> LabVm:
        arguments = ["--kernel", self._kernel, "--initrd", self._initrd, "--append", guest.CMDLINE]
        arguments += ["--memory", MEMORY, "--cpus", "2", "--nic", self._nic(host.tap)]
        return LabVm("a", Path("/run"), arguments, host.netns)

    def _await(self, host: Host, name: str, tap: str) -> LabVm:
        arguments = ["--incoming", f"tcp:{host.management}:{_PORT}", "--insecure"]
        arguments += ["--memory", MEMORY, "--cpus", "2", "--nic", self._nic(tap)]
        return LabVm(name, Path("/run"), arguments, host.netns)

    def _settle(self, pings: list[Ping]) -> None:
        now = time.time()
        for ping in pings:
            ping.wait_answer(now)

    def _migrate(self, source: LabVm, target: LabVm, host: Host, pings: list[Ping]) -> None:
        """Migrate the guest, show the copy, and wait for the announcement's end and for answers."""
        target.qmp.execute("query-status")
        target.qmp.events()
        source.qmp.events()
        began = time.time()
        self.log(f"migrating the guest to {host.management} ...")
        source.start_migration(f"tcp:{host.management}:{_PORT}", insecure=True)
        info = self._watch(source)
        resumed = target.qmp.wait_event("RESUME", 30)["timestamp"]
        resume = resumed["seconds"] + resumed["microseconds"] / 1e6
        if info["status"] == "completed":
            acked = target.qmp.wait_event("ANNOUNCE_ACKED", 30)["data"]["ms"]
            for ping in pings:
                ping.wait_answer(resume)
            wait_for(lambda: rounds(target) >= 5, 30)
        else:
            acked = None
        arrived = target.qmp.execute("query-migrate")["godwit"]
        self.log(
            f"{info['status']}: {info['total-time']:.0f} ms in all, stopped for "
            f"{info.get('downtime', 0):.0f} ms, acknowledged after {acked or 0:.0f} ms"
        )
        self._result["moves"].append(
            {
                "began": began,
                "resumed": resume,
                "ended": time.time(),
                "source": info,
                "destination": arrived,
                "ack_ms": acked,
                "source_runstates": runstates(source),
            }
        )

    def _watch(self, source: LabVm) -> dict[str, Any]:
        """Print the copy's progress until its end, and return query-migrate's last answer."""
        while True:
            info = dict(source.qmp.execute("query-migrate"))
            if info["status"] in _DONE:
                return info
            ram = info.get("ram", {})
            self.log(
                f"  {info['status']}: {ram.get('transferred', 0) / 1e6:.1f} MB sent, "
                f"round {ram.get('dirty-sync-count', 0) + 1}"
            )
            source.qmp.wait_any("MIGRATION", 0.25)


def wait_for(condition: Callable[[], bool], deadline: float) -> None:
    """Ask until ``condition`` holds.

    Raises:
        TimeoutError: ``condition`` does not hold within ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the condition did not hold within {deadline:g} s")
        time.sleep(0.05)  # what is asked for has no event of its own


def rounds(vm: LabVm) -> int:
    """Return how many announcement rounds every NIC of a guest that arrived has made."""
    records = vm.qmp.execute("query-migrate")["godwit"]["announce"]
    return min((int(record["rounds"]) for record in records), default=0)


def runstates(vm: LabVm) -> list[str]:
    """Return the run states that a VM has been in, in order."""
    states: list[str] = vm.qmp.execute("query-migrate")["godwit"]["runstates"]
    return states


if __name__ == "__main__":
    Scenario(Path(sys.argv[1]), sys.argv[2], sys.argv[3]).run()
