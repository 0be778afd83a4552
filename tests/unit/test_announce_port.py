"""The announcement and its port: held while the port is not ready, named when out of a bridge."""

from __future__ import annotations

import pytest

from announce_bench import ROUNDS, Bench, Port, S, hung, wanted
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters


def test_a_port_that_is_not_ready_holds_everything() -> None:
    bench = Bench(nic0=True, nic1=False)
    port = bench.uplinks[0].port = Port("its bridge's port is learning")
    bench.go(S.RUNNING)
    bench.clock.advance(30)
    assert (bench.nics[0].asked, bench.nics[0].sent) == ([], [])
    assert len(bench.nics[1].sent) == 5  # the other's is
    assert bench.events[0] == (
        Event.ANNOUNCE_HELD,
        {"nic": "nic0", "cause": "its bridge's port is learning"},
    )
    assert bench.announcer.records()[0].held == "its bridge's port is learning"
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    assert bench.nics[0].asked == [30.0]
    bench.announcer.port_ready("nic0")  # once more: nothing is held
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx([30 + at for at in ROUNDS])
    (record, _) = bench.announcer.records()
    assert (record.held, record.ready_at, record.rounds) == (None, 1030.0, 5)


def test_a_port_that_goes_between_two_rounds_holds_the_rest_until_it_is_back() -> None:
    bench = Bench(nic0=False)
    port = bench.uplinks[0].port = Port()
    bench.go(S.RUNNING)
    port.not_ready_reason = "there is no interface 'tap0'"
    bench.clock.advance(30)
    assert len(bench.nics[0].sent) == 1
    assert (Event.ANNOUNCE_HELD, {"nic": "nic0", "cause": port.not_ready_reason}) in bench.events
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    bench.clock.advance(60)
    (record,) = bench.announcer.records()
    assert (len(bench.nics[0].sent), record.rounds, record.held) == (5, 5, None)


def test_a_fallback_that_falls_due_when_the_port_is_gone_is_made_when_it_is_back() -> None:
    bench = hung()  # the first round has asked, and nobody answers
    port = bench.uplinks[0].port = Port("down")
    bench.clock.advance(60)
    assert bench.nics[0].sent == []
    assert bench.names().count(Event.ANNOUNCE_HELD) == 1
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    assert len(bench.nics[0].sent) > 0
    bench.clock.advance(60)
    assert bench.announcer.records()[0].rounds == 5


def test_the_fallback_waits_for_the_port_after_the_last_round_too() -> None:
    bench = Bench(nic0=True)
    port = bench.uplinks[0].port = Port()
    bench.nics[0].acks_after = None
    bench.parameters = wanted(AnnounceParameters(rounds=1))
    bench.go(S.RUNNING)
    port.not_ready_reason = "down"
    bench.clock.advance(30)
    assert bench.nics[0].sent == []
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    assert len(bench.nics[0].sent) == 1
    bench.clock.advance(30)
    assert (len(bench.nics[0].sent), bench.announcer.records()[0].rounds) == (1, 1)


def test_a_tap_that_left_its_bridge_is_named_each_round_and_the_rounds_go_on() -> None:
    bench = Bench(nic0=False)
    port = bench.uplinks[0].port = Port()
    bench.go(S.RUNNING)
    port.warning = "'tap0' was in a bridge"
    bench.clock.advance(60)
    failed = [data for name, data in bench.events if name == Event.ANNOUNCE_FAILED]
    assert [data["round"] for data in failed] == [2, 3, 4, 5]
    assert "in a bridge" in str(failed[0]["cause"])
    assert len(bench.nics[0].sent) == 5


def test_a_pause_ends_what_is_held() -> None:
    bench = Bench(nic0=True)
    bench.uplinks[0].port = Port("down")
    bench.go(S.RUNNING, S.PAUSED, S.RUNNING)
    bench.announcer.port_ready("nic0")
    bench.clock.advance(60)
    assert (bench.nics[0].asked, bench.names()) == (
        [],
        [Event.ANNOUNCE_HELD, Event.ANNOUNCE_STARTED],
    )


def test_what_is_held_is_not_forgotten_when_another_announcement_begins() -> None:
    bench = Bench(nic0=True, nic1=True)
    bench.uplinks[0].port = Port("down")
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    bench.announcer.announce_self(AnnounceParameters(rounds=1), ["nic1"])
    bench.uplinks[0].port = Port()
    bench.announcer.port_ready("nic0")
    assert bench.nics[0].asked == [60.0]


def test_a_port_that_becomes_ready_is_no_reason_to_announce() -> None:
    bench = Bench(nic0=True)
    bench.announcer.port_ready("nic0")
    bench.announcer.port_ready("unknown")
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    bench.announcer.port_ready("nic0")
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
