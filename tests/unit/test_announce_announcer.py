"""The announcer: when an announcement starts and when not, whom it asks, and failures."""

import pytest

from announce_bench import ROUNDS, Bench, S, wanted
from godwit.announce.frames import rarp
from godwit.errors import KvmError
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters
from godwit.spec.runstate import RunState


def test_a_migration_is_announced_at_once_and_then_by_the_schedule() -> None:
    bench = Bench(nic0=True)
    bench.go(S.RUNNING)
    assert bench.nics[0].asked == [0.0]
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
    assert bench.nics[0].sent == []
    assert bench.events == [
        (Event.ANNOUNCE_STARTED, {"id": "migration", "nics": ["nic0"], "rounds": 5}),
        (Event.ANNOUNCE_ACKED, {"nic": "nic0", "ms": 5.0}),
    ]
    (record,) = bench.announcer.records()
    assert (record.rounds, record.asked, record.acks, record.timeouts) == (5, 5, 5, 0)
    assert bench.clock.pending == []


def test_a_nic_that_declines_is_announced_by_the_host() -> None:
    bench = Bench(nic0=True, nic1=False)
    bench.go(S.RUNNING)
    nic = bench.nics[1]
    assert nic.sent == [(0.0, rarp(nic.mac))]
    bench.clock.advance(60)
    assert nic.sent == [(pytest.approx(at), rarp(nic.mac)) for at in ROUNDS]
    assert nic.asked == pytest.approx(ROUNDS)
    assert bench.nics[0].sent == []
    sent = [data for name, data in bench.events if name == Event.ANNOUNCE_HOST]
    assert [data["round"] for data in sent] == [1, 2, 3, 4, 5]
    assert sent[0] == {"nic": "nic1", "round": 1, "frames": 1, "why": "declined"}
    assert bench.announcer.records()[1].mac == nic.mac.hex(":")


def test_the_mac_in_force_is_announced() -> None:
    bench = Bench(nic0=False)
    bench.go(S.RUNNING)
    changed = bytes.fromhex("0200000000aa")
    bench.nics[0].mac = changed
    bench.clock.advance(0.05)
    assert bench.nics[0].sent[-1][1] == rarp(changed)


@pytest.mark.parametrize(
    "path",
    [
        (S.PRELAUNCH, S.RUNNING),
        (S.PRELAUNCH, S.RUNNING, S.PRELAUNCH, S.RUNNING),
        (S.PRELAUNCH, S.RUNNING, S.PAUSED, S.RUNNING),
        (S.PAUSED, S.RUNNING),
        (S.RUNNING, S.FINISH_MIGRATE, S.RUNNING),
        (S.RUNNING, S.FINISH_MIGRATE, S.POSTMIGRATE),
        (S.INMIGRATE, S.PRELAUNCH_MIGRATE),
        (S.INMIGRATE, S.PRELAUNCH_MIGRATE, S.SHUTDOWN),
        (S.RESTORE_VM, S.PRELAUNCH_MIGRATE),
    ],
    ids=lambda path: " > ".join(map(str, path)),
)
def test_nothing_else_is_announced(path: tuple[RunState, ...]) -> None:
    bench = Bench(path[0], nic0=True, nic1=False)
    bench.go(*path[1:])
    bench.clock.advance(60)
    assert [(nic.asked, nic.sent) for nic in bench.nics] == [([], []), ([], [])]
    assert bench.events == []


def test_no_transition_but_the_one_starts_it() -> None:
    for old in RunState:
        for new in RunState:
            bench = Bench(nic0=True)
            bench.announcer.run_state_changed(old, new)
            asked = bool(bench.nics[0].asked)
            assert asked == ((old, new) == (S.PRELAUNCH_MIGRATE, S.RUNNING)), (old, new)


def test_with_autostart_off_it_waits_for_the_cont() -> None:
    bench = Bench(S.INMIGRATE, nic0=True)
    bench.go(S.PRELAUNCH_MIGRATE)
    bench.clock.advance(3600)
    assert bench.nics[0].asked == []
    bench.go(S.RUNNING)
    assert bench.nics[0].asked == [3600.0]


@pytest.mark.parametrize("state", [S.PAUSED, S.FINISH_MIGRATE, S.SHUTDOWN, S.PRELAUNCH, S.SAVE_VM])
def test_leaving_running_ends_it(state: RunState) -> None:
    bench = Bench(nic0=True, nic1=False)
    bench.go(S.RUNNING)
    bench.clock.advance(0.06)
    bench.announcer.announce_self(AnnounceParameters(), ["nic1"], "mine")
    bench.go(state)
    assert bench.clock.pending == []
    if state in (S.PAUSED, S.PRELAUNCH):
        bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert len(bench.nics[0].asked) == 2
    assert len(bench.nics[1].sent) == 3


def test_a_timer_that_was_cancelled_too_late_does_nothing() -> None:
    bench = Bench(nic0=True)
    bench.go(S.RUNNING)
    late = [timer._callback for _, _, timer in bench.clock._timers]
    bench.go(S.PAUSED, S.RUNNING)
    for callback in late:
        assert callback is not None
        callback()
    assert bench.nics[0].asked == [0.0]


def test_the_next_migration_starts_anew() -> None:
    bench = Bench(nic0=True)
    bench.go(S.RUNNING)
    bench.clock.advance(0.06)
    assert bench.announcer.records()[0].acks == 2
    bench.announcer.run_state_changed(S.RUNNING, S.FINISH_MIGRATE)
    bench.announcer.run_state_changed(S.PRELAUNCH_MIGRATE, S.RUNNING)
    (record,) = bench.announcer.records()
    assert (record.rounds, record.asked, record.acked_at) == (1, 1, None)
    bench.clock.advance(60)
    assert len(bench.nics[0].asked) == 2 + 5


def test_a_write_that_fails_is_reported_and_the_schedule_goes_on() -> None:
    bench = Bench(nic0=False, nic1=False)
    bench.nics[0].error = OSError(5, "Input/output error")
    bench.go(S.RUNNING)
    cause = "[Errno 5] Input/output error"
    assert (Event.ANNOUNCE_FAILED, {"nic": "nic0", "round": 1, "cause": cause}) in bench.events
    assert len(bench.nics[1].sent) == 1
    bench.nics[0].error = None
    bench.clock.advance(60)
    assert [at for at, _ in bench.nics[0].sent] == pytest.approx(ROUNDS[1:])
    record = bench.announcer.records()[0]
    assert (record.rounds, record.host_sent, record.error) == (5, 4, cause)


def test_the_host_announces_for_a_model_that_fails() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].announce_error = KvmError("no interrupt")
    bench.go(S.RUNNING)
    assert bench.names() == [Event.ANNOUNCE_FAILED, Event.ANNOUNCE_HOST, Event.ANNOUNCE_STARTED]
    assert len(bench.nics[0].sent) == 1
    assert bench.announcer.records()[0].method == "host"


def test_a_model_that_changes_its_mind_is_asked_again_in_the_next_round() -> None:
    bench = Bench(nic0=False)
    bench.go(S.RUNNING)
    bench.nics[0].accepts = True
    bench.clock.advance(60)
    (record,) = bench.announcer.records()
    assert (record.method, record.host_sent, record.asked) == ("guest", 1, 4)
    assert record.asked_at == pytest.approx(1000.05)


def test_the_ack_is_timed_from_the_first_attempt() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = 0.042
    bench.go(S.RUNNING)
    bench.clock.advance(1)
    (record,) = bench.announcer.records()
    assert (record.method, record.acks) == ("guest", 5)
    assert record.ack_ms == pytest.approx(42)
    assert [e for e in bench.events if e[0] == Event.ANNOUNCE_ACKED] == [
        (Event.ANNOUNCE_ACKED, {"nic": "nic0", "ms": 42.0})
    ]


def test_an_ack_may_come_before_the_model_has_returned() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.nics[0].during = lambda: bench.announcer.acked("nic0")
    bench.go(S.RUNNING)
    assert bench.announcer.records()[0].ack_ms == 0
    bench.clock.advance(60)
    assert bench.nics[0].asked == pytest.approx(ROUNDS)
    assert bench.names() == [Event.ANNOUNCE_ACKED, Event.ANNOUNCE_STARTED]


def test_acks_that_nobody_asked_for_change_nothing() -> None:
    bench = Bench(nic0=False)
    bench.announcer.acked("nic0")
    bench.announcer.acked("unknown")
    bench.go(S.RUNNING)
    bench.announcer.acked("nic0")
    (record,) = bench.announcer.records()
    assert (record.method, record.asked_at, record.acked_at, record.ack_ms) == (
        "host", None, None, None,
    )  # fmt: skip
    assert record.host_sent_at == 1000.0
    assert Event.ANNOUNCE_ACKED not in bench.names()


def test_records_are_copies() -> None:
    bench = Bench(nic0=True)
    bench.announcer.records()[0].rounds = 99
    assert bench.announcer.records()[0].rounds == 0


def test_the_schedule_of_the_next_migration_can_be_changed() -> None:
    bench = Bench(nic0=True)
    bench.parameters = wanted(AnnounceParameters(initial=1000, max=1000, rounds=2))
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    assert bench.nics[0].asked == [0.0, 1.0]


def test_no_rounds_no_announcement() -> None:
    bench = Bench(nic0=True)
    bench.parameters = wanted(AnnounceParameters(rounds=0))
    bench.go(S.RUNNING)
    assert (bench.nics[0].asked, bench.events, bench.clock.pending) == ([], [], [])
