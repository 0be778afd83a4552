"""A guest that writes faster than the connection takes: throttled until it can migrate, or left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest, Watched

from lab.emulator import MARKER
from lab.guest import READY
from lab.scenario import wait_for
from lab.traffic import FLOWS

#: What the guest writes to without rest, MB.
_HOT = 16
#: Bytes per second: for the first round, which only has to end soon, and for all others. An
#: emulated guest makes 30 MB dirty in a second, for the first write to a page costs it a fault; on
#: a busy machine a third of that. A real one writes to all of them within a slice of its time.
_LINE = (16 if os.environ.get(MARKER) else 400) << 20
_SLOW = _LINE // 4
_LIMIT_MS = 50
_DEFAULTS = {
    "max-bandwidth": 0,
    "downtime-limit": 300,
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "max-cpu-throttle": 99,
    "on-no-convergence": "abort",
}


def _set(vm: Watched, auto_converge: bool, **parameters: Any) -> None:
    state = {"capability": "auto-converge", "state": auto_converge}
    vm.qmp.execute("migrate-set-capabilities", {"capabilities": [state]})
    assert vm.qmp.execute("query-migrate-capabilities") == [state]
    named = {name.replace("_", "-"): value for name, value in parameters.items()}
    vm.qmp.execute("migrate-set-parameters", {**_DEFAULTS, **named})


@pytest.fixture
def writer(bench: Bench, guest: Guest) -> Iterator[Guest]:
    """A guest that writes; its VM's parameters are as ever afterwards."""
    guest.agent.hot_start(_HOT)
    yield guest
    if bench.guest is guest:  # a test that fails loses it
        _set(guest.vm, False)
        guest.agent.hot_stop()


def _goes_on(guest: Guest) -> None:
    """The writer does, and found each page as it had left it."""
    before = guest.agent.hot_check()
    wait_for(lambda: guest.agent.hot_check() > before + 1, 60)


def _progress(vm: Watched) -> dict[str, Any]:
    return dict(vm.qmp.execute("query-migrate"))


def _start(bench: Bench, source: Watched, target: Watched) -> None:
    """Begin a move that rounds alone will not end."""
    source.start_migration(bench.listen(target))
    wait_for(lambda: _progress(source)["ram"]["dirty-sync-count"] > 0, 60)
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": _SLOW})


@ONE_BACKEND
def test_a_throttled_guest_can_move(bench: Bench, writer: Guest) -> None:
    source, target = writer.vm, bench.target(writer)
    _set(
        source,
        True,
        max_bandwidth=_LINE,
        downtime_limit=_LIMIT_MS,
        cpu_throttle_initial=50,
        cpu_throttle_increment=20,
    )
    _start(bench, source, target)
    wait_for(lambda: _progress(source).get("cpu-throttle-percentage", 0) >= 50, 60)
    during = _progress(source)
    info = source.wait_migration(120)
    assert info["status"] == "completed", info
    bench.moved(writer, target, info)
    for name in ("dirty-pages-rate", "pages-per-second", "mbps", "dirty-sync-count"):
        assert during["ram"][name] > 0
    assert during["expected-downtime"] > _LIMIT_MS
    # Not at once, and then more by more; the last round is the stop.
    *rounds, stop = info["godwit"]["rounds"]
    throttles = [one["cpu-throttle-percentage"] for one in rounds]
    assert throttles[:3] == [0, 0, 50]
    assert throttles == sorted(throttles)
    assert "cpu-throttle-percentage" not in stop
    left = rounds[-1]["dirty-pages"] * rounds[-1]["ms"] / rounds[-1]["pages"]
    assert left <= _LIMIT_MS
    # It is over, here and there.
    assert "cpu-throttle-percentage" not in info
    assert "cpu-throttle-percentage" not in _progress(target)
    _goes_on(writer)


@ONE_BACKEND
def test_a_guest_that_cannot_be_slowed_enough_stays(bench: Bench, writer: Guest) -> None:
    source, target = writer.vm, bench.target(writer, another=True)
    _set(
        source,
        True,
        max_bandwidth=_LINE,
        downtime_limit=_LIMIT_MS,
        cpu_throttle_initial=10,
        max_cpu_throttle=10,
    )
    pings = [bench.ping(flow.id, 0.2) for flow in FLOWS]
    try:
        for ping in pings:
            ping.wait_answer(0.0)
        _start(bench, source, target)
        info = source.wait_migration(120)
        last = [ping.answers().times[-1][0] for ping in pings]
        for ping, at in zip(pings, last, strict=True):
            ping.wait_answer(at)
    finally:
        for ping in pings:
            ping.stop()
    assert info["status"] == "failed", info
    for word in ("writes faster", "throttled by 10", "max-cpu-throttle", "max-bandwidth"):
        assert word in info["error-desc"]
    throttles = [one["cpu-throttle-percentage"] for one in info["godwit"]["rounds"]]
    assert throttles[:3] == [0, 0, 10]
    assert max(throttles) == 10
    assert "cpu-throttle-percentage" not in info
    # The guest was never stopped, and its peers noticed nothing.
    assert not source.news("STOP", "RESUME", "RUN_STATE")
    assert source.status() == "running"
    for ping in pings:
        answers = ping.answers()
        assert answers.sent - answers.received <= 1, f"{ping.flow}: lost {answers}"
    assert target.wait(60) == 1
    assert "writes faster" in target.console
    _goes_on(writer)


def _throttle(bench: Bench, source: Watched, target: Watched) -> None:
    """Move a guest that writes; it is throttled by half and more, and the end is far away."""
    _set(
        source,
        True,
        max_bandwidth=_LINE,
        downtime_limit=_LIMIT_MS,
        cpu_throttle_initial=50,
        cpu_throttle_increment=1,
    )
    _start(bench, source, target)
    wait_for(lambda: _progress(source).get("cpu-throttle-percentage", 0) >= 50, 60)


@ONE_BACKEND
def test_what_is_cancelled_is_throttled_no_more(bench: Bench, writer: Guest) -> None:
    source, target = writer.vm, bench.target(writer, another=True)
    _throttle(bench, source, target)
    # A throttled guest stops and goes on as any other, and is throttled still.
    source.qmp.execute("stop")
    assert source.status() == "paused"
    source.qmp.execute("cont")
    assert source.status() == "running"
    assert _progress(source)["cpu-throttle-percentage"] >= 50
    source.qmp.execute("migrate_cancel")
    assert source.wait_migration()["status"] == "cancelled"
    assert "cpu-throttle-percentage" not in _progress(source)
    assert target.wait(60) == 1
    assert source.transitions() == [("running", "paused"), ("paused", "running")]
    _goes_on(writer)


def test_a_guest_that_resets_is_throttled_no_more(bench: Bench) -> None:
    guest = bench.boot()
    source = guest.vm
    target = bench.run(bench.other(source), "--incoming", "defer")
    guest.agent.hot_start(_HOT)
    _throttle(bench, source, target)
    guest.agent.reboot()
    info = source.wait_migration()
    assert info["status"] == "failed"
    assert info["error-desc"] == "the guest reset the machine during its migration"
    assert "cpu-throttle-percentage" not in _progress(source)
    source.event("RESET")
    wait_for(lambda: source.console.count(READY) == 2, 120)
    guest.agent.ping(60)
    guest.agent.hot_start(_HOT)
    _goes_on(guest)
