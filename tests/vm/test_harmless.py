"""The announcement on networks that are not as the host believes, and for guests with odd NICs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from vm_bench import (
    MORE_TAPS,
    ONE_BACKEND,
    Bench,
    Guest,
    Watched,
    announce,
    announced,
    recovered,
    stamp,
)

from lab.judge import announcements
from lab.scenario import MAC, wait_for
from lab.traffic import Flow, Ping

_MACS = [f"52:54:00:67:79:0{number}" for number in range(2)]
_NICS = [
    f"id=more{number},tap={tap},mac={mac}"
    for number, (tap, mac) in enumerate(zip(MORE_TAPS, _MACS, strict=False))
]


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _vlans(vm: Watched, how: str) -> None:
    """Let the VM's bridge port pass frames, or not; it forwards in either case."""
    for words in (("1", "pvid", "untagged"), ("100",), ("200",)):
        more = words[1:] if how == "add" else ()
        _run("bridge", "-n", vm.host.netns, "vlan", how, "dev", vm.tap, "vid", words[0], *more)


def _place(vm: Watched, mac: str) -> set[str]:
    """The ports at which the host's bridge has a MAC address, untagged."""
    entries = json.loads(_run("bridge", "-n", vm.host.netns, "-j", "fdb", "show", "br", "br0"))
    return {one["ifname"] for one in entries if one["mac"] == mac and one.get("vlan") == 1}


def _pairs(path: Path, addresses: set[str]) -> set[tuple[str, str]]:
    """(MAC, IP) of each gratuitous ARP for one of the addresses in a capture."""
    from scapy.layers.l2 import ARP
    from scapy.utils import PcapReader

    with PcapReader(str(path)) as frames:
        found = [frame[ARP] for frame in frames if ARP in frame]
    return {
        (arp.hwsrc, arp.psrc) for arp in found if arp.psrc == arp.pdst and arp.psrc in addresses
    }


# --- a port that is wired late --------------------------------------------------------------------
@ONE_BACKEND
def test_a_port_that_swallows_frames_for_seconds_is_announced_at_when_it_opens(
    bench: Bench, guest: Guest
) -> None:
    target = bench.target(guest)
    _vlans(target, "del")
    try:
        with bench.capture("late") as capture, bench.ping(0) as ping:
            ping.wait_answer(0.0)
            bench.move(guest, target)
            wait_for(lambda: announce(target)["rounds"] >= 6, 60)
            record = announce(target)
            assert (record["proof"], record["proved-ms"]) == ("awaited", None)
            assert not target.news("ANNOUNCE_HELD"), "the port looks ready all the time"
            opened = time.time()
            _vlans(target, "add")
            wait_for(lambda: announce(target)["proof"] == "answered", 60)
            ping.wait_answer(opened, 60)
            bench.answers()
            capture.stop()
    finally:
        if announce(target)["proof"] != "answered":
            _vlans(target, "add")
    frames = announcements(capture.path, MAC)
    assert {f.vlan for f in frames if f.at > opened and f.kind in ("GARP", "NA")} == {0, 100, 200}
    assert announce(target)["unproved"] == []


# --- frames older than the start ------------------------------------------------------------------
@ONE_BACKEND
def test_what_came_while_it_was_paused_is_not_delivered_later(bench: Bench, guest: Guest) -> None:
    vm = guest.vm

    def from_network() -> int:
        (link,) = json.loads(_run("ip", "-n", vm.host.netns, "-s", "-j", "link", "show", "up0"))
        return int(link["stats64"]["rx"]["packets"])

    with bench.ping(0) as ping:
        ping.wait_answer(0.0)
        vm.mark()
        vm.qmp.execute("stop")
        before = from_network()
        wait_for(lambda: from_network() >= before + 20, 60)
        vm.qmp.execute("cont")
        resumed = stamp(vm.event("RESUME"))
        ping.wait_answer(resumed, 60)
        ping.stop()
        answers = [number for _, number in ping.answers().times]
    gaps = [later - earlier for earlier, later in pairwise(answers)]
    assert max(gaps) >= 10, "an echo request of the pause was answered after it"


# --- a guest's NICs in one network ----------------------------------------------------------------
_BOND = """
modprobe bonding 2>/dev/null; set -e
echo active-backup > /sys/class/net/bond0/bonding/mode
echo 100 > /sys/class/net/bond0/bonding/miimon
ip link set bond0 up
ip link set eth1 down
ip link set eth2 down
echo +eth1 > /sys/class/net/bond0/bonding/slaves
echo +eth2 > /sys/class/net/bond0/bonding/slaves
until echo eth2 > /sys/class/net/bond0/bonding/active_slave; do :; done
ip addr add 10.55.0.2/24 dev bond0
until ping -c 1 -W 1 10.55.0.1; do :; done
cat /sys/class/net/bond0/address
"""
_MACVLAN = """
modprobe macvlan 2>/dev/null; set -e
ip link set eth1 up
ip addr add 10.56.0.2/24 dev eth1
ip link add link eth1 name mv0 type macvlan mode bridge
ip link set mv0 address 02:00:00:00:56:03 up
ip addr add 10.56.0.3/24 dev mv0
until ping -c 1 -W 1 10.56.0.1; do :; done
"""


@pytest.fixture
def odd(bench: Bench) -> Iterator[tuple[Guest, Watched]]:
    """A guest with two NICs more, and a process on the other host for it."""
    target = bench.run(bench.net.b, "--incoming", "defer", more_nics=_NICS, memory="192M")
    yield bench.boot(keep=[target], more_nics=_NICS, memory="192M"), target
    bench.drop_guest()


def _shell(guest: Guest, script: str) -> str:
    return guest.agent.sh(script.replace("\n", ";").replace(";;", ";").strip(";"), 120)


@contextmanager
def _client(bench: Bench, address: str) -> Iterator[None]:
    bench.client_ip("address", "add", address, "dev", "net0")
    try:
        yield
    finally:
        bench.client_ip("address", "del", address, "dev", "net0")


def test_a_bonds_sleeping_nic_leaves_the_mac_address_where_it_is_used(
    bench: Bench, odd: tuple[Guest, Watched]
) -> None:
    guest, target = odd
    with _client(bench, "10.55.0.1/24"), ExitStack() as stack:
        mac = [line for line in _shell(guest, _BOND).splitlines() if line.count(":") == 5][-1]
        flow = Flow(70, "bond", 0, "ipv4", "10.55.0.2", "10.55.0.1")
        ping = stack.enter_context(Ping(bench.net.client.netns, flow, bench.folder, 0.05))
        ping.wait_answer(0.0, 60)
        moved = bench.move(guest, target)
        recovered([ping], moved)
        wait_for(lambda: announce(target, "more1")["rounds"] >= 5, 60)
        assert _place(target, mac) == {MORE_TAPS[1]}
        sleeping = announce(target, "more0")
        assert (sleeping["host-sent"], sleeping["rarp-sent"]) == (0, 0)
        # And the other way, with the other NIC: the guest fails over first.
        _shell(guest, "echo eth1 > /sys/class/net/bond0/bonding/active_slave")
        at = time.time()
        ping.wait_answer(at, 60)
        target.qmp.execute("announce-self", {"id": "again", "rounds": 5})
        wait_for(lambda: announce(target, "more0")["rounds"] >= 5, 60)
        assert _place(target, mac) == {MORE_TAPS[0]}
        assert announce(target, "more1")["rarp-sent"] == 0


def test_each_address_is_announced_with_its_own_mac_address(
    bench: Bench, odd: tuple[Guest, Watched]
) -> None:
    """Linux answers for either address on either interface, with that interface's address."""
    guest, target = odd
    addresses = {"10.56.0.2", "10.56.0.3"}
    with _client(bench, "10.56.0.1/24"), ExitStack() as stack:
        _shell(guest, _MACVLAN)
        for address in sorted(addresses) * 3:
            bench.client_ip("neigh", "flush", "to", address)
            # Whichever answer the client takes: the guest gives both.
            netns = bench.net.client.netns
            _run("ip", "netns", "exec", netns, "ping", "-c", "2", "-i", "0.2", "-W", "5", address)
        capture = stack.enter_context(bench.capture("pairs"))
        bench.move(guest, target)
        wait_for(lambda: announce(target, "more0")["rounds"] >= 5, 60)
        wait_for(lambda: announce(target, "more0")["proof"] == "answered", 60)
        wait_for(lambda: addresses <= _announced(target), 60)
        capture.stop()
    assert _pairs(capture.path, addresses) == {
        (_MACS[0], "10.56.0.2"),
        ("02:00:00:00:56:03", "10.56.0.3"),
    }


def _announced(vm: Watched) -> set[Any]:
    return {
        one["ip"]
        for one in announce(vm, "more0")["addresses"]
        if one["seen-ms"] is not None or one["host-ms"] is not None
    }


# --- the host's end -------------------------------------------------------------------------------
_OBSERVED_S = 2.0


def _ticks(pid: int) -> int:
    """CPU time of a process, but of its vCPUs: the main thread's."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("nic", ["vhost=off", "", "model=e1000"])
def test_a_deleted_tap_costs_the_network_and_nothing_else(bench: Bench, nic: str) -> None:
    # The cloud kernels have no e1000.
    kernel, memory = ("full-6.12", "256M") if "e1000" in nic else ("cloud-6.12", "128M")
    target = bench.run(bench.net.b, "--incoming", "defer", nic=nic, memory=memory)
    guest = bench.boot(nic=nic, kernel=kernel, memory=memory, keep=[target], deadline=200)
    vm = guest.vm
    vm.mark()
    _run("ip", "-n", vm.host.netns, "link", "delete", "dev", vm.tap)
    try:
        lost = vm.event("NIC_TAP_LOST")
        assert lost["data"] == {"nic": "nic0", "tap": vm.tap}
        before, began = _ticks(vm.pid), time.monotonic()
        while time.monotonic() < began + _OBSERVED_S:  # a rate needs a time
            time.sleep(0.1)
        busy = (_ticks(vm.pid) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)
        assert busy < 0.5, "the event loop spins"
        assert vm.status() == "running"
        bench.net.add_taps(vm.host, [vm.tap])
        assert vm.event("NIC_TAP_ANEW")["data"] == {"nic": "nic0", "tap": vm.tap}
        bench.move(guest, target)
        guest.agent.ping(60)
        bench.answers()
        assert [event["event"] for event in vm.seen].count("NIC_TAP_LOST") == 1
    finally:
        bench.drop_guest()


def test_an_mtu_below_the_guests_is_refused_before_the_stop(bench: Bench) -> None:
    nic = "mtu=9000"
    tap = bench.free_tap(bench.net.a)
    _run("ip", "-n", bench.net.a.netns, "link", "set", tap, "mtu", "9000")
    target = bench.run(bench.net.b, "--incoming", "defer", nic=nic)
    try:
        guest = bench.boot(nic=nic, keep=[target], tap=tap)
        assert guest.agent.sh("cat /sys/class/net/eth0/mtu").split()[0] == "9000"
        source = guest.vm
        uri = bench.listen(target)
        source.start_migration(uri)
        info = source.wait_migration()
        assert info["status"] == "failed"
        for words in ("nic0", "MTU 1500", f"ip link set {target.tap} mtu 9000"):
            assert words in info["error-desc"]
        assert not source.news("STOP")
        assert source.status() == "running"
        _run("ip", "-n", target.host.netns, "link", "set", target.tap, "mtu", "9000")
        bench.move(guest, target, uri)
        announced(target)
    finally:
        bench.drop_guest()
        for netns, name in ((bench.net.a.netns, tap), (target.host.netns, target.tap)):
            _run("ip", "-n", netns, "link", "set", name, "mtu", "1500")


def test_a_tap_that_is_made_here_has_the_mtu(bench: Bench) -> None:
    vm = bench.run(bench.net.a, "--incoming", "defer", nic="mtu=4000", tap="made0")
    vm.qmp.execute("query-status")
    (link,) = json.loads(_run("ip", "-n", vm.host.netns, "-j", "link", "show", "made0"))
    assert link["mtu"] == 4000
    vm.close()
    bench.vms.remove(vm)
