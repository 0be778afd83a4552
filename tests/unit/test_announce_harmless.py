"""The host asks before it announces, opens ports, and goes on until the network passes frames."""

from __future__ import annotations

import pytest

from announce_bench import ACK_S, GATEWAY, IP4, IP6, ROUNDS, VLAN, Bench, Nic, Port, S, wanted
from godwit.announce import frames
from godwit.announce.dissect import Kind, Sighting
from godwit.announce.frames import (
    arp_probe,
    arp_request,
    gratuitous_arp,
    rarp,
    solicitation,
    unsolicited_na,
)
from godwit.announce.host_announcement import ASK_AGAIN_S, LATELY_S
from godwit.announce.memberships import Memberships, report
from godwit.announce.nic_announcement import ASK_AFTER_S
from godwit.announce.questions import (
    ASK_S,
    INTRODUCTIONS,
    LATER_S,
    MAX_INTRODUCED,
    MAX_NETWORKS,
)
from godwit.errors import ConfigError
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceOptions, AnnounceParameters, Rarp

PEER, STRANGER = bytes.fromhex("5254000000bb"), bytes.fromhex("525400000099")
GATEWAY6 = bytes.fromhex("20010db8" + "00" * 11 + "01")
Tags = tuple[tuple[int, int], ...]


def reply(ip: bytes, mac: bytes = PEER, tags: Tags = (), to: bytes = bytes(4)) -> bytes:
    """Return an ARP reply of ``ip``, by default to a probe."""
    payload = frames._arp(2, mac, ip, bytes(6), to)
    return frames.ethernet(b"\x52\x54\0\0\0\x30", mac, tags, 0x0806, payload)


def bench_of(accepts: bool = True, **options: object) -> Bench:
    """Return a VM whose frames and whose network's frames come by, before its guest runs."""
    bench = Bench(nic0=accepts)
    bench.parameters = wanted(**options)
    bench.watched()
    bench.listens()
    return bench


def shows(bench: Bench, *sent: bytes) -> None:
    """Have the guest announce these at each request."""

    def during() -> None:
        for frame in sent:
            bench.guest_sends(frame)

    bench.nics[0].during = during


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


# --- until the network passes frames --------------------------------------------------------------
def waiting() -> tuple[Bench, Nic]:
    """Return a running VM whose guest has asked its gateway, and announces itself when asked."""
    bench = bench_of(ask_gateways=True, patience=60_000)
    nic = bench.nics[0]
    bench.guest_sends(arp_request(nic.mac, IP4, GATEWAY))
    shows(bench, gratuitous_arp(nic.mac, IP4))
    bench.go(S.RUNNING)
    return bench, nic


def proof(bench: Bench) -> tuple[object, object, object]:
    info = bench.announcer.info()[0]
    return info["proof"], info["proved-ms"], info["unproved"]


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


# --- multicast ------------------------------------------------------------------------------------
def join(bench: Bench) -> bytes:
    mac = bench.nics[0].mac
    record = b"\4\0\0\0" + bytes([239, 1, 2, 3])
    head = bytes.fromhex("46c000280000400001020000") + IP4 + bytes([224, 0, 0, 22])
    body = bytes.fromhex("940400002200000000000001") + record
    frame = frames.ethernet(bytes.fromhex("01005e000016"), mac, (), 0x0800, head + body)
    known = Memberships()
    assert known.learn(frame, None, 0.0)
    bench.guest_sends(frame)
    return report(next(iter(known)))


def test_memberships_are_reported_again_where_the_host_announces() -> None:
    bench = bench_of(accepts=False)
    again = join(bench)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.sent().count(again) == 2


def test_memberships_of_a_mac_address_that_is_elsewhere_are_not_reported() -> None:
    bench = bench_of(accepts=False)
    nic = bench.nics[0]
    own, nic.mac = nic.mac, bytes.fromhex("00005e000107")
    again = join(bench)
    nic.mac = own
    uplink = bench.uplinks[0]
    nic.filter.unicast.append(bytes.fromhex("00005e000107"))
    nic.filter.vlans.append(100)  # where the MAC address may be as well
    uplink.entries()
    uplink.observer.guest_here(True)
    bench.clock.advance(5)
    bench.network_sends(gratuitous_arp(bytes.fromhex("00005e000107"), b"\xc0\0\2\x63"))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert again not in bench.sent()


def test_memberships_are_reported_again_once_the_network_passes_frames() -> None:
    bench = bench_of(accepts=False, ask_gateways=True, patience=60_000)
    mac = bench.nics[0].mac
    bench.guest_sends(arp_request(mac, IP4, GATEWAY))
    again = join(bench)
    bench.go(S.RUNNING)
    bench.clock.advance(10)
    assert bench.sent().count(again) == 2
    bench.network_sends(reply(GATEWAY, to=IP4))
    bench.clock.advance(60)
    assert again in bench.sent()


@pytest.mark.parametrize("shown", [True, False])
def test_memberships_the_guest_does_not_report_are_reported(shown: bool) -> None:
    bench = bench_of()
    mac = bench.nics[0].mac
    again = join(bench)
    bench.clock.advance(1)
    nic = bench.nics[0]

    def during() -> None:
        bench.guest_sends(gratuitous_arp(mac, IP4))
        if shown:
            join(bench)

    nic.during = during
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.sent().count(again) == (0 if shown else 2)


# --- NICs that share an address -------------------------------------------------------------------
class Bond:
    """Two NICs of a guest in one bridge, with one MAC address."""

    def __init__(self, bridges: tuple[int, int] = (3, 3)) -> None:
        self.bench = Bench(nic0=False, nic1=False)
        self.bench.parameters = wanted(rarp=Rarp.ALWAYS)
        first, second = self.bench.nics
        second.mac = first.mac
        self.mac = first.mac
        for uplink, bridge in zip(self.bench.uplinks, bridges, strict=True):
            port = Port()
            port.bridge = bridge
            uplink.port = port
            uplink.watched = True

    def move(self) -> tuple[int, int]:
        self.bench.go(S.RUNNING)
        self.bench.clock.advance(60)
        return len(self.bench.nics[0].sent), len(self.bench.nics[1].sent)


@pytest.mark.parametrize("bridges", [(3, 3), (3, 4), (0, 0)])
@pytest.mark.parametrize("active", [0, 1])
def test_a_bonds_sleeping_nic_says_nothing(active: int, bridges: tuple[int, int]) -> None:
    bond = Bond(bridges)
    bond.bench.guest_sends(gratuitous_arp(bond.mac, IP4), 1 - active)
    bond.bench.clock.advance(5)
    bond.bench.guest_sends(gratuitous_arp(bond.mac, IP4), active)
    markers = [len(uplink.layer2_updates(lambda number: b"", 64)) for uplink in bond.bench.uplinks]
    assert markers[1 - active] == 0
    assert markers[active] == 1
    sent = bond.move()
    assert sent[1 - active] == 0
    assert sent[active] > 0


def test_of_nics_that_were_never_used_the_first_announces() -> None:
    sent = Bond().move()
    assert (sent[0] > 0, sent[1]) == (True, 0)


def test_an_ip_address_on_two_nics_of_one_bridge_is_announced_at_the_later() -> None:
    for bridges, both in (((3, 3), False), ((3, 4), True), ((0, 0), True)):
        bond = Bond(bridges)
        second = bond.bench.nics[1]
        second.mac = b"\x52\x54\0\0\0\x77"
        bond.bench.guest_sends(gratuitous_arp(bond.mac, IP4), 0)
        bond.bench.clock.advance(5)
        bond.bench.guest_sends(gratuitous_arp(second.mac, IP4), 1)
        bond.move()
        assert (gratuitous_arp(bond.mac, IP4) in bond.bench.sent(0)) == both
        assert gratuitous_arp(second.mac, IP4) in bond.bench.sent(1)


def test_what_a_guest_answers_at_another_nic_is_no_claim() -> None:
    """Linux answers for its addresses on each interface in the network (arp_ignore is 0)."""
    bond = Bond()
    bench = bond.bench
    bench.nics[1].mac = second = b"\x52\x54\0\0\0\x77"
    bench.parameters = wanted()
    bench.guest_sends(gratuitous_arp(bond.mac, IP4), 0)
    bench.nics[1].filter.unicast.append(b"\2\0\0\0\0\1")  # a macvlan's there
    bench.uplinks[1].entries()
    bench.listens()
    bench.go(S.RUNNING)
    for mac in (second, b"\2\0\0\0\0\1"):
        bench.network_sends(reply(IP4, mac))
    bench.clock.advance(60)
    assert gratuitous_arp(bond.mac, IP4) in bench.sent(0)
    assert bench.announcer.info()[0]["claims"] == 0


def test_a_guest_that_was_loaded_is_here_before_it_runs() -> None:
    """Another host takes a MAC address of a guest that waits for its operator's cont."""
    bench = Bench(S.INMIGRATE, nic0=False)
    uplink, virtual = bench.uplinks[0], bytes.fromhex("00005e000107")
    with uplink.observer.book(bench.clock.now()) as book:
        book.learn(Sighting(virtual, (), Kind.ARP, IP4, True, None), bench.clock.now() - 10)
    uplink.observer.guest_here(True)
    bench.go(S.PRELAUNCH_MIGRATE)
    bench.network_sends(gratuitous_arp(virtual, b"\xc0\0\2\x63"))
    assert [entry.mac for entry in uplink.entries()] == [bench.nics[0].mac]
    bench.go(S.RUNNING, S.FINISH_MIGRATE)
    with uplink.observer.book(bench.clock.now()) as book:
        book.learn(Sighting(virtual, (), Kind.ARP, IP4, True, None), bench.clock.now())
    bench.clock.advance(5)
    bench.network_sends(gratuitous_arp(virtual, b"\xc0\0\2\x63"))  # itself, at its new host
    assert len(uplink.entries()) == 2


def test_a_guest_that_bridges_two_networks_leaves_their_hosts_their_claims() -> None:
    """Each host of the one network is behind the NIC in the other."""
    bond = Bond((3, 4))
    bench = bond.bench
    bench.nics[1].mac = b"\x52\x54\0\0\0\x77"
    bench.parameters = wanted()
    bench.guest_sends(gratuitous_arp(bond.mac, IP4), 0)
    bench.guest_sends(arp_request(STRANGER, GATEWAY, b"\xc0\0\2\x09"), 1)
    bench.listens()
    bench.go(S.RUNNING)
    bench.network_sends(reply(IP4, STRANGER))
    bench.clock.advance(60)
    assert gratuitous_arp(bond.mac, IP4) not in bench.sent(0)


def test_a_mac_address_that_left_the_guest_claims_like_any_other() -> None:
    bench = bench_of(accepts=False)
    uplink, now = bench.uplinks[0], bench.clock.now
    bench.guest_sends(gratuitous_arp(STRANGER, b"\xc0\0\2\x08"))
    uplink.observer.guest_here(True)
    bench.clock.advance(10)
    bench.network_sends(gratuitous_arp(STRANGER, b"\xc0\0\2\x08"))
    bench.network_sends(gratuitous_arp(STRANGER, IP4))
    assert {entry.ip for entry in uplink.entries()} == {None}, now()


def test_a_frame_on_another_hosts_behalf_shows_where_its_mac_address_is() -> None:
    """VRRP's master may send from its own address for the virtual one."""
    bench = bench_of(accepts=False)
    virtual = bytes.fromhex("00005e000107")
    bench.guest_sends(gratuitous_arp(virtual, b"\xc0\0\2\x08"))
    bench.uplinks[0].observer.guest_here(True)
    bench.clock.advance(10)
    frame = gratuitous_arp(virtual, b"\xc0\0\2\x08")
    bench.network_sends(frame[:6] + STRANGER + frame[12:])
    assert virtual not in {entry.mac for entry in bench.uplinks[0].entries()}


def test_the_hosts_own_frames_that_come_back_are_nobodys() -> None:
    bench = bench_of(accepts=False)
    bench.guest_sends(gratuitous_arp(STRANGER, b"\xc0\0\2\x08"))
    bench.clock.advance(120)
    bench.go(S.RUNNING)
    assert rarp(STRANGER) in bench.sent()
    bench.network_sends(rarp(STRANGER))
    bench.clock.advance(60)
    assert gratuitous_arp(STRANGER, b"\xc0\0\2\x08") in bench.sent()


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


def test_reports_are_from_nobody_where_the_address_is_anothers() -> None:
    bench = bench_of(accepts=False)
    again = join(bench)
    bench.network_sends(gratuitous_arp(STRANGER, IP4))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    sent = bench.sent()
    assert again not in sent
    reports = [frame for frame in sent if frame[12:14] == b"\x08\0"]
    assert len(reports) == 2
    assert all(IP4 not in frame for frame in reports)


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
