"""The line is lost around the commit: exactly one side runs in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm_bench import Bench, Guest

from godwit.migration.wire.messages import Kind
from tests.fakes.connection_cutter import ConnectionCutter


@pytest.mark.parametrize("delivered", [False, True], ids=["commit lost", "answer lost"])
def test_the_guest_runs_at_the_destination_alone(
    bench: Bench, guest: Guest, delivered: bool
) -> None:
    """The commit, or the answer to it, is lost; on a new line the source asks, and learns."""
    source, target = guest.vm, bench.target(guest)
    checksum = guest.agent.mem_start(8)
    far = bench.listen(target).removeprefix("unix:")
    near = bench.folder / f"{target.name}.cut"
    with ConnectionCutter(near, Path(far), Kind.COMMIT, delivered) as cutter:
        source.start_migration(f"unix:{near}")
        info = source.wait_migration()
        assert cutter.cut.is_set()
        assert cutter.lines >= 2
    assert info["status"] == "completed"
    assert target.status() == "running"
    assert len(target.news("RESUME")) == 1
    assert not source.news("RESUME")
    bench.moved(guest, target, info)
    bench.answers()
    assert guest.agent.mem_check() == checksum


def test_a_destination_that_dies_before_the_commit_leaves_it_at_the_source(
    bench: Bench, guest: Guest
) -> None:
    """It is gone when COMMIT comes: nobody listens there, so the source goes on."""
    source, target = guest.vm, bench.target(guest, another=True)
    checksum = guest.agent.mem_start(8)
    far = bench.listen(target).removeprefix("unix:")
    near = bench.folder / f"{target.name}.cut"
    with ConnectionCutter(near, Path(far), Kind.COMMIT, False, before=target.kill) as cutter:
        source.start_migration(f"unix:{near}")
        info = source.wait_migration()
        assert cutter.cut.is_set()
    assert info["status"] == "failed"
    assert source.status() == "running"
    assert source.transitions() == [("running", "finish-migrate"), ("finish-migrate", "running")]
    assert [event["event"] for event in source.news("STOP", "RESUME")] == ["STOP", "RESUME"]
    bench.answers()
    assert guest.agent.mem_check() == checksum
    # Whether it ran there for a moment is not known, so the network is told where it is.
    assert source.event("ANNOUNCE_STARTED")["data"]["id"] == "returned"
    source.event("ANNOUNCE_ACKED")
    bench.move(guest, bench.target(guest))
    guest.agent.ping()
