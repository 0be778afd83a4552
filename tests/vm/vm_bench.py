"""What the VM tests share: VMs in the lab's network, a guest that travels, and how it is moved.

A guest costs ten seconds and a process three on an emulated CPU. So one guest serves many tests
(:meth:`Bench.traveller`), and the process that it will move to next starts while it is busy.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from godwit.client.vm import Vm, VmGone
from lab import guest as guest_image
from lab import kernels
from lab.agent import Agent, Flow
from lab.network import Host, Network
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import ANNOUNCING, FLOWS, Capture, Ping, Sender
from lab.vm import LabVm

#: For a module to which the data path does not matter.
ONE_BACKEND = pytest.mark.parametrize("backend", ["vhost"], indirect=True, scope="session")

#: After the resume each flow answers within so long, seconds, whoever announced its address, guest
#: or host, and whatever the NIC. Without an announcement it would be the switches' ageing: 300.
RECOVERS_S = 5.0
ENDS = ("completed", "failed", "cancelled")
TAPS = tuple(f"tap{number}" for number in range(12))
#: Taps of each host that are given to nobody: for further NICs of the one guest that has them.
MORE_TAPS = tuple(f"more{number}" for number in range(3))
_RAM_KB = 64 << 10  # no other mapping of a VMM's is as big as its guest's RAM
Event = Mapping[str, Any]


def stamp(event: Event) -> float:
    """When an event happened: realtime, seconds."""
    at = event["timestamp"]
    return float(at["seconds"] + at["microseconds"] / 1e6)


class Watched(LabVm):
    """A VM all of whose events are kept."""

    def __init__(
        self,
        name: str,
        folder: Path,
        argv: list[str],
        host: Host,
        tap: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, folder, argv, host.netns, env)
        self.host = host
        self.tap = tap
        self.seen: list[Event] = []
        self._since = 0

    def mark(self) -> None:
        """What happened up to now is the past."""
        self._since = len(self._look())

    def news(self, *names: str) -> list[Event]:
        """Events of these names (or all) since the mark."""
        return [e for e in self._look()[self._since :] if not names or e["event"] in names]

    def event(
        self, name: str, match: Callable[[Any], bool] = lambda data: True, deadline: float = 60.0
    ) -> Event:
        """The first such event since the mark; waits for it."""
        end = time.monotonic() + deadline
        while True:
            for event in self.news(name):
                if match(event.get("data", {})):
                    return event
            if time.monotonic() > end:
                raise VmGone(f"{self.name}: no {name} in {deadline:g} s; saw {self.seen}")
            time.sleep(0.02)  # between two looks at what the client has taken in

    def transitions(self) -> list[tuple[str, str]]:
        """Run states since the mark, as the events told them."""
        told = [event["data"] for event in self.news("RUN_STATE")]
        return [(data["from"], data["to"]) for data in told]

    def start_migration(self, uri: str, insecure: bool = True) -> None:
        """Begin to migrate the guest to ``uri``."""
        self.mark()
        super().start_migration(uri, insecure)

    def wait_migration(self, deadline: float = 60.0) -> dict[str, Any]:
        """Wait for the migration's end, and return query-migrate's answer."""
        self.event("MIGRATION", lambda data: data["status"] in ENDS, deadline)
        return dict(self.qmp.execute("query-migrate"))

    def _look(self) -> list[Event]:
        self.seen += self.qmp.events()
        return self.seen


@dataclass
class Guest:
    """A guest, wherever it runs."""

    vm: Watched
    agent: Agent
    ready: float
    """When it said that it was, realtime, seconds."""
    nic: str = ""
    """What its NIC was given beside tap and MAC, here and wherever it goes."""


@dataclass(frozen=True)
class Moved:
    """A move that succeeded. Times are realtime, seconds."""

    info: dict[str, Any]
    source: Watched
    target: Watched
    loaded: float
    """The guest was there and about to start."""
    resumed: float


@dataclass
class Bench:
    """The network and the VMs in it."""

    net: Network
    folder: Path
    vms: list[Watched] = field(default_factory=list)
    guest: Guest | None = None
    _count: int = 0
    _shared: Guest | None = None
    _spares: dict[tuple[str, str], Watched] = field(default_factory=dict)

    # --- processes --------------------------------------------------------------------------------
    def run(
        self,
        host: Host,
        *arguments: str,
        nic: str = "",
        cpus: int = 2,
        memory: str = "128M",
        mac: str = MAC,
        tap: str = "",
        more_nics: Sequence[str] = (),
    ) -> Watched:
        """``godwit run`` on a host, with a NIC on a free tap; ``nic``: more of its keys.

        ``more_nics`` are the guest's eth1 and so on, with their taps: see :data:`MORE_TAPS`.
        """
        tap = tap or self.free_tap(host)
        self._count += 1
        argv = [*arguments, "--memory", memory, "--cpus", str(cpus)]
        argv += ["--nic", f"tap={tap},mac={mac}{',' if nic else ''}{nic}"]
        argv += [word for keys in more_nics for word in ("--nic", keys)]
        vm = Watched(f"vm{self._count}", self.folder, argv, host, tap)
        self.vms.append(vm)
        return vm

    def boot(
        self,
        *arguments: str,
        kernel: str = "cloud-6.12",
        initrd: Path | None = None,
        keep: Sequence[Watched] = (),
        deadline: float = 120.0,
        **more: Any,
    ) -> Guest:
        """Boot a guest on host A, and wait for its agent. All VMs but spares and those to
        ``keep`` end first: there is one guest at a time. ``initrd``: another than the lab's own,
        with its agent."""
        self.drop_guest(keep)
        image = kernels.cached(kernel)
        assert image is not None, f"no kernel {kernel} in the cache: run scripts/setup"
        argv = ["--kernel", str(image.vmlinuz), "--initrd", str(initrd or guest_image.build(image))]
        vm = self.run(self.net.a, *argv, "--append", guest_image.CMDLINE, *arguments, **more)
        vm.qmp.execute("query-status")
        vm.wait_ready(deadline)
        ready = time.time()
        agent = Agent("10.0.0.2", self.net.client.netns)
        agent.ping(60)
        self.guest = Guest(vm, agent, ready, more.get("nic", ""))
        return self.guest

    def traveller(self, nic: str = "") -> Guest:
        """The guest that tests share: the one that lives if it has such a NIC, or a new one."""
        if self._shared is None or self._shared.nic != nic:
            self.spare(self.net.b, nic)
            self._shared = self.boot(nic=nic)
        return self._shared

    def other(self, vm: Watched) -> Host:
        """The host where a guest would move to."""
        return self.net.b if vm.host is self.net.a else self.net.a

    def spare(self, host: Host, nic: str = "") -> None:
        """Start a process that a guest with such a NIC may move to later on."""
        if (host.netns, nic) not in self._spares:
            self._spares[host.netns, nic] = self.run(host, "--incoming", "defer", nic=nic)

    def target(self, guest: Guest, another: bool = False) -> Watched:
        """A process on the other host, ready to be told where to listen.

        The one after it is started meanwhile: for the way back, or for ``another`` try.
        """
        host = self.other(guest.vm)
        self.spare(host, guest.nic)
        vm = self._spares.pop((host.netns, guest.nic))
        # A slow CPU is no deaf guest: tests of the deadline have destinations of their own.
        vm.qmp.execute("migrate-set-parameters", {"announce-deadline": 10_000})
        self.spare(host if another else guest.vm.host, guest.nic)
        return vm

    def targets(self, guest: Guest, count: int) -> list[Watched]:
        """So many, for moves to and fro; they start side by side."""
        hosts = [self.other(guest.vm), guest.vm.host]
        vms = [self.target(guest)]
        wait = ("--incoming", "defer")
        vms += [self.run(hosts[n % 2], *wait, nic=guest.nic) for n in range(1, count)]
        for vm in vms:
            vm.qmp.execute("query-status")
        return vms

    def listen(self, vm: Watched, uri: str = "") -> str:
        """Have a ``target`` listen; where."""
        uri = uri or f"unix:{self.folder / vm.name}.move"
        vm.qmp.execute("migrate-incoming", {"uri": uri, "insecure": True})
        return uri

    def retire(self, vm: Watched) -> None:
        """Let it end, without waiting for that; its tap is free afterwards."""
        vm.qmp.execute("quit")

    def drop_guest(self, keep: Sequence[Watched] = ()) -> None:
        """End the guest that lives, and every process that is neither a spare nor to be kept."""
        if self.guest is not None:
            self.guest.agent.close()
        self.guest = self._shared = None
        kept = [*self._spares.values(), *keep]
        for vm in self.vms:
            if vm not in kept:
                vm.close()
        self.vms = kept

    def close(self) -> None:
        """End everything."""
        self._spares.clear()
        self.drop_guest()

    def free_tap(self, host: Host) -> str:
        """A tap of that host that no VM has."""
        used = [vm.tap for vm in self.vms if vm.host is host and vm.alive]
        return next(tap for tap in TAPS if tap not in used)

    # --- what tests do with them ------------------------------------------------------------------
    def capture(self, name: str) -> Capture:
        """tcpdump on the client's port, of what may announce."""
        client = self.net.client
        return Capture(client.netns, client.interface, self.folder / f"{name}.pcap", ANNOUNCING)

    def ping(self, index: int, interval: float = 0.05) -> Ping:
        """A ping of one of the six flows."""
        return Ping(self.net.client.netns, FLOWS[index], self.folder, interval)

    def client_ip(self, *words: str) -> None:
        """``ip`` on the client."""
        argv = ["ip", "-n", self.net.client.netns, *words]
        subprocess.run(argv, check=True, capture_output=True)

    def client_mac(self, interface: str) -> str:
        """An interface of the client's."""
        argv = ["ip", "-n", self.net.client.netns, "-j", "link", "show", "dev", interface]
        (link,) = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        return str(link["address"])

    def answers(self) -> None:
        """Each of the six flows answers."""
        pings = [self.ping(flow.id) for flow in FLOWS]
        try:
            for ping in pings:
                ping.wait_answer(0.0, 60)
        finally:
            for ping in pings:
                ping.stop()

    def move(self, guest: Guest, target: Watched, uri: str = "", runs: bool = True) -> Moved:
        """Move the guest to ``target`` (which listens already if ``uri`` is given)."""
        source = guest.vm
        source.start_migration(uri or self.listen(target))
        info = source.wait_migration()
        assert info["status"] == "completed", info
        return self.moved(guest, target, info, runs)

    def moved(self, guest: Guest, target: Watched, info: Any, runs: bool = True) -> Moved:
        """The guest came to ``target``: the source ends, with code 0."""
        source = guest.vm
        if runs and info["godwit"].get("handover"):
            info = _handed_over(source)
        loaded = target.event("RUN_STATE", lambda data: data["to"] == "prelaunch-migrate")
        resumed = target.event("RESUME") if runs else loaded
        assert source.status() == "postmigrate"
        guest.vm = target
        source.news()
        self.retire(source)
        return Moved(info, source, target, stamp(loaded), stamp(resumed))


def _handed_over(source: Watched) -> Any:
    """query-migrate's answer when the source looks for no frames any more."""

    def info() -> Any:
        return source.qmp.execute("query-migrate")

    wait_for(lambda: info()["godwit"]["handover"].get("over", False), 60)
    return info()


@dataclass
class Numbered:
    """Numbered packets from the client to the guest on all six flows."""

    sent: dict[int, int] = field(default_factory=dict)
    counted: dict[int, Flow] = field(default_factory=dict)

    def broken(self) -> dict[int, str]:
        """The flows that lost, repeated or reordered packets, and what of them."""
        found = {}
        for number, sent in self.sent.items():
            flow = self.counted.get(number)
            if flow is None or flow.lost(sent) or flow.duplicates or flow.reordered:
                found[number] = f"{flow} of {sent}"
        return found


@contextmanager
def numbered(bench: Bench, guest: Guest, rate: int = 50) -> Iterator[Numbered]:
    """While the block runs, ``rate`` packets a second go to the guest on each flow."""
    flows = Numbered()
    guest.agent.reset_flows()
    with Sender(bench.net.client.netns, bench.folder, rate) as sender:
        wait_for(lambda: len(guest.agent.flows()) == len(FLOWS), 60)
        yield flows
        # Some seconds' worth afterwards too: what overtakes would come then.
        more = {number: flow.max_seq + 2 * rate for number, flow in guest.agent.flows().items()}
        wait_for(lambda: _beyond(guest.agent.flows(), more), 60)
        sender.stop()
        flows.sent = sender.counts()

    def all_there() -> bool:
        flows.counted = guest.agent.flows()
        return all(not flows.counted[n].lost(sent) for n, sent in flows.sent.items())

    with suppress(TimeoutError):
        wait_for(all_there, 5)


def _beyond(flows: dict[int, Flow], numbers: dict[int, int]) -> bool:
    return all(flows[number].max_seq >= most for number, most in numbers.items())


def recovered(pings: Sequence[Ping], moved: Moved) -> None:
    """Each flow answered within the one bound."""
    for ping in pings:
        ping.wait_answer(moved.resumed, 60)
        first = min(at for at, _ in ping.answers().times if at > moved.resumed)
        assert first - moved.resumed < RECOVERS_S, ping.flow


def announced(target: Watched) -> Event:
    """Wait until a guest that arrived has acknowledged, and all rounds are made; the ack."""
    ack = target.event("ANNOUNCE_ACKED")
    wait_for(lambda: rounds(target) >= 5, 60)
    return ack


def records(vm: Watched) -> list[dict[str, Any]]:
    """What the VMM says of its announcement, a record a NIC."""
    return list(vm.qmp.execute("query-migrate")["godwit"]["announce"])


def announce(vm: Vm, nic: str = "nic0") -> dict[str, Any]:
    """What query-announce says of a NIC."""
    (found,) = (one for one in vm.qmp.execute("query-announce") if one["nic"] == nic)
    return dict(found)


def rarps(capture: Path) -> list[bytes]:
    """The RARP frames in a capture, as long as they were on the wire.

    No scapy layer is bound to their type, so they are told by it.
    """
    from scapy.utils import RawPcapReader

    found = []
    for raw, meta in RawPcapReader(str(capture)):
        at = 16 if raw[12:14] == b"\x81\x00" else 12
        if raw[at : at + 2] == b"\x80\x35":
            assert meta.wirelen == len(raw)
            found.append(bytes(raw))
    return found


def held(pid: int) -> tuple[int, int]:
    """A process's descriptors and threads, but for the files that it booted from."""
    fds = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if not fd.is_file()]
    return len(fds), len(os.listdir(f"/proc/{pid}/task"))


def resident(pid: int) -> int:
    """Bytes of a process that are in memory, but for its guest's RAM."""
    total = size = 0
    with open(f"/proc/{pid}/smaps") as text:
        for line in text:
            match line.split():
                case ["Size:", kb, "kB"]:
                    size = int(kb)
                case ["Rss:", kb, "kB"] if size < _RAM_KB:
                    total += int(kb)
    return total * 1024
