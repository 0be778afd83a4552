"""A guest with an e1000, driven by Debian's own driver: networks, offloads, moves, RARP."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from vm_bench import TAPS, Bench, Guest, Watched, rarps, records, recovered

from lab.guest import READY
from lab.judge import announcements
from lab.netns import inside
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import FLOWS, Sender, Stream

_NIC = "model=e1000"
_ROUNDS = 5
_TRANSFER = 4_000_000


@dataclass
class Trip:
    """The guest, and where it will go: to B and back."""

    guest: Guest | None = None
    targets: Sequence[Watched] = ()


@pytest.fixture(scope="module")
def trip(bench: Bench) -> Iterator[Trip]:
    trip = Trip()
    yield trip
    if bench.guest is trip.guest:
        bench.drop_guest()


@pytest.fixture
def traveller(bench: Bench, trip: Trip) -> Guest:
    """The guest that these tests share; a failed one takes it along."""
    if trip.guest is None or bench.guest is not trip.guest:
        hosts = (bench.net.b, bench.net.a)
        wait = ("--incoming", "defer", "--no-reboot")
        trip.targets = [bench.run(host, *wait, nic=_NIC, memory="256M") for host in hosts]
        # The cloud kernels have no e1000.
        trip.guest = bench.boot(
            kernel="full-6.12", nic=_NIC, memory="256M", keep=trip.targets, deadline=200.0
        )
    return trip.guest


def _tcp(guest: Guest) -> dict[str, int]:
    """The guest's TCP counters."""
    names, values = [
        line.split()[1:] for line in guest.agent.sh("grep ^Tcp: /proc/net/snmp").splitlines()
    ]
    return dict(zip(names, map(int, values), strict=True))


def _from_guest(guest: Guest) -> tuple[int, int]:
    """Packets and bytes that its tap took from the guest."""
    argv = ["ip", "-n", guest.vm.host.netns, "-s", "-j", "link", "show", "dev", guest.vm.tap]
    (link,) = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    rx = link["stats64"]["rx"]
    return rx["packets"], rx["bytes"]


def test_the_driver_finds_what_it_needs(bench: Bench, traveller: Guest) -> None:
    agent = traveller.agent
    assert agent.sh("basename $(readlink /sys/class/net/eth0/device/driver)").strip() == "e1000"
    assert agent.sh("cat /sys/class/net/eth0/address").strip() == MAC
    assert agent.sh("cat /sys/class/net/eth0/speed").strip() == "1000"
    (line,) = (line for line in agent.sh("cat /proc/interrupts").splitlines() if "eth0" in line)
    assert "fasteoi" in line, line  # level-triggered, at the I/O APIC


def test_every_network_answers_and_tcp_carries_what_was_sent(
    bench: Bench, traveller: Guest
) -> None:
    bench.answers()
    before = _tcp(traveller)
    for flow in FLOWS:
        stream = Stream(bench.net.client.netns, flow.guest)
        for _ in range(4):
            assert stream.exchange()
        stream.close()
    after = _tcp(traveller)
    assert after["InCsumErrors"] == before["InCsumErrors"]
    # A segment that the host's kernel refused would have to be sent again.
    assert after["RetransSegs"] - before["RetransSegs"] < 20


def test_a_large_transfer_leaves_the_guest_in_large_segments(
    bench: Bench, traveller: Guest
) -> None:
    agent = traveller.agent
    with inside(bench.net.client.netns):
        server = socket.create_server(("10.0.100.1", 0))
    server.settimeout(60)
    sums: list[str] = []

    def take() -> None:
        connection, _ = server.accept()
        digest = hashlib.md5()
        with connection:
            while data := connection.recv(1 << 16):
                digest.update(data)
        sums.append(digest.hexdigest())

    taker = threading.Thread(target=take)
    taker.start()
    packets, size = _from_guest(traveller)
    port = server.getsockname()[1]
    said = agent.sh(
        f"head -c {_TRANSFER} /dev/urandom >/tmp/x && md5sum /tmp/x && "
        f"nc 10.0.100.1 {port} </tmp/x; rm /tmp/x",
        90,
    )
    taker.join(60)
    server.close()
    assert sums == said.split()[:1]
    packets_now, size_now = _from_guest(traveller)
    assert size_now - size > _TRANSFER
    # The host's kernel cut them: what came from the guest was larger than any frame on a wire,
    # on average, though what it acknowledged is among it.
    assert (size_now - size) / (packets_now - packets) > 1600


def test_it_moves_to_another_host_and_back(bench: Bench, traveller: Guest, trip: Trip) -> None:
    checksum = traveller.agent.mem_start(16)
    with ExitStack() as stack:
        stream = Stream(bench.net.client.netns, "10.0.0.2")
        stack.callback(stream.close)
        assert stream.exchange()
        sender = stack.enter_context(Sender(bench.net.client.netns, bench.folder, 20))
        wait_for(lambda: len(traveller.agent.flows()) == len(FLOWS), 60)
        pings = [stack.enter_context(bench.ping(flow.id, 0.2)) for flow in FLOWS]
        for ping in pings:
            ping.wait_answer(0.0, 60)  # so that it was heard on each network
        for target in trip.targets:
            with bench.capture(f"to-{target.name}") as capture:
                moved = bench.move(traveller, target)
                wait_for(lambda vm=target: rounds(vm) >= _ROUNDS, 60)  # type: ignore[misc]
                recovered(pings, moved)
                capture.stop()
            # Its driver has no way to announce itself: the host knows its addresses.
            told = announcements(capture.path, MAC)
            assert {f.sender for f in told} == {"host"}
            assert {(f.vlan, f.address) for f in told if f.kind == "RARP"} == {
                (vlan, MAC) for vlan in (0, 100, 200)
            }
            assert {(f.kind, f.vlan, f.address) for f in told if f.kind != "RARP"} >= {
                ("GARP" if flow.family == "ipv4" else "NA", flow.vlan, flow.guest) for flow in FLOWS
            }
            # One a round and network, and one more with the addresses that were asked for.
            assert len(rarps(capture.path)) == 3 * (_ROUNDS + 1)
            assert min(f.at for f in told) > moved.loaded
            (record,) = records(target)
            assert (record["method"], record["host-sent"]) == ("host", len(told))
            handover = moved.info["godwit"]["handover"]
            assert handover["markers-seen"] == handover["markers-sent"] >= 3
            assert stream.exchange(), "the TCP connection did not survive"
            assert moved.source.wait() == 0
        sender.stop()
    last = {flow: count - 1 for flow, count in sender.counts().items()}
    wait_for(lambda: {f.id: f.max_seq for f in traveller.agent.flows().values()} == last, 30)
    for flow in traveller.agent.flows().values():
        lost = flow.lost(sender.counts()[flow.id])
        assert (lost, flow.duplicates, flow.reordered) == (0, 0, 0), flow
    assert traveller.agent.mem_check() == checksum
    assert not [event for vm in trip.targets for event in vm.news("GUEST_ERROR")]


def test_it_works_beside_virtio_and_after_a_reboot(bench: Bench) -> None:
    card = f"tap={TAPS[-1]},mac=52:54:00:67:77:02,{_NIC}"
    guest = bench.boot("--nic", card, kernel="full-6.12", memory="256M")
    for again in (False, True):
        if again:
            guest.agent.reboot()
            guest.vm.event("RESET")
            wait_for(lambda: guest.vm.console.count(READY) == 2, 90)
        bench.answers()
        cards = [
            guest.agent.sh(f"basename $(readlink /sys/class/net/{name}/device/driver)").strip()
            for name in ("eth0", "eth1")
        ]
        assert sorted(cards) == ["e1000", "virtio_net"]
        e1000 = f"eth{cards.index('e1000')}"
        guest.agent.sh(f"ip link set {e1000} up")
        wait_for(lambda name=e1000: _carrier(guest, name), 30)  # type: ignore[misc]
        interrupts = guest.agent.sh("cat /proc/interrupts")
        (line,) = (line for line in interrupts.splitlines() if line.endswith(e1000))
        assert line.strip().startswith("17:"), line  # slot 1, as `arguments` come first
    bench.drop_guest()


def _carrier(guest: Guest, name: str) -> bool:
    return guest.agent.sh(f"cat /sys/class/net/{name}/carrier").strip() == "1"
