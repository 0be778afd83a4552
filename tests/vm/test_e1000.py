"""A guest with an e1000, driven by Debian's own driver: networks, offloads, moves, RARP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from vm_bench import Bench, Guest, Watched, rarps, records

from godwit.lab.judge import announcements
from godwit.lab.scenario import MAC, rounds, wait_for
from godwit.lab.traffic import FLOWS, Sender, Stream

_NIC = "model=e1000"
_ROUNDS = 5


@pytest.fixture(scope="module")
def targets(bench: Bench) -> list[Watched]:
    """Where the guest will go: to B and back."""
    wait = ("--incoming", "defer", "--no-reboot")
    return [bench.run(host, *wait, nic=_NIC, memory="256M") for host in (bench.net.b, bench.net.a)]


@pytest.fixture(scope="module")
def traveller(bench: Bench, targets: list[Watched]) -> Iterator[Guest]:
    # The cloud kernels have no e1000.
    yield bench.boot(kernel="full-6.12", nic=_NIC, memory="256M", keep=targets, deadline=200.0)
    bench.drop_guest()


def _tcp(guest: Guest) -> dict[str, int]:
    """The guest's TCP counters."""
    names, values = [
        line.split()[1:] for line in guest.agent.sh("grep ^Tcp: /proc/net/snmp").splitlines()
    ]
    return dict(zip(names, map(int, values), strict=True))


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


def test_it_moves_to_another_host_and_back(
    bench: Bench, traveller: Guest, targets: list[Watched]
) -> None:
    checksum = traveller.agent.mem_start(16)
    with ExitStack() as stack:
        stream = Stream(bench.net.client.netns, "10.0.0.2")
        stack.callback(stream.close)
        assert stream.exchange()
        sender = stack.enter_context(Sender(bench.net.client.netns, bench.folder, 20))
        wait_for(lambda: len(traveller.agent.flows()) == len(FLOWS), 60)
        for target in targets:
            with bench.capture(f"to-{target.name}") as capture:
                moved = bench.move(traveller, target)
                wait_for(lambda vm=target: rounds(vm) >= _ROUNDS, 60)  # type: ignore[misc]
                # RARP is untagged: in the other networks the guest has to speak for itself.
                for flow in FLOWS[2:]:
                    traveller.agent.udp_send(flow.client, 9, flow.id, 10, 20)
                bench.answers()
                capture.stop()
            assert len(rarps(capture.path)) == _ROUNDS
            told = [f for f in announcements(capture.path, MAC) if f.kind == "RARP"]
            assert {(f.sender, f.vlan, f.address) for f in told} == {("host", 0, MAC)}
            assert min(f.at for f in told) > moved.loaded
            (record,) = records(target)
            assert (record["method"], record["host-sent"]) == ("host", _ROUNDS)
            assert stream.exchange(), "the TCP connection did not survive"
            assert moved.source.wait() == 0
        sender.stop()
    last = {flow: count - 1 for flow, count in sender.counts().items()}
    wait_for(lambda: {f.id: f.max_seq for f in traveller.agent.flows().values()} == last, 30)
    assert traveller.agent.mem_check() == checksum
    assert not [event for vm in targets for event in vm.news("GUEST_OFFENCE")]
