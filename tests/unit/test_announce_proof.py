"""Rounds go on until the network is known to pass frames, or patience ends."""

from __future__ import annotations

import pytest

from announce_bench import (
    GATEWAY,
    IP4,
    PEER,
    ROUNDS,
    VLAN,
    Port,
    S,
    bench_of,
    proof,
    reply,
    shows,
    waiting,
    wanted,
)
from godwit.announce.frames import (
    arp_probe,
    arp_request,
    gratuitous_arp,
)
from godwit.announce.nic_announcement import ASK_AFTER_S
from godwit.announce.questions import (
    INTRODUCTIONS,
)
from godwit.errors import ConfigError
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceOptions, AnnounceParameters


def test_an_answer_ends_the_schedule() -> None:
    bench = bench_of(ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    shows(bench, gratuitous_arp(mac, IP4))
    assert proof(bench)[0] is None
    bench.go(S.RUNNING)
    assert proof(bench) == ("awaited", None, [])
    bench.clock.advance(ASK_AFTER_S + 0.004)
    bench.network_sends(reply(GATEWAY))
    assert proof(bench) == ("answered", 104.0, [])
    bench.clock.advance(600)
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
    assert bench.announcer.info()[0]["answers"] == 1
    assert bench.clock.pending == []


def test_without_an_answer_rounds_go_on_further_and_further_apart() -> None:
    bench = bench_of(ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY, VLAN))
    shows(bench, gratuitous_arp(mac, IP4))
    bench.go(S.RUNNING)
    bench.clock.advance(600)
    further = [at - ROUNDS[-1] for at in bench.nics[0].asked[5:]]
    assert further == pytest.approx([1, 3, 7, 15, 31, 63])
    assert proof(bench) == ("none came", None, ["no answer in VLAN 100"])
    assert bench.data(Event.ANNOUNCE_UNPROVED) == [
        {"nic": "nic0", "what": ["no answer in VLAN 100"]}
    ]
    assert bench.clock.pending == []


def test_a_guest_without_known_peers_is_announced_for_as_long() -> None:
    bench = bench_of(ask_gateways=True, patience=10_000)
    bench.go(S.RUNNING)
    bench.clock.advance(600)
    assert bench.nics[0].asked[-1] == pytest.approx(ROUNDS[-1] + 7)
    assert proof(bench)[2] == ["no peer of the guest's is known that could be asked"]


def test_a_port_that_opens_late_gets_a_round_that_counts() -> None:
    """What was sent before may be lost, however it was seen."""
    bench, nic = waiting()
    bench.clock.advance(10)
    asked = len(nic.asked)
    # The guest's own question is answered, between two rounds.
    bench.network_sends(reply(GATEWAY, to=IP4))
    assert len(nic.asked) == asked + 1
    bench.clock.advance(600)
    assert len(nic.asked) == asked + 1
    assert proof(bench)[0] == "answered"


@pytest.mark.parametrize("late", [0.3, 5.0, 20.0])
def test_the_host_announces_again_what_a_late_port_has_swallowed(late: float) -> None:
    bench = bench_of(accepts=False, ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    bench.go(S.RUNNING)
    bench.clock.advance(late)
    bench.network_sends(reply(b"\xc0\0\2\x63", to=IP4))  # to a question of the guest's: since now
    bench.sent()
    bench.clock.advance(3)
    sent = bench.sent()
    assert {arp_probe(mac, IP4), gratuitous_arp(mac, IP4), arp_request(mac, IP4, GATEWAY)} <= set(
        sent
    )
    assert sent.index(arp_probe(mac, IP4)) < sent.index(gratuitous_arp(mac, IP4))


def test_an_answer_of_the_last_rounds_question_needs_no_other_round() -> None:
    bench, nic = waiting()
    bench.clock.advance(ROUNDS[-1] + 1.01)
    assert len(nic.asked) == 6
    bench.network_sends(reply(GATEWAY))
    bench.clock.advance(600)
    assert len(nic.asked) == 6


def test_an_answer_behind_the_last_round_of_the_schedule_gets_another() -> None:
    bench, nic = waiting()
    bench.clock.advance(ROUNDS[-1] + 0.1)
    bench.network_sends(reply(b"\xc0\0\2\x63", to=IP4))  # to the guest's own question
    assert proof(bench)[0] == "answered"
    bench.clock.advance(600)
    assert len(nic.asked) == 6


def test_gateways_that_were_out_of_reach_are_asked_again() -> None:
    bench, nic = waiting()
    mac = nic.mac
    bench.clock.advance(10)
    assert bench.sent().count(arp_request(mac, IP4, GATEWAY)) >= INTRODUCTIONS
    bench.network_sends(reply(GATEWAY))
    bench.network_sends(reply(GATEWAY, to=IP4))
    bench.clock.advance(10)
    assert arp_request(mac, IP4, GATEWAY) in bench.sent()


def test_the_wait_for_an_answer_begins_with_the_first_round() -> None:
    bench = bench_of(ask_gateways=True, patience=10_000)
    port = bench.uplinks[0].port = Port("blocking")
    bench.go(S.RUNNING)
    bench.clock.advance(100)
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    bench.clock.advance(600)
    assert bench.nics[0].asked[-1] == pytest.approx(100 + ROUNDS[-1] + 7)


def test_an_operators_rounds_are_as_many_as_wanted() -> None:
    bench = bench_of(ask_gateways=True, patience=60_000)
    bench.announcer._running = True
    bench.announcer.announce_self(AnnounceParameters(rounds=2), id="now")
    bench.clock.advance(600)
    assert len(bench.nics[0].asked) == 2


def test_each_network_has_to_pass_frames() -> None:
    bench = bench_of(ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    for tags in ((), VLAN):
        bench.guest_sends(arp_request(mac, IP4, GATEWAY, tags))
    shows(bench, gratuitous_arp(mac, IP4), gratuitous_arp(mac, IP4, VLAN))
    bench.go(S.RUNNING)
    bench.clock.advance(ASK_AFTER_S)
    bench.network_sends(reply(GATEWAY))
    bench.clock.advance(2)
    assert proof(bench)[::2] == ("awaited", ["no answer in VLAN 100"])
    bench.network_sends(reply(GATEWAY, tags=VLAN))
    assert proof(bench)[0] == "answered"
    assert proof(bench)[2] == []


def test_what_was_seen_before_the_network_passed_frames_counts_as_not_shown() -> None:
    bench = bench_of(ask_gateways=True)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    bench.parameters = wanted(AnnounceParameters(rounds=1), ask_gateways=True)
    shows(bench, gratuitous_arp(mac, IP4))
    bench.go(S.RUNNING)
    bench.clock.advance(0.05)
    bench.network_sends(reply(GATEWAY, to=IP4))  # to a question that somebody asked: since now
    bench.network_sends(reply(GATEWAY))
    bench.clock.advance(0.06)
    assert bench.uplinks[0].missing(lambda tags: 1000.05)
    assert not bench.uplinks[0].missing(lambda tags: 1000.0)


def test_hostile_answers_prove_nothing() -> None:
    bench = bench_of(ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    bench.go(S.RUNNING)
    for frame in (
        reply(b"\xc0\0\2\x63"),  # nobody asked for it
        reply(b"\xc0\0\2\x63", to=b"\xc0\0\2\x64"),  # to another
        reply(GATEWAY, tags=VLAN),  # in another network
        gratuitous_arp(PEER, b"\xc0\0\2\x63"),
        reply(GATEWAY)[:30],
    ):
        bench.network_sends(frame)
    assert proof(bench)[0] == "awaited"


def test_patience_has_a_range() -> None:
    with pytest.raises(ConfigError, match="patience"):
        AnnounceOptions(patience=3_600_001)
    assert AnnounceOptions().patience >= 60_000


def test_a_pause_ends_the_waiting() -> None:
    bench = bench_of(ask_gateways=True, patience=60_000)
    bench.go(S.RUNNING)
    bench.clock.advance(5)
    count = len(bench.nics[0].asked)
    bench.go(S.PAUSED)
    bench.network_sends(reply(GATEWAY, to=IP4))
    bench.clock.advance(600)
    assert len(bench.nics[0].asked) == count


@pytest.mark.parametrize(
    "frame",
    [
        arp_request(PEER, GATEWAY, b"\xc0\0\2\x63"),
        gratuitous_arp(PEER, GATEWAY),
        arp_request(PEER, GATEWAY, IP4),
    ],
)
def test_what_a_peer_asks_answers_nothing(frame: bytes) -> None:
    bench, _ = waiting()
    bench.clock.advance(ASK_AFTER_S)
    bench.network_sends(frame)
    assert proof(bench)[0] == "awaited"
