"""No announcement before its port forwards, none before the commit; afterwards, is it known?"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest, Watched, announce, announced, resident, stamp

from lab.judge import announcements
from lab.scenario import MAC, wait_for
from lab.traffic import Capture

pytestmark = ONE_BACKEND
_FLOOD = 20_000


def _bridge(netns: str, *words: str) -> None:
    subprocess.run(["bridge", "-n", netns, *words], check=True, capture_output=True)


def test_a_port_that_forwards_late_starts_the_schedule_then(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest)
    netns, tap = target.host.netns, target.tap
    _bridge(netns, "link", "set", "dev", tap, "state", "1")
    with bench.capture("late") as capture:
        moved = bench.move(guest, target)
        held = target.event("ANNOUNCE_HELD")
        assert "listening" in held["data"]["cause"]
        assert announce(target)["held"] == held["data"]["cause"]
        assert not target.news("ANNOUNCE_ACKED", "ANNOUNCE_HOST", "ANNOUNCE_SEEN")
        opened = time.time()
        _bridge(netns, "link", "set", "dev", tap, "state", "3")
        announced(target)
        guest.agent.ping(60)
        capture.stop()
    # What the guest answers to its peers' questions, before it moved, is in the capture as well.
    frames = [f for f in announcements(capture.path, MAC) if f.at > moved.loaded]
    assert {f.vlan for f in frames} == {0, 100, 200}
    assert min(f.at for f in frames) > opened
    assert announce(target)["ready-ms"] is not None


def test_the_destination_is_silent_before_the_commit_and_the_source_after_it(
    bench: Bench, guest: Guest
) -> None:
    source, target = guest.vm, bench.target(guest)
    guest.agent.mem_start(16)
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 12 << 20})
    from_guest = f"ether src {MAC}"
    with (
        bench.ping(0) as ping,
        Capture(target.host.netns, "up0", bench.folder / "to.pcap", from_guest, "out") as to,
        Capture(source.host.netns, "up0", bench.folder / "from.pcap", from_guest, "out") as away,
    ):
        ping.wait_answer(0.0)
        moved = bench.move(guest, target)
        announced(target)
        ping.wait_answer(moved.resumed, 60)
        bench.answers()
        to.stop()
        away.stop()
    (stop,) = moved.source.news("STOP")
    stopped = stamp(stop) + moved.info["godwit"]["stop-phases"]["devices-paused"] / 1000
    early = [at for at in _times(to.path) if at < moved.loaded]
    assert early == [], "frames of the guest's left its destination before it was there"
    assert [at for at in _times(away.path) if at > stopped] == []
    assert _times(to.path)
    assert _times(away.path)
    assert moved.info["total-time"] > 1000


def _times(path: Path) -> list[float]:
    """Realtime of each frame in a capture."""
    from scapy.utils import RawPcapReader

    return [meta.sec + meta.usec / 1e6 for _, meta in RawPcapReader(str(path))]


@contextmanager
def _deaf_to_broadcasts(bench: Bench) -> Iterator[None]:
    """The switch floods nothing to the client."""

    def flood(how: str) -> None:
        words = ("link", "set", "dev", "pc", "bcast_flood", how, "mcast_flood", how)
        _bridge(bench.net.switch, *words)

    flood("off")
    try:
        yield
    finally:
        flood("on")


def test_what_is_not_verified_is_announced_until_it_is(bench: Bench, guest: Guest) -> None:
    """The client hears no broadcast at first, so it answers no probe."""
    target = bench.target(guest)
    target.qmp.execute("migrate-set-parameters", {"announce-verify": "probe"})
    with _deaf_to_broadcasts(bench):
        bench.move(guest, target)
        announced(target)
        wait_for(lambda: announce(target)["rounds"] > 5, 60)
        record = announce(target)
        assert record["verified-ms"] is None
        assert any("IPv4" in what for what in record["unverified"])
        assert not target.news("ANNOUNCE_VERIFIED", "ANNOUNCE_UNVERIFIED")
    target.event("ANNOUNCE_VERIFIED")
    record = announce(target)
    assert record["unverified"] == []
    assert record["rounds"] > 5


def test_the_bridge_is_asked_whether_it_forwards_to_the_tap(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest)
    target.qmp.execute("migrate-set-parameters", {"announce-verify": "fdb"})
    bench.move(guest, target)
    announced(target)
    target.event("ANNOUNCE_VERIFIED")
    assert announce(target)["rounds"] == 5


@pytest.mark.parametrize(
    "parameters", [{"announce-refresh": True}, {}], ids=["refreshed", "asked for"]
)
def test_the_guests_own_neighbours_are_refreshed(
    bench: Bench, guest: Guest, parameters: dict[str, bool]
) -> None:
    """Its gateway on VLAN 200 has another MAC address where it goes."""
    bench.answers()
    target = bench.target(guest)
    target.qmp.execute("migrate-set-parameters", parameters)
    before = _neighbour(guest)
    new = "02:00:00:00:99:01"
    old = bench.client_mac("net0.200")
    assert before == old
    bench.client_ip("link", "set", "dev", "net0.200", "address", new)
    try:
        assert _neighbour(guest) == old
        bench.move(guest, target)
        announced(target)
        wait_for(lambda: _neighbour(guest) == new, 60)
    finally:
        bench.client_ip("link", "set", "dev", "net0.200", "address", old)


def _neighbour(guest: Guest) -> str:
    """What the guest believes its gateway's address to be; it is not asked for by looking."""
    for line in guest.agent.sh("cat /proc/net/arp").splitlines():
        words = line.split()
        if words[0] == "10.0.200.1":
            return words[3]
    return ""


def test_a_guest_that_floods_is_bounded_and_keeps_its_own_address(
    bench: Bench, guest: Guest
) -> None:
    vm = guest.vm
    before, taken = resident(vm.pid), _from_guest(vm)
    with bench.ping(0) as ping:
        ping.wait_answer(0.0)
        assert guest.agent.flood("eth0", _FLOOD) == _FLOOD
        at = ping.wait_answer(time.time())
        ping.wait_answer(at)
    wait_for(lambda: _from_guest(vm) - taken >= _FLOOD, 60)
    record = announce(vm)
    assert len(record["addresses"]) <= 512 + 128 + 1
    assert record["addresses"][0]["mac"] == MAC
    own = {one["ip"] for one in record["addresses"] if one["mac"] == MAC}
    assert own >= {"10.0.0.2", "10.0.100.2", "10.0.200.2"}
    assert resident(vm.pid) - before < 16 << 20
    assert vm.status() == "running"
    bench.answers()
    bench.drop_guest()  # it would be announced with all those addresses from now on


def _from_guest(vm: Watched) -> int:
    """Frames that came out of a VM's tap."""
    argv = ["ip", "-n", vm.host.netns, "-s", "-j", "link", "show", "dev", vm.tap]
    (link,) = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return int(link["stats64"]["rx"]["packets"])
