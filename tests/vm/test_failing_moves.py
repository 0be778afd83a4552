"""A move that fails leaves the guest running at its source, and its peers notice nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_bench import Bench, Guest, Watched, held, resident

from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from lab.scenario import wait_for
from lab.traffic import FLOWS

#: Bytes a second: what the guest holds takes twenty seconds and more.
_SLOW = 2 << 20


@contextmanager
def _copying_slowly(bench: Bench, guest: Guest, target: Watched) -> Iterator[None]:
    """The copy has begun and will not end by itself; every flow is answered until the block ends,
    and the guest never stops."""
    source = guest.vm
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": _SLOW})
    pings = [bench.ping(flow.id, 0.2) for flow in FLOWS]
    try:
        for ping in pings:
            ping.wait_answer(0.0)
        source.start_migration(bench.listen(target))
        wait_for(lambda: _ram(source).get("transferred", 0) > 1 << 20, 60)
        yield
        assert not source.news("STOP", "RESUME")
        assert source.status() == "running"
        last = [ping.answers().times[-1][0] for ping in pings]
        for ping, at in zip(pings, last, strict=True):
            ping.wait_answer(at)
    finally:
        for ping in pings:
            ping.stop()
        source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    for ping in pings:
        answers = ping.answers()
        assert answers.sent - answers.received <= 1, f"{ping.flow}: lost {answers}"


def _ram(vm: Watched) -> dict[str, int]:
    return dict(vm.qmp.execute("query-migrate").get("ram", {}))


def test_a_destination_that_dies_during_the_copy(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest, another=True)
    with _copying_slowly(bench, guest, target):
        target.kill()
        info = guest.vm.wait_migration()
        assert info["status"] == "failed"
        assert "connection" in info["error-desc"]
    assert guest.vm.transitions() == []
    # The same guest can be moved afterwards.
    bench.move(guest, bench.target(guest))
    guest.agent.ping()


def test_a_move_that_is_cancelled_during_the_copy(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest, another=True)
    with _copying_slowly(bench, guest, target):
        guest.vm.qmp.execute("migrate_cancel")
        assert guest.vm.wait_migration()["status"] == "cancelled"
        # Its RAM is spoilt, so the destination ends, and says why.
        assert target.wait(60) == 1
        assert "no guest arrived" in target.console
    assert guest.vm.transitions() == []
    bench.move(guest, bench.target(guest))
    guest.agent.ping()


def test_nobody_listens(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    for uri, why in (
        (f"unix:{bench.folder}/nobody", "No such file"),
        ("tcp:127.0.0.1:9", "refused"),
    ):
        vm.start_migration(uri)
        info = vm.wait_migration()
        assert info["status"] == "failed"
        assert uri in info["error-desc"]
        assert why in info["error-desc"]
    assert not vm.news("STOP", "RUN_STATE")
    assert vm.status() == "running"
    guest.agent.ping()


def _broken_off(vm: Watched, path: Path, after: int | None) -> None:
    """Move it to a peer that hangs up: at once, or once it has that many bytes of RAM."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)  # the VM is no root's any more
        listener.listen()
        listener.settimeout(60)
        vm.start_migration(f"unix:{path}")
        peer = SocketConnection(listener.accept()[0])
    path.unlink()
    peer.expect_one(Kind.HELLO)
    if after is not None:
        peer.send(Kind.WELCOME, peer.describe(False))
        peer.read(after)
    peer.close()
    assert vm.wait_migration()["status"] == "failed"


@pytest.mark.parametrize("after", [None, 1 << 20, 40 << 20], ids=["hello", "begun", "half"])
def test_failed_moves_leave_nothing_behind(bench: Bench, guest: Guest, after: int | None) -> None:
    vm, path = guest.vm, bench.folder / "hangs-up"
    before = held(vm.pid)
    for _ in range(2):  # what is made once is made by then
        _broken_off(vm, path, after)
    memory = resident(vm.pid)
    for _ in range(8):
        _broken_off(vm, path, after)
    wait_for(lambda: held(vm.pid) == before, 10)  # the move's thread ends after the event
    assert resident(vm.pid) - memory < 4 << 20
    assert vm.status() == "running"
    guest.agent.ping()
