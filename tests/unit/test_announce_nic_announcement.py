"""The announcement of a NIC: two attempts, the fallback, a late ack, what was not seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from announce_bench import ACK_S, IP4, IP6, ROUNDS, Bench, Port, Questions, S, hung, wanted
from godwit.announce.entries import announcements
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.nic_announcement import FURTHER_ROUNDS_S, SEEN_AFTER_ACK_S, VERIFY_S
from godwit.errors import KvmError
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceOptions, AnnounceParameters

DEADLINE = AnnounceOptions().deadline / 1000


# --- attempts and fallback ------------------------------------------------------------------------
def test_after_two_attempts_the_host_announces_for_a_hung_guest_in_all_remaining_rounds() -> None:
    bench = hung()
    nic = bench.nics[0]
    bench.clock.advance(DEADLINE - 0.001)
    assert (nic.asked, bench.names()) == ([0.0], [Event.ANNOUNCE_STARTED])
    bench.clock.advance(60)
    assert nic.asked == pytest.approx([0.0, DEADLINE])
    # The second round waited for the answer; the third and later follow at their distances.
    assert nic.sent_at == pytest.approx([0.8, 0.95, 1.2, 1.55])
    assert {frame for _, frame in nic.sent} == {rarp(nic.mac)}
    assert bench.data(Event.ANNOUNCE_TIMEOUT) == [
        {"nic": "nic0", "asked": 1},
        {"nic": "nic0", "asked": 2},
    ]
    assert bench.data(Event.ANNOUNCE_HOST) == [
        {"nic": "nic0", "round": number, "frames": 1, "why": "no ack"} for number in (2, 3, 4, 5)
    ]
    (record,) = bench.announcer.records()
    assert (record.method, record.rounds, record.asked, record.acks) == ("host", 5, 2, 0)
    assert (record.timeouts, record.host_sent, record.ack_ms) == (2, 4, None)
    assert record.host_sent_at == pytest.approx(1000.8)
    assert bench.clock.pending == []


def test_the_deadline_can_be_set() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.parameters = wanted(deadline=1000)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx([0.0, 1.0])
    assert bench.nics[0].sent_at[0] == pytest.approx(2.0)


def test_a_single_round_has_two_attempts_and_a_fallback_too() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.parameters = wanted(AnnounceParameters(rounds=1))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx([0.0, 0.4])
    assert bench.nics[0].sent_at == pytest.approx([0.8])
    assert bench.data(Event.ANNOUNCE_HOST)[0]["why"] == "no ack"


def test_a_round_that_falls_due_waits_for_the_ack() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = 0.1
    bench.go(S.RUNNING)
    bench.clock.advance(0.09)
    assert bench.nics[0].asked == [0.0]
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx([0.0, 0.1, 0.25, 0.5, 0.85])
    assert Event.ANNOUNCE_TIMEOUT not in bench.names()


def test_a_rounds_ack_that_is_in_time_cancels_the_deadline() -> None:
    bench = hung()
    bench.clock.advance(DEADLINE - 0.001)
    bench.announcer.acked("nic0")
    bench.nics[0].acks_after = ACK_S
    bench.clock.advance(60)
    assert Event.ANNOUNCE_TIMEOUT not in bench.names()
    assert bench.nics[0].asked == pytest.approx([0.0, 0.399, 0.549, 0.799, 1.149])


def test_the_second_attempt_is_acknowledged() -> None:
    bench = hung()
    bench.clock.advance(DEADLINE - 0.001)
    bench.nics[0].acks_after = 0.03
    bench.clock.advance(60)
    # The round that waited asks at the ack.
    assert bench.nics[0].asked == pytest.approx([0.0, 0.4, 0.43, 0.58, 0.83, 1.18])
    assert bench.nics[0].sent == []
    (record,) = bench.announcer.records()
    assert (record.method, record.timeouts, record.rounds, record.acks) == ("guest", 1, 5, 5)
    assert record.ack_ms == pytest.approx(430)


def test_after_a_late_ack_the_guest_is_asked_again() -> None:
    bench = hung()
    bench.clock.advance(0.9)
    assert bench.nics[0].sent_at == pytest.approx([0.8])
    bench.announcer.acked("nic0")
    bench.nics[0].acks_after = ACK_S
    bench.clock.advance(60)
    assert bench.nics[0].sent_at == pytest.approx([0.8])
    assert bench.nics[0].asked == pytest.approx([0.0, 0.4, 0.95, 1.2, 1.55])
    (record,) = bench.announcer.records()
    assert (record.method, record.rounds, record.timeouts) == ("guest", 5, 2)
    assert bench.data(Event.ANNOUNCE_ACKED) == [{"nic": "nic0", "ms": 900.0}]


def test_the_host_announces_for_a_guest_that_hangs_later_from_then_on() -> None:
    bench = Bench(nic0=True)
    bench.go(S.RUNNING)
    bench.clock.advance(0.1)
    bench.nics[0].acks_after = None
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx([0.0, 0.05, 0.2, 0.6])
    assert bench.nics[0].sent_at == pytest.approx([1.0, 1.35])
    assert bench.data(Event.ANNOUNCE_TIMEOUT) == [
        {"nic": "nic0", "asked": 1},
        {"nic": "nic0", "asked": 2},
    ]
    assert bench.announcer.records()[0].rounds == 5


def test_a_very_late_ack_of_a_hung_guest_asks_for_nothing_more() -> None:
    bench = hung()
    bench.clock.advance(60)
    sent = len(bench.nics[0].sent)
    bench.announcer.acked("nic0")
    bench.clock.advance(60)
    assert (len(bench.nics[0].asked), len(bench.nics[0].sent)) == (2, sent)
    assert bench.clock.pending == []


def test_a_model_that_declines_the_second_attempt_loses_no_round() -> None:
    bench = hung()
    bench.clock.advance(0.3)
    bench.nics[0].accepts = False  # its driver was reset
    bench.clock.advance(60)
    assert bench.nics[0].sent_at == pytest.approx([0.4, 0.55, 0.8, 1.15])
    assert [data["why"] for data in bench.data(Event.ANNOUNCE_HOST)] == ["declined"] * 4
    assert [data["round"] for data in bench.data(Event.ANNOUNCE_HOST)] == [2, 3, 4, 5]


def test_a_model_that_declines_the_second_attempt_between_two_rounds() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.parameters = wanted(AnnounceParameters(initial=1000, max=1000, rounds=2))
    bench.go(S.RUNNING)
    bench.nics[0].accepts = False
    bench.clock.advance(60)
    assert bench.nics[0].sent_at == pytest.approx([0.4, 1.0])
    assert bench.nics[0].asked == pytest.approx([0.0, 0.4, 1.0])


def test_each_nic_has_an_announcement_of_its_own() -> None:
    bench = Bench(nic0=True, nic1=True, nic2=False)
    bench.nics[1].acks_after = None
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
    assert bench.nics[1].asked == pytest.approx([0.0, 0.4])
    assert len(bench.nics[1].sent) == 4
    assert bench.nics[2].sent_at == pytest.approx(ROUNDS)
    assert {data["nic"] for data in bench.data(Event.ANNOUNCE_TIMEOUT)} == {"nic1"}


# --- a guest that never answers blocks nothing ----------------------------------------------------
def test_missing_acks_do_not_block_a_later_announcement() -> None:
    bench = hung()
    bench.clock.advance(0.2)
    bench.announcer.announce_self(AnnounceParameters(rounds=1), id="now")
    assert bench.nics[0].asked == pytest.approx([0.0, 0.2])
    bench.clock.advance(10)
    assert {"nic": "nic0", "round": 1, "frames": 1, "why": "no ack"} in bench.data(
        Event.ANNOUNCE_HOST
    )
    bench.announcer.announce_self(AnnounceParameters(rounds=1), id="now")
    assert bench.nics[0].asked[-1] == pytest.approx(10.2)


def test_missing_acks_do_not_block_the_next_migration() -> None:
    bench = hung()
    bench.clock.advance(0.5)
    bench.announcer.run_state_changed(S.RUNNING, S.FINISH_MIGRATE)
    bench.nics[0].acks_after = ACK_S
    bench.announcer.run_state_changed(S.PRELAUNCH_MIGRATE, S.RUNNING)
    bench.clock.advance(60)
    assert bench.nics[0].asked[2:] == pytest.approx([0.5 + at for at in ROUNDS])
    assert bench.nics[0].sent == []


def test_one_ack_serves_all_announcements_that_asked() -> None:
    bench = hung()
    bench.clock.advance(0.01)
    bench.uplinks[0].port = Port("down")
    bench.announcer.announce_self(AnnounceParameters(), id="held")  # asks nobody yet
    bench.uplinks[0].port = Port()
    bench.announcer.acked("nic0")
    bench.nics[0].acks_after = ACK_S
    bench.clock.advance(60)
    assert Event.ANNOUNCE_TIMEOUT not in bench.names()
    assert bench.nics[0].asked == pytest.approx(ROUNDS)


@pytest.mark.parametrize("after", [0.0, 0.06, 0.5, 0.9, 1.0])
def test_a_pause_ends_deadlines_and_rounds_wherever_they_are(after: float) -> None:
    bench = hung()
    bench.verifiers["nic0"] = Questions(bench.clock, *[["x"]] * 9)
    bench.clock.advance(after)
    known = bench.names()
    bench.go(S.PAUSED)
    assert bench.clock.pending == []
    bench.go(S.RUNNING)
    bench.announcer.acked("nic0")
    bench.clock.advance(60)
    assert [name for name in bench.names() if name != Event.ANNOUNCE_ACKED] == known


def test_a_new_announcement_of_the_id_ends_the_old_ones_deadline() -> None:
    bench = Bench(S.PRELAUNCH, nic0=True)
    bench.nics[0].acks_after = None
    bench.go(S.RUNNING)
    once = AnnounceParameters(rounds=1)
    bench.announcer.announce_self(once, id="a")
    bench.clock.advance(0.3)
    bench.announcer.announce_self(once, id="a")
    assert bench.clock.pending == pytest.approx([0.4])
    bench.announcer.announce_self(AnnounceParameters(rounds=0), id="a")
    assert bench.clock.pending == []


# --- what the guest was not seen to announce ------------------------------------------------------
def test_what_the_guest_leaves_out_is_announced_by_the_host() -> None:
    bench = Bench(nic0=True)
    bench.watched()
    bench.guest_sends(unsolicited_na(bench.nics[0].mac, IP6))
    bench.parameters = wanted(AnnounceParameters(rounds=1))
    bench.go(S.RUNNING)
    mac = bench.nics[0].mac
    bench.guest_sends(gratuitous_arp(mac, IP4))
    bench.clock.advance(ACK_S + SEEN_AFTER_ACK_S - 0.001)
    assert bench.nics[0].sent == []
    bench.clock.advance(60)
    at = pytest.approx(ACK_S + SEEN_AFTER_ACK_S)
    assert bench.nics[0].sent == [(at, rarp(mac)), (at, unsolicited_na(mac, IP6))]
    assert bench.data(Event.ANNOUNCE_HOST) == [
        {"nic": "nic0", "round": 1, "frames": 2, "why": "not shown"}
    ]
    assert bench.announcer.records()[0].method == "guest"


def test_what_comes_after_the_ack_is_seen_too() -> None:
    bench = Bench(nic0=True)
    bench.watched()
    bench.go(S.RUNNING)
    bench.clock.advance(ACK_S + SEEN_AFTER_ACK_S / 2)
    bench.guest_sends(gratuitous_arp(bench.nics[0].mac, IP4))
    bench.clock.advance(60)
    assert bench.nics[0].sent == []


def test_the_ack_of_an_unwatched_guest_has_to_do() -> None:
    bench = Bench(nic0=True)
    bench.watched()
    bench.uplinks[0].watched = False
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.nics[0].sent == []


def test_the_host_announces_all_addresses_of_a_guest_that_does_not_answer() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.watched()
    bench.parameters = wanted(AnnounceParameters(rounds=1))
    bench.go(S.RUNNING)
    bench.guest_sends(gratuitous_arp(bench.nics[0].mac, IP4))  # it may be lost: no ack
    bench.clock.advance(60)
    every = list(announcements(bench.uplinks[0].entries()))
    assert [frame for _, frame in bench.nics[0].sent] == every
    assert every == [rarp(bench.nics[0].mac), gratuitous_arp(bench.nics[0].mac, IP4)]


# --- errors ---------------------------------------------------------------------------------------
def test_each_error_of_the_model_is_reported_and_each_round_asks_anew() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].announce_error = KvmError("no interrupt")
    bench.go(S.RUNNING)
    bench.clock.advance(0.1)
    assert bench.data(Event.ANNOUNCE_FAILED) == [
        {"nic": "nic0", "round": number, "cause": "no interrupt"} for number in (1, 2)
    ]
    bench.nics[0].announce_error = None
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
    assert bench.nics[0].sent_at == pytest.approx(ROUNDS[:2])
    (record,) = bench.announcer.records()
    assert (record.asked, record.method, record.error) == (3, "guest", "no interrupt")
    assert record.ack_ms == pytest.approx(5)


def test_the_host_announces_after_an_error_at_the_second_attempt() -> None:
    bench = hung()
    bench.nics[0].announce_error = OSError(5, "Input/output error")
    bench.clock.advance(60)
    assert bench.nics[0].sent_at == pytest.approx([0.4, 0.55, 0.8, 1.15])


def test_model_and_backend_may_both_fail() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].announce_error = KvmError("")
    bench.nics[0].error = OSError(100, "Network is down")
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    causes = [(data["round"], data["cause"]) for data in bench.data(Event.ANNOUNCE_FAILED)]
    assert causes == [
        (number, cause)
        for number in (1, 2, 3, 4, 5)
        for cause in ("KvmError", "[Errno 100] Network is down")
    ]
    (record,) = bench.announcer.records()
    assert (record.rounds, record.host_sent, record.host_sent_at) == (5, 0, None)


def test_a_backend_that_fails_for_a_hung_guest_is_tried_in_each_round() -> None:
    bench = hung()
    bench.nics[0].error = OSError(100, "Network is down")
    bench.clock.advance(1)
    assert [data["round"] for data in bench.data(Event.ANNOUNCE_FAILED)] == [2, 3]
    bench.nics[0].error = None
    bench.clock.advance(60)
    assert bench.nics[0].sent_at == pytest.approx([1.2, 1.55])


# --- verification ---------------------------------------------------------------------------------
def test_what_is_verified_needs_no_more_rounds() -> None:
    bench = Bench(nic0=True)
    questions = bench.verifiers["nic0"] = Questions(bench.clock)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert (questions.begun, questions.asked) == ([0.0], pytest.approx([0.8]))
    assert questions.read == pytest.approx([0.8 + VERIFY_S])
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
    assert bench.data(Event.ANNOUNCE_VERIFIED) == [{"nic": "nic0", "ms": 1100.0}]
    assert bench.announcer.records()[0].verified_at == pytest.approx(1001.1)


def test_what_is_not_verified_gets_five_more_rounds_and_a_warning() -> None:
    bench = Bench(nic0=True)
    questions = bench.verifiers["nic0"] = Questions(bench.clock, *[["VLAN 7"]] * 99)
    bench.go(S.RUNNING)
    bench.clock.advance(600)
    extra = [0.8 + sum(FURTHER_ROUNDS_S[: count + 1]) for count in range(len(FURTHER_ROUNDS_S))]
    assert extra == pytest.approx([1.8, 3.8, 7.8, 15.8, 31.8])
    assert bench.nics[0].asked == pytest.approx(ROUNDS + extra)
    assert questions.asked == pytest.approx([0.8, *extra])
    assert bench.data(Event.ANNOUNCE_UNVERIFIED) == [{"nic": "nic0", "what": ["VLAN 7"]}]
    assert Event.ANNOUNCE_VERIFIED not in bench.names()
    (record,) = bench.announcer.records()
    assert (record.rounds, record.unverified, record.verified_at) == (10, ["VLAN 7"], None)
    assert bench.clock.pending == []


def test_an_extra_round_may_verify_it() -> None:
    bench = Bench(nic0=False)
    bench.verifiers["nic0"] = Questions(bench.clock, ["a", "b"], ["b"])
    bench.go(S.RUNNING)
    bench.clock.advance(2.5)
    assert bench.announcer.records()[0].unverified == ["b"]
    bench.clock.advance(600)
    assert bench.nics[0].sent_at == pytest.approx([*ROUNDS, 1.8, 3.8])
    assert bench.data(Event.ANNOUNCE_VERIFIED) == [{"nic": "nic0", "ms": 4100.0}]
    assert bench.announcer.records()[0].unverified == []


def test_the_extra_rounds_of_a_hung_guest_are_the_hosts() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.verifiers["nic0"] = Questions(bench.clock, ["a"])
    bench.go(S.RUNNING)
    bench.clock.advance(600)
    assert bench.nics[0].sent_at == pytest.approx([0.8, 0.95, 1.2, 1.55, 2.55])
    assert bench.data(Event.ANNOUNCE_VERIFIED) == [{"nic": "nic0", "ms": 2850.0}]


def test_a_verifier_that_is_not_wanted_is_not_asked() -> None:
    bench = Bench(nic0=True)
    questions = bench.verifiers["nic0"] = Questions(bench.clock)
    questions.wanted = False
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert (questions.begun, questions.asked, questions.read) == ([0.0], [], [])


# --- all of it ------------------------------------------------------------------------------------
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["declines", "fails", "hangs"]),
            st.floats(0, 3),
        ),
        max_size=12,
    ),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_whatever_the_model_does_all_rounds_are_made_and_it_ends(
    answers: list[str | float], rounds: int, unverified: int
) -> None:
    bench = Bench(nic0=True)
    nic = bench.nics[0]
    bench.verifiers["nic0"] = Questions(bench.clock, *[["x"]] * unverified)
    script = iter(answers)

    def during() -> None:
        does = next(script, "hangs")
        nic.accepts = does != "declines"
        nic.announce_error = KvmError("no") if does == "fails" else None
        nic.acks_after = does if isinstance(does, float) else None

    nic.during = during
    bench.parameters = wanted(AnnounceParameters(rounds=rounds))
    bench.go(S.RUNNING)
    bench.clock.advance(600)
    (record,) = bench.announcer.records()
    assert record.rounds == rounds + unverified
    assert bench.clock.pending == []
    # Each round had its effect: the guest was asked, or the host announced.
    assert record.asked - record.timeouts + record.host_sent >= 1
    assert record.asked + record.host_sent >= record.rounds
    assert Event.ANNOUNCE_VERIFIED in bench.names()
