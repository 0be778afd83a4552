"""A tap that is deleted, and one whose MTU is too low."""

from __future__ import annotations

import os
import select

import pytest

from godwit.host.net import rtnetlink, tap
from godwit.host.net.rtnetlink import Link
from godwit.host.net.tap import mtu_problem
from godwit.hw.memory import GuestMemory
from inprocess_bench import Bench
from test_vm import Place

_LINK = Link(5, "tap0", True, 0, None, 1500)


def _idle(bench: Bench) -> bool:
    """Return whether the loop has nothing to do."""
    bench.loop.run_once(0)
    return not select.epoll.poll(bench.loop._epoll, 0)


def test_a_deleted_tap_costs_no_cpu_and_is_reported_once(memory: GuestMemory) -> None:
    bench = Bench(memory)
    lost: list[str] = []
    bench.backlog.on_lost = lambda: lost.append("tap")
    bench.tap.delete()
    for _ in range(5):
        bench.loop.run_once(0)
    assert lost == ["tap"]
    assert bench.backlog.lost
    assert _idle(bench)
    # The guest's buffers and frames cause no more.
    for kick in bench.kicks:
        os.eventfd_write(kick, 1)
    for _ in range(5):
        bench.loop.run_once(0)
    assert lost == ["tap"]
    assert bench.errors == []
    assert _idle(bench)


def test_what_waits_already_still_goes_to_the_guest(memory: GuestMemory) -> None:
    bench = Bench(memory)
    bench.tap.delete()
    bench.loop.run_once(0)
    frame = bytes(12) + b"\xff" * 60
    bench.backlog.inject([frame])
    assert bench.backlog.take(5) == [frame]
    assert bench.backlog.take(5) == []


def test_a_tap_that_was_only_renamed_is_not_lost(memory: GuestMemory) -> None:
    bench = Bench(memory)
    bench.backlog.check()
    assert not bench.backlog.lost
    bench.tap.delete()
    bench.backlog.check()
    bench.backlog.check()
    assert bench.backlog.lost


@pytest.mark.parametrize("nic", ["tap=tap0,vhost=off", "tap=tap0,model=e1000"])
def test_the_guest_lives_and_migrates_away(nic: str, tmp_path: object) -> None:
    one, other = Place(("--nic", nic)), Place(("--nic", nic))
    try:
        one.vm.start()
        one.taps["tap0"].delete()
        one.vm.machine.nics[0].rx_backlog.check()
        one.run_until(lambda: bool(one.named("NIC_TAP_LOST")))
        assert one.named("NIC_TAP_LOST") == [{"nic": "nic0", "tap": "tap0"}]
        assert one.vm.machine.running
        assert "tap 'tap0' is gone" in one.text[-1]
        uri = f"unix:{tmp_path}/m"
        other.vm.await_guest(uri, False)
        one.vm.migrate(uri, False)
        one.finish_migration()
        info = one.vm.migration_info()
        assert info["status"] == "completed", info["error-desc"]
        assert one.named("NIC_TAP_LOST") == [{"nic": "nic0", "tap": "tap0"}]
        one.vm._tap_anew("nic0")
        assert one.named("NIC_TAP_ANEW") == [{"nic": "nic0", "tap": "tap0"}]
        assert "migrate the guest" in one.text[-1]
    finally:
        one.close()
        other.close()


# --- frames older than the start ------------------------------------------------------------------
def test_what_came_before_the_cont_is_not_delivered() -> None:
    place = Place()
    try:
        place.vm.start()
        place.vm.stop()
        fake = place.taps["tap0"]
        for number in range(5):
            fake.put(bytes([number]) * 60)
        place.vm.cont()
        with pytest.raises(BlockingIOError):
            fake.receive()
        fake.put(b"\x77" * 60)
        assert fake.receive()[12:] == b"\x77" * 60
    finally:
        place.close()


# --- MTU ------------------------------------------------------------------------------------------
def _link(monkeypatch: pytest.MonkeyPatch, found: Link | OSError | None) -> None:
    def link(name: str) -> Link | None:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(rtnetlink, "link", link)


def test_the_mtu_a_guest_was_told_has_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _link(monkeypatch, _LINK)
    assert mtu_problem("tap0", 1500) is None
    problem = mtu_problem("tap0", 9000)
    assert problem is not None
    assert "MTU 1500" in problem
    assert "ip link set tap0 mtu 9000" in problem
    for unknown in (None, _LINK._replace(mtu=0), OSError(1, "no")):
        _link(monkeypatch, unknown)
        assert mtu_problem("tap0", 9000) is None


def test_a_migration_is_refused_before_the_stop_and_a_start_warned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    nic = ("--nic", "tap=tap0,mtu=9000,vhost=off")
    one = Place(nic)
    _link(monkeypatch, _LINK)
    other = Place(nic)
    try:
        assert any("MTU 1500" in text for text in other.text)
        one.vm.start()
        uri = f"unix:{tmp_path}/m"
        other.vm.await_guest(uri, False)
        one.vm.migrate(uri, False)
        one.finish_migration()
        assert one.vm.migration_info()["status"] == "failed"
        assert "the guest is told 9000" in str(one.vm.migration_info()["error-desc"])
        assert one.vm.machine.running
        assert one.named("STOP") == []
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize(
    ("there", "mtu", "expected"),
    [(None, 9000, [("tap0", 9000)]), (_LINK, 9000, []), (None, None, [])],
)
def test_a_tap_that_is_made_gets_the_mtu(
    monkeypatch: pytest.MonkeyPatch,
    there: Link | None,
    mtu: int | None,
    expected: list[tuple[str, int]],
) -> None:
    _link(monkeypatch, there)
    given: list[tuple[str, int]] = []
    monkeypatch.setattr(tap, "_set_mtu", lambda name, mtu: given.append((name, mtu)))
    monkeypatch.setattr(tap.os, "open", lambda *arguments: os.eventfd(0))
    for name in ("ioctl", "ioctl_in", "ioctl_out"):
        monkeypatch.setattr(tap, name, lambda *arguments: 0)
    made = tap.Tap("tap0", mtu)
    made.close()
    assert given == expected


def test_an_mtu_that_the_kernel_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from godwit.errors import HostError

    _link(monkeypatch, None)

    def refuse(name: str, mtu: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(tap, "_set_mtu", refuse)
    monkeypatch.setattr(tap.os, "open", lambda *arguments: os.eventfd(0))
    for name in ("ioctl", "ioctl_in", "ioctl_out"):
        monkeypatch.setattr(tap, name, lambda *arguments: 0)
    with pytest.raises(HostError, match="tap 'tap0': MTU 9000"):
        tap.Tap("tap0", 9000)


# --- ages -----------------------------------------------------------------------------------------
def test_ages_grow_by_the_time_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from announce_bench import IP4, IP6
    from godwit.announce.frames import gratuitous_arp, unsolicited_na
    from godwit.migration import guest as module

    one, other = Place(), Place()
    try:
        one.vm.start()
        uplink = one.vm.uplinks[0]
        now = one.loop.now()
        uplink.observer.frame(gratuitous_arp(uplink.nic.mac, IP4), None, now - 3000)
        uplink.observer.frame(unsolicited_na(uplink.nic.mac, IP6), None, now)
        uri = f"file:{tmp_path}/saved"
        one.vm.migrate(uri, False)
        one.finish_migration()
        real = module.away_for
        monkeypatch.setattr(module, "away_for", lambda *arguments: real(*arguments) + 1000)
        other.vm.await_guest(uri, False)
        other.run_until(lambda: other.vm.machine.running)
        with other.vm.uplinks[0].observer.book(other.loop.now()) as book:
            known = {entry.ip: other.loop.now() - entry.last_seen for entry in book.entries()}
        assert IP4 not in known, "it is older than an hour by now"
        assert 1000 <= known[IP6] < 1100
    finally:
        one.close()
        other.close()


def test_the_time_in_a_file_is_the_real_time_clocks() -> None:
    import time
    from types import SimpleNamespace
    from typing import Any

    from godwit.machine.machine import away_for

    def away(realtime_ns: int, since: float = 0.0) -> float:
        state: Any = SimpleNamespace(realtime_ns=realtime_ns)
        return away_for(state, time.monotonic() - since)

    assert away(time.time_ns() - 7 * 10**9) == pytest.approx(7, abs=0.5)
    # A clock that was set back, a hostile one, and none.
    for odd in (time.time_ns() + 10**15, 2**64 - 1, 0):
        assert away(odd, 2.0) == pytest.approx(2, abs=0.5)
