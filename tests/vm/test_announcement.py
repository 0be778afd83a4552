"""After a move the guest tells its networks where it is, and at no other time."""

from __future__ import annotations

import time
from contextlib import ExitStack

from vm_bench import Bench, Guest, announce, announced, rarps, recovered

from lab.judge import announcements
from lab.scenario import MAC
from lab.traffic import FLOWS, Stream

#: The guest's address of its own making (RFC 4291, appendix A), the same in each network.
LINK_LOCAL = "fe80::5054:ff:fe67:7701"
#: What the guest says on each network, for each of its addresses; and the host's RARP, untagged.
EXPECTED = (
    {("guest", "GARP" if flow.family == "ipv4" else "NA", flow.vlan, flow.guest) for flow in FLOWS}
    | {("guest", "NA", flow.vlan, LINK_LOCAL) for flow in FLOWS}
    | {("host", "RARP", 0, MAC)}
)


def test_a_moved_guest_announces_itself_on_every_network(bench: Bench, guest: Guest) -> None:
    with ExitStack() as stack:
        target = bench.target(guest)
        checksum = guest.agent.mem_start(16)
        stream = Stream(bench.net.client.netns, "10.0.100.2")
        stack.callback(stream.close)
        assert stream.exchange()
        pings = [stack.enter_context(bench.ping(flow.id)) for flow in FLOWS]
        for ping in pings:
            ping.wait_answer(0.0)
        # Not before: it may have come here a moment ago, and announced that.
        capture = stack.enter_context(bench.capture("move"))

        moved = bench.move(guest, target)
        ack = announced(target)
        recovered(pings, moved)
        assert stream.exchange(), "the TCP connection did not survive"
        assert guest.agent.mem_check() == checksum
        capture.stop()

    frames = announcements(capture.path, MAC)
    assert {(f.sender, f.kind, f.vlan, f.address) for f in frames} == EXPECTED
    assert len(rarps(capture.path)) == 5, "one a round"
    assert min(f.at for f in frames) > moved.loaded, "announced before the guest was about to run"
    assert ack["data"]["ms"] > 0
    # What Godwit says of it agrees with the capture.
    record = announce(target)
    assert (record["method"], record["host-sent"], record["timeouts"]) == ("guest", 0, 0)
    said = {
        (tuple(tag["vid"] for tag in one["vlans"]), one["ip"])
        for one in record["addresses"]
        if one["ip"] and one["seen-ms"] is not None
    }
    assert said == {(f.vlans, f.address) for f in frames if f.kind != "RARP"}
    assert record["rarp-sent"] == 5
    # The client answered on each network, which ended the schedule.
    assert (record["proof"], record["unproved"], record["claims"]) == ("answered", [], 0)
    assert record["answers"] >= 3
    told = target.news("ANNOUNCE_SEEN")
    assert {(tuple(t["vid"] for t in e["data"]["vlans"]), e["data"]["ip"]) for e in told} == said

    assert moved.source.transitions() == [
        ("running", "finish-migrate"),
        ("finish-migrate", "postmigrate"),
    ]
    states = ["prelaunch", "inmigrate", "prelaunch-migrate", "running"]
    assert moved.info["godwit"]["destination-runstates"] == states
    assert target.transitions()[-2:] == [
        ("inmigrate", "prelaunch-migrate"),
        ("prelaunch-migrate", "running"),
    ]
    assert moved.source.wait() == 0


def test_with_autostart_off_it_announces_at_the_cont(bench: Bench, guest: Guest) -> None:
    host = bench.other(guest.vm)
    target = bench.run(host, "--incoming", "defer", "--no-autostart", nic=guest.nic)
    with bench.capture("held") as capture:
        moved = bench.move(guest, target, runs=False)
        assert target.status() == "prelaunch-migrate"
        assert not target.news("RESUME", "ANNOUNCE_STARTED")
        released = time.time()
        target.qmp.execute("cont")
        announced(target)
        guest.agent.ping(60)
        capture.stop()
    frames = announcements(capture.path, MAC)
    assert {(f.sender, f.kind, f.vlan, f.address) for f in frames} == EXPECTED
    assert len(rarps(capture.path)) == 5
    assert min(f.at for f in frames) > released
    assert moved.info["godwit"]["destination-runstates"][-1] == "prelaunch-migrate"
    assert target.status() == "running"


def test_stop_and_cont_announce_nothing(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    vm.mark()
    with bench.capture("pause") as capture, bench.ping(0) as ping:
        ping.wait_answer(0.0)
        vm.qmp.execute("stop")
        assert vm.status() == "paused"
        vm.qmp.execute("cont")
        # An announcement starts at once: twenty answers later it would be on the wire.
        at = time.time()
        for _ in range(20):
            at = ping.wait_answer(at)
        bench.answers()
        capture.stop()
    assert announcements(capture.path, MAC) == []
    assert rarps(capture.path) == []
    assert [event["event"] for event in vm.news("STOP", "RESUME")] == ["STOP", "RESUME"]
    assert not vm.news("ANNOUNCE_STARTED", "ANNOUNCE_HOST", "ANNOUNCE_ACKED")
    assert vm.transitions() == [("running", "paused"), ("paused", "running")]
