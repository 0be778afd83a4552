"""The announcement on demand, announce-self, and the announcer among threads."""

import threading

import pytest

from announce_bench import ROUNDS, Bench, S
from godwit.announce import announcer as module
from godwit.errors import ConfigError, StateError
from godwit.spec.events import Event
from godwit.spec.parameters import AnnounceParameters
from godwit.spec.runstate import RunStates


class TestOnDemand:
    @pytest.fixture
    def bench(self) -> Bench:
        bench = Bench(S.PRELAUNCH, nic0=True, nic1=False)
        bench.go(S.RUNNING)
        return bench

    def test_all_nics_by_its_own_schedule(self, bench: Bench) -> None:
        bench.announcer.announce_self(AnnounceParameters(initial=10, rounds=2))
        bench.clock.advance(60)
        assert bench.nics[0].asked == pytest.approx([0.0, 0.01])
        assert [at for at, _ in bench.nics[1].sent] == pytest.approx([0.0, 0.01])
        started = [data for name, data in bench.events if name == Event.ANNOUNCE_STARTED]
        assert started == [{"id": "", "nics": ["nic0", "nic1"], "rounds": 2}]

    def test_interfaces_restrict_it(self, bench: Bench) -> None:
        bench.announcer.announce_self(AnnounceParameters(), ["nic1"])
        bench.clock.advance(60)
        assert bench.nics[0].asked == []
        assert len(bench.nics[1].sent) == 5

    def test_an_unknown_interface_is_named_and_so_are_the_known(self, bench: Bench) -> None:
        with pytest.raises(ConfigError, match=r"'eth7'.*nic0, nic1"):
            bench.announcer.announce_self(AnnounceParameters(), ["nic0", "eth7"])
        with pytest.raises(ConfigError, match="empty"):
            bench.announcer.announce_self(AnnounceParameters(), [])
        assert bench.nics[0].asked == []

    def test_the_same_id_starts_anew_and_others_go_on(self, bench: Bench) -> None:
        twice = AnnounceParameters(initial=100, rounds=2)
        bench.announcer.announce_self(twice, ["nic0"], "a")
        bench.announcer.announce_self(twice, ["nic1"], "b")
        bench.clock.advance(0.05)
        bench.announcer.announce_self(twice, ["nic0"], "a")
        bench.clock.advance(60)
        assert bench.nics[0].asked == pytest.approx([0.0, 0.05, 0.15])
        assert [at for at, _ in bench.nics[1].sent] == pytest.approx([0.0, 0.1])

    def test_so_many_may_be_under_way_and_no_more(self, bench: Bench) -> None:
        slow = AnnounceParameters(initial=100_000, max=100_000, step=10_000, rounds=1000)
        for number in range(module.MAX_ON_DEMAND):
            bench.announcer.announce_self(slow, id=f"{number}")
        with pytest.raises(StateError, match=r"16 announcements on demand are under way: use"):
            bench.announcer.announce_self(slow, id="more")
        bench.announcer.announce_self(slow, id="3")  # anew, in its own place
        bench.announcer.announce_self(AnnounceParameters(rounds=0), id="7")
        bench.announcer.announce_self(slow, id="more")
        with pytest.raises(StateError):
            bench.announcer.announce_self(slow, id="one more")

    def test_those_that_are_over_leave_their_place(self, bench: Bench) -> None:
        for number in range(5 * module.MAX_ON_DEMAND):
            bench.announcer.announce_self(AnnounceParameters(rounds=1), id=f"{number}")
            bench.clock.advance(60)
        assert len(bench.announcer._current) <= 1

    def test_no_rounds_end_what_has_the_id(self, bench: Bench) -> None:
        bench.announcer.announce_self(AnnounceParameters(), id="a")
        bench.announcer.announce_self(AnnounceParameters(rounds=0), id="a")
        bench.clock.advance(60)
        assert bench.nics[0].asked == [0.0]

    def test_no_id_ends_the_resumes_announcement(self) -> None:
        bench = Bench(nic0=True)
        bench.go(S.RUNNING)
        bench.announcer.announce_self(AnnounceParameters(rounds=0), id=module.MIGRATION)
        bench.announcer.announce_self(AnnounceParameters(rounds=0))
        bench.clock.advance(60)
        assert bench.nics[0].asked == pytest.approx(ROUNDS)

    def test_only_while_running(self, bench: Bench) -> None:
        bench.go(S.PAUSED)
        with pytest.raises(StateError, match="running"):
            bench.announcer.announce_self(AnnounceParameters())
        assert bench.nics[0].asked == []


def test_once_a_pause_has_returned_no_frame_follows() -> None:
    """End a round under way in the loop's thread before the pause in another thread ends."""
    bench = Bench(nic0=False)
    bench.go(S.RUNNING)
    nic = bench.nics[0]
    in_round, go_on, in_pause = threading.Event(), threading.Event(), threading.Event()

    def during() -> None:
        in_round.set()
        assert go_on.wait(10)

    nic.during = during
    loop = threading.Thread(target=bench.clock.advance, args=(0.05,))
    loop.start()
    assert in_round.wait(10)

    sent_at_pause: list[int] = []
    states = RunStates(S.RUNNING)
    states.listen(lambda _, __: in_pause.set())
    states.listen(bench.announcer.run_state_changed)

    def pause() -> None:
        states.set(S.PAUSED)
        sent_at_pause.append(len(nic.sent))

    pausing = threading.Thread(target=pause)
    pausing.start()
    assert in_pause.wait(10)
    assert sent_at_pause == []
    go_on.set()
    loop.join(10)
    pausing.join(10)
    bench.clock.advance(60)
    assert sent_at_pause == [2]
    assert len(nic.sent) == 2


def test_an_ack_under_the_nics_lock_does_not_deadlock_with_a_round() -> None:
    bench = Bench(nic0=True)
    lock = threading.Lock()
    asked, acked = threading.Event(), threading.Event()

    def device() -> None:
        with lock:
            assert asked.wait(10)
            bench.announcer.acked("nic0")
            acked.set()

    def during() -> None:
        asked.set()
        with lock:
            pass

    bench.nics[0].during = during
    thread = threading.Thread(target=device)
    thread.start()
    resume = threading.Thread(target=bench.go, args=(S.RUNNING,))
    resume.start()
    resume.join(10)
    thread.join(10)
    assert acked.is_set()
    assert not resume.is_alive()
    assert bench.nics[0].asked == [0.0]
