"""The host asks for addresses before it announces them, sends RARP, and asks gateways."""

from __future__ import annotations

import pytest

from announce_bench import (
    ACK_S,
    GATEWAY,
    GATEWAY6,
    IP4,
    IP6,
    PEER,
    ROUNDS,
    STRANGER,
    VLAN,
    Bench,
    Port,
    S,
    Tags,
    bench_of,
    reply,
    shows,
    wanted,
)
from godwit.announce import frames
from godwit.announce.frames import (
    arp_probe,
    arp_request,
    gratuitous_arp,
    rarp,
    solicitation,
    unsolicited_na,
)
from godwit.announce.host_announcement import ASK_AGAIN_S, LATELY_S
from godwit.announce.nic_announcement import ASK_AFTER_S
from godwit.announce.questions import (
    ASK_S,
    INTRODUCTIONS,
    LATER_S,
    MAX_INTRODUCED,
    MAX_NETWORKS,
)
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters, Rarp


# --- asked for, then announced --------------------------------------------------------------------
@pytest.mark.parametrize("tags", [(), VLAN])
@pytest.mark.parametrize("ip", [IP4, IP6])
def test_an_address_is_asked_for_before_the_host_announces_it(ip: bytes, tags: Tags) -> None:
    bench = bench_of(accepts=False)
    mac = bench.nics[0].mac
    announcement = (gratuitous_arp if len(ip) == 4 else unsolicited_na)(mac, ip, tags)
    bench.guest_sends(announcement)
    bench.go(S.RUNNING)
    question = arp_probe(mac, ip, tags) if len(ip) == 4 else solicitation(mac, None, ip, tags)
    first = bench.sent()
    # The switches learn at once; the hosts nothing yet.
    assert question in first
    assert {rarp(mac), rarp(mac, tags)} <= set(first)
    assert announcement not in first
    bench.clock.advance(ASK_S - 0.01)
    before = bench.sent()
    assert announcement not in before
    assert before.count(question) == 1, "a frame may be lost"
    bench.clock.advance(0.02)
    assert announcement in bench.sent()


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("after", [0.001, ASK_AGAIN_S + 0.01, ASK_S - 0.01])
def test_who_answers_keeps_the_address(accepts: bool, after: float) -> None:
    bench = bench_of(accepts)
    mac = bench.nics[0].mac
    shows(bench, rarp(mac))
    bench.go(S.RUNNING)
    bench.clock.advance(0.11 if accepts else 0.0)  # what the guest leaves out is looked for then
    assert arp_probe(mac, IP4) in bench.sent()
    bench.clock.advance(after)
    bench.network_sends(reply(IP4, STRANGER))
    bench.clock.advance(60)
    assert not [frame for frame in bench.sent() if frame == gratuitous_arp(mac, IP4)]
    assert bench.announcer.info()[0]["claims"] == 1


def test_what_an_acknowledging_guest_leaves_out_is_asked_for_and_announced() -> None:
    bench = bench_of()
    mac = bench.nics[0].mac
    shows(bench, rarp(mac))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert gratuitous_arp(mac, IP4) in bench.sent()
    assert {data["why"] for data in bench.data(Event.ANNOUNCE_HOST)} == {"not shown"}
    (record,) = bench.announcer.records()
    assert (record.method, record.acks) == ("guest", 5)


def test_what_an_acknowledging_guest_used_long_ago_is_not_announced() -> None:
    bench = bench_of()
    mac = bench.nics[0].mac
    bench.clock.advance(LATELY_S + 1)
    bench.guest_sends(gratuitous_arp(mac, b"\xc0\0\2\x08"))
    shows(bench, rarp(mac))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    sent = set(bench.sent())
    assert gratuitous_arp(mac, b"\xc0\0\2\x08") in sent
    assert not sent & {gratuitous_arp(mac, IP4), arp_probe(mac, IP4)}


def test_what_was_not_shown_is_not_introduced_to_gateways() -> None:
    bench = bench_of(ask_gateways=True)
    mac = bench.nics[0].mac
    old = b"\xc0\0\2\x08"
    bench.guest_sends(arp_request(mac, old, GATEWAY))
    bench.clock.advance(LATELY_S + 1)
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    shows(bench, gratuitous_arp(mac, IP4))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    sent = bench.sent()
    assert arp_request(mac, IP4, GATEWAY) in sent
    assert not {frame for frame in sent if old in frame}


def test_a_tap_that_takes_nothing_is_reported_once_a_round() -> None:
    bench = bench_of(ask_gateways=True, rarp=Rarp.ALWAYS)
    mac = bench.nics[0].mac
    for number in range(50):
        bench.guest_sends(arp_request(mac, bytes([192, 0, 2, 100 + number]), GATEWAY))
    bench.nics[0].error = OSError(77, "File descriptor in bad state")
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert len(bench.data(Event.ANNOUNCE_FAILED)) < 40


def test_a_claim_at_any_time_ends_the_announcement_of_the_address() -> None:
    bench = bench_of(accepts=False)
    mac = bench.nics[0].mac
    bench.go(S.RUNNING)
    bench.clock.advance(ASK_S + 0.06)
    assert gratuitous_arp(mac, IP4) in bench.sent()
    bench.network_sends(gratuitous_arp(STRANGER, IP4))
    bench.clock.advance(60)
    sent = bench.sent()
    assert gratuitous_arp(mac, IP4) not in sent
    assert rarp(mac) in sent


def test_for_a_guest_that_hangs_the_answers_are_there_in_time() -> None:
    bench = bench_of()
    bench.nics[0].acks_after = None
    mac = bench.nics[0].mac
    bench.go(S.RUNNING)
    bench.clock.advance(0.801)
    assert bench.nics[0].sent[-2:] == [(0.8, rarp(mac)), (0.8, gratuitous_arp(mac, IP4))]


def test_an_ack_that_comes_while_the_host_asks_leaves_it_to_the_guest() -> None:
    bench = bench_of()
    nic, mac = bench.nics[0], bench.nics[0].mac
    nic.acks_after = None
    bench.guest_sends(gratuitous_arp(mac, b"\xc0\0\2\x08"))
    bench.go(S.RUNNING)
    bench.clock.advance(0.79)
    bench.guest_sends(gratuitous_arp(mac, b"\xc0\0\2\x09"))  # new, and not asked for yet
    bench.clock.advance(0.2)
    bench.sent()
    nic.acks_after = ACK_S
    shows(bench, *(gratuitous_arp(mac, b"\xc0\0\2" + end) for end in (b"\x07", b"\x08", b"\x09")))
    bench.announcer.acked("nic0")
    bench.clock.advance(60)
    assert gratuitous_arp(mac, b"\xc0\0\2\x09") not in bench.sent()


def test_silence_proves_nothing_before_the_network_passes_frames() -> None:
    bench = bench_of(accepts=False, ask_gateways=True)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    bench.go(S.RUNNING)
    bench.clock.advance(0.3)
    bench.network_sends(reply(b"\xc0\0\2\x63", to=IP4))  # to a question of the guest's: since now
    bench.sent()
    bench.clock.advance(0.11)
    assert gratuitous_arp(mac, IP4) not in bench.sent(), "nobody may have heard the question"
    bench.clock.advance(0.1)
    assert arp_probe(mac, IP4) in bench.sent()
    bench.clock.advance(1)
    assert gratuitous_arp(mac, IP4) in bench.sent()


def test_where_nobody_can_be_heard_the_book_is_all_there_is() -> None:
    bench = Bench(nic0=False)
    bench.watched()
    bench.go(S.RUNNING)
    mac = bench.nics[0].mac
    assert bench.sent() == [rarp(mac), gratuitous_arp(mac, IP4)]


def test_a_source_whose_guest_returned_asks_too() -> None:
    bench = bench_of(accepts=False)
    bench.states = type(bench.states)(S.FINISH_MIGRATE)
    bench.states.listen(bench.announcer.run_state_changed)
    bench.go(S.RUNNING)
    mac = bench.nics[0].mac
    bench.announcer.returned()
    assert bench.sent() == [arp_probe(mac, IP4), rarp(mac)]


# --- RARP -----------------------------------------------------------------------------------------
def test_each_round_begins_with_a_rarp_whoever_announces() -> None:
    bench = Bench(nic0=True, nic1=False)
    bench.parameters = wanted(rarp=Rarp.ALWAYS)
    first = bench.nics[0]
    order: list[str] = []
    first.during = lambda: order.append(f"asked after {len(first.sent)}")
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert first.sent == [(at, rarp(first.mac)) for at in pytest.approx(ROUNDS).expected]
    assert order == [f"asked after {number}" for number in range(1, 6)]
    second = bench.nics[1]
    assert second.sent == [(at, rarp(second.mac)) for at in pytest.approx(ROUNDS).expected]
    records = bench.announcer.records()
    assert [(r.rarp_sent, r.host_sent) for r in records] == [(5, 0), (0, 5)]


def test_no_rarp_that_the_policy_forbids() -> None:
    from godwit.announce.policy import parse_policy

    bench = Bench(nic0=True)
    bench.parameters = wanted(rarp=Rarp.ALWAYS)
    bench.uplinks[0].policy = parse_policy(PEER.hex(":"))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.sent() == []


def test_a_rarp_that_fails_is_reported_and_the_guest_is_asked() -> None:
    bench = Bench(nic0=True)
    bench.parameters = wanted(AnnounceParameters(rounds=1), rarp=Rarp.ALWAYS)
    bench.nics[0].error = OSError(100, "Network is down")
    bench.go(S.RUNNING)
    assert bench.nics[0].asked == [0.0]
    assert "Network is down" in str(bench.data(Event.ANNOUNCE_FAILED)[0]["cause"])


# --- gateways -------------------------------------------------------------------------------------
def test_peers_are_asked_from_nobody_right_behind_the_guest() -> None:
    bench = bench_of(ask_gateways=True)
    nic, mac = bench.nics[0], bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    bench.guest_sends(arp_request(mac, IP4, GATEWAY, VLAN))
    bench.guest_sends(solicitation(mac, IP6, GATEWAY6))
    bench.go(S.RUNNING)
    assert (nic.asked, bench.sent()) == ([0.0], []), "the resume waits for no question"
    bench.clock.advance(ASK_AFTER_S)
    assert sorted(bench.sent()) == sorted(
        [
            arp_probe(mac, GATEWAY),
            arp_probe(mac, GATEWAY, VLAN),
            solicitation(mac, None, GATEWAY6),
        ]
    )


def test_an_ipv6_peer_is_asked_from_the_address_made_of_the_mac_address() -> None:
    bench = bench_of(ask_gateways=True)
    mac = bench.nics[0].mac
    assert frames.link_local(bytes.fromhex("525400677701")).hex(":", 2) == (
        "fe80:0000:0000:0000:5054:00ff:fe67:7701"
    )
    for tags in ((), VLAN):
        bench.guest_sends(solicitation(mac, IP6, GATEWAY6, tags))
    bench.guest_sends(solicitation(mac, frames.link_local(mac), GATEWAY6))
    bench.go(S.RUNNING)
    bench.clock.advance(ASK_AFTER_S)
    sent = bench.sent()
    assert solicitation(mac, frames.link_local(mac), GATEWAY6) in sent
    assert solicitation(mac, None, GATEWAY6, VLAN) in sent


def test_gateways_are_asked_from_each_address_that_is_announced() -> None:
    bench = bench_of(ask_gateways=True)
    mac = bench.nics[0].mac
    other = b"\xc0\0\2\x08"
    for ip in (IP4, other):
        bench.guest_sends(arp_request(mac, ip, GATEWAY))
    bench.guest_sends(solicitation(mac, IP6, GATEWAY6))
    shows(bench, gratuitous_arp(mac, IP4), unsolicited_na(mac, IP6))
    bench.go(S.RUNNING)
    bench.clock.advance(0.11)
    sent = bench.sent()
    # What the guest has shown is its own; the other address has to be asked for first.
    assert arp_request(mac, IP4, GATEWAY) in sent
    assert solicitation(mac, IP6, GATEWAY6) in sent
    assert arp_request(mac, other, GATEWAY) not in sent
    bench.clock.advance(60)
    sent += bench.sent()
    assert arp_request(mac, other, GATEWAY) in sent
    assert sent.count(arp_request(mac, IP4, GATEWAY)) >= len(ROUNDS) + len(LATER_S)
    (record,) = bench.announcer.records()
    assert record.questions == len(sent) - record.host_sent


def test_gateways_are_left_out_if_so_wanted() -> None:
    bench = bench_of(ask_gateways=False)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    shows(bench, gratuitous_arp(mac, IP4))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.sent() == []


def test_questions_are_bounded() -> None:
    bench = bench_of(ask_gateways=True)
    mac = bench.nics[0].mac
    shown = [gratuitous_arp(mac, IP4)]
    for number in range(300):
        tags = ((0x8100, 1 + number),)
        bench.guest_sends(arp_request(mac, IP4, GATEWAY, tags))
        shown.append(gratuitous_arp(mac, IP4, tags))
    shows(bench, *shown)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    sent = bench.sent()
    assert len({frame[14:16] for frame in sent}) <= 1 + MAX_NETWORKS + MAX_INTRODUCED
    assert len(sent) <= 5 * MAX_NETWORKS + INTRODUCTIONS * MAX_INTRODUCED


def test_questions_count_in_the_rate() -> None:
    bench = bench_of(ask_gateways=True, rate=100)
    mac = bench.nics[0].mac
    shown = [gratuitous_arp(mac, IP4)]
    for number in range(50):
        tags = ((0x8100, 1 + number),)
        bench.guest_sends(arp_request(mac, IP4, GATEWAY, tags))
        shown.append(gratuitous_arp(mac, IP4, tags))
    shows(bench, *shown)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    record = bench.announcer.records()[0]
    # Each round but the last was paid for: its addresses and the questions before.
    asked = bench.nics[0].asked
    assert len(asked) == 5
    assert asked[-1] >= (4 * 51 + 150) / 100 - 0.1
    assert record.questions >= 150


def test_a_port_that_goes_while_the_answer_is_awaited_holds_the_announcement() -> None:
    bench = bench_of(accepts=False)
    bench.parameters = wanted(AnnounceParameters(rounds=1))
    port = bench.uplinks[0].port = Port()
    mac = bench.nics[0].mac
    bench.go(S.RUNNING)
    port.not_ready_reason = "no carrier"
    bench.clock.advance(5)
    assert gratuitous_arp(mac, IP4) not in bench.sent()
    assert bench.announcer.info()[0]["held"] == "no carrier"
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    bench.clock.advance(5)
    sent = bench.sent()
    assert sent.index(arp_probe(mac, IP4)) < sent.index(gratuitous_arp(mac, IP4))


def test_silence_from_before_a_port_was_gone_proves_nothing() -> None:
    bench = bench_of(accepts=False)
    bench.parameters = wanted(AnnounceParameters(rounds=2, initial=100, step=1))
    port = bench.uplinks[0].port = Port()
    mac = bench.nics[0].mac
    bench.go(S.RUNNING)
    port.not_ready_reason = "no carrier"
    bench.clock.advance(0.2)
    assert arp_probe(mac, IP4) in bench.sent()
    port.not_ready_reason = None
    bench.announcer.port_ready("nic0")
    assert arp_probe(mac, IP4) in bench.sent()


def test_later_questions_are_from_an_address_that_was_announced() -> None:
    bench = bench_of(accepts=False, ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    bench.go(S.RUNNING)
    bench.clock.advance(ASK_S)
    assert arp_probe(mac, GATEWAY) in bench.sent()
    bench.clock.advance(60)
    sent = bench.sent()
    assert arp_probe(mac, GATEWAY) not in sent
    assert arp_request(mac, IP4, GATEWAY) in sent
