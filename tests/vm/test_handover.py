"""Of what peers send to a guest on the move nothing is lost, repeated or overtaken."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_bench import Bench, Guest, Watched, numbered, recovered

from godwit.migration.wire.messages import Kind
from lab.scenario import MAC, wait_for
from lab.traffic import FLOWS, Capture, Stream
from tests.fakes.connection_cutter import ConnectionCutter


def _handover(vm: Watched) -> dict[str, int]:
    """What a side of the last move says of it."""
    return dict(vm.qmp.execute("query-migrate")["godwit"].get("handover", {}))


def test_there_and_back(bench: Bench, guest: Guest) -> None:
    packets = moves = 0
    # In a short stop on two busy CPUs the sender may have had no turn; hardly in ten.
    while moves < 2 or (not packets and moves < 10):
        moves += 1
        target = bench.target(guest)
        with numbered(bench, guest) as flows:
            moved = bench.move(guest, target)
        assert flows.broken() == {}
        forwarded = moved.info["godwit"]["handover"]
        packets += forwarded["packets"]
        assert forwarded["markers-seen"] == forwarded["markers-sent"] >= 3
        arrived = _handover(target)
        assert arrived["packets"] == forwarded["packets"]
        assert arrived["refused"] == 0
    assert packets > 0


def test_unfinished_segments_are_handed_over_too(bench: Bench, guest: Guest) -> None:
    """A TCP transfer both ways: with the offloads, most frames have no checksum yet, and many are
    longer than the wire would take."""
    target = bench.target(guest)
    stream = Stream(bench.net.client.netns, FLOWS[2].guest)
    good: list[bool] = []
    over = threading.Event()

    def transfer() -> None:
        while not over.is_set():
            good.append(stream.exchange(1 << 20))

    thread = threading.Thread(target=transfer, daemon=True)
    thread.start()
    wait_for(lambda: len(good) >= 2, 60)
    bench.move(guest, target)
    before = len(good)
    wait_for(lambda: len(good) >= before + 2, 60)
    over.set()
    thread.join(60)
    stream.close()
    assert all(good)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_without_it_the_announcement_alone_brings_the_traffic(
    bench: Bench, guest: Guest, side: str
) -> None:
    target = bench.target(guest)
    off = guest.vm if side == "source" else target
    off.qmp.execute("migrate-set-parameters", {"handover": False})
    pings = [bench.ping(flow.id) for flow in FLOWS]
    with _updates(bench, target) as updates:
        for ping in pings:
            ping.wait_answer(0.0)
        moved = bench.move(guest, target)
        recovered(pings, moved)
    target.qmp.execute("migrate-set-parameters", {"handover": True})
    for ping in pings:
        ping.stop()
    assert "handover" not in moved.info["godwit"]
    assert _handover(target) == {}
    assert updates() == []


def test_with_autostart_off_it_waits_for_the_cont(bench: Bench, guest: Guest) -> None:
    host = bench.other(guest.vm)
    target = bench.run(host, "--incoming", "defer", "--no-autostart", nic=guest.nic)
    target.qmp.execute("query-status")
    with numbered(bench, guest) as flows, _updates(bench, target) as updates:
        source = guest.vm
        source.start_migration(bench.listen(target))
        assert source.wait_migration()["status"] == "completed"
        target.event("RUN_STATE", lambda data: data["to"] == "prelaunch-migrate")
        assert target.status() == "prelaunch-migrate"
        assert updates() == []
        wait_for(lambda: _handover(target)["packets"] > 0, 30)
        target.qmp.execute("cont")
        target.event("RESUME")
        wait_for(lambda: _handover(source)["markers-seen"] >= 3, 30)
        assert len(updates()) >= 3
        guest.vm = target
    assert flows.broken() == {}
    source.news()
    bench.retire(source)


def test_a_guest_that_stays_after_all_gets_its_frames(bench: Bench, guest: Guest) -> None:
    """The commit is lost, and the destination with it.

    Its end is not waited for: that takes ten seconds in the lab, and after eight of silence the
    client gives its neighbour up and drops packets itself.
    """
    source, target = guest.vm, bench.target(guest, another=True)
    far = bench.listen(target).removeprefix("unix:")
    near = bench.folder / f"{target.name}.cut"
    with (
        numbered(bench, guest) as flows,
        ConnectionCutter(near, Path(far), Kind.COMMIT, False, before=lambda: _kill(target)),
    ):
        source.start_migration(f"unix:{near}")
        assert source.wait_migration()["status"] == "failed"
        source.event("ANNOUNCE_ACKED")
    assert source.status() == "running"
    assert flows.broken() == {}


def test_traffic_that_was_drawn_to_a_destination_that_dies_comes_back(
    bench: Bench, guest: Guest
) -> None:
    source, target = guest.vm, bench.target(guest, another=True)
    far = bench.listen(target).removeprefix("unix:")
    near = bench.folder / f"{target.name}.cut"
    pings = [bench.ping(flow.id) for flow in FLOWS]
    with ConnectionCutter(near, Path(far), Kind.SWITCHED, False, before=target.kill):
        for ping in pings:
            ping.wait_answer(0.0)
        source.start_migration(f"unix:{near}")
        assert source.wait_migration()["status"] == "failed"
    resumed = source.event("RESUME")
    for ping in pings:
        ping.wait_answer(resumed["timestamp"]["seconds"] + 1, 60)
        ping.stop()
    assert source.status() == "running"


def _kill(vm: Watched) -> None:
    os.kill(vm.pid, signal.SIGKILL)


@contextmanager
def _updates(bench: Bench, target: Watched) -> Iterator[Callable[[], list[bytes]]]:
    """The layer 2 updates in the guest's name that left a host, so far."""
    path = bench.folder / f"{target.name}-updates.pcap"
    # tcpdump's word for an 802.3 frame with this LLC header is its length field.
    expression = f"ether src {MAC} and (ether[12:2] = 6 or (vlan and ether[16:2] = 6))"
    with Capture(target.host.netns, "up0", path, expression, "out"):

        def seen() -> list[bytes]:
            from scapy.utils import RawPcapReader

            return [bytes(raw) for raw, _ in RawPcapReader(str(path))]

        yield seen
