"""The table of run states: every pair, and what listeners hear."""

import threading

import pytest

from godwit.errors import StateError
from godwit.spec.runstate import TRANSITIONS, RunState, RunStates

#: Written out a second time, as a person would: a slip in the table must not pass unseen.
EXPECTED = {
    "prelaunch": "running inmigrate restore-vm shutdown",
    "inmigrate": "prelaunch-migrate restore-vm shutdown internal-error",
    "prelaunch-migrate": "running shutdown internal-error",
    "running": (
        "paused io-error finish-migrate save-vm shutdown guest-panicked internal-error prelaunch"
    ),
    "paused": "prelaunch running finish-migrate save-vm shutdown guest-panicked internal-error",
    "io-error": "prelaunch running finish-migrate save-vm shutdown guest-panicked internal-error",
    "finish-migrate": (
        "prelaunch running paused io-error postmigrate shutdown guest-panicked internal-error"
    ),
    "postmigrate": "shutdown",
    "save-vm": "running prelaunch paused io-error shutdown guest-panicked internal-error",
    "restore-vm": "prelaunch-migrate shutdown internal-error",
    "shutdown": "",
    "guest-panicked": "shutdown",
    "internal-error": "shutdown",
}
PAIRS = [(old, new) for old in RunState for new in RunState]


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=[f"{old}-to-{new}" for old, new in PAIRS])
def test_every_pair(old: RunState, new: RunState) -> None:
    states = RunStates(old)
    heard: list[tuple[RunState, RunState]] = []
    states.listen(lambda was, now: heard.append((was, now)))
    if new.value in EXPECTED[old.value].split():
        states.set(new)
        assert (states.current, states.history, heard) == (new, [old, new], [(old, new)])
    else:
        with pytest.raises(StateError, match=f"'{old}'.*'{new}'"):
            states.set(new)
        assert (states.current, states.history, heard) == (old, [old], [])


def test_the_table_knows_every_state() -> None:
    assert set(TRANSITIONS) == set(RunState) == {RunState(name) for name in EXPECTED}


def test_no_way_leads_back_once_the_guest_has_moved() -> None:
    reached = {RunState.POSTMIGRATE}
    for _ in RunState:
        reached |= {new for old in reached for new in TRANSITIONS[old]}
    assert RunState.RUNNING not in reached


def test_require_names_the_state_and_what_is_allowed() -> None:
    states = RunStates(RunState.PAUSED)
    states.require(RunState.RUNNING, RunState.PAUSED)
    with pytest.raises(StateError, match=r"'paused'.*'running', 'inmigrate'"):
        states.require(RunState.RUNNING, RunState.INMIGRATE)


def test_listeners_are_called_in_order_in_the_setters_thread() -> None:
    states = RunStates()
    heard: list[tuple[str, int]] = []
    states.listen(lambda _, __: heard.append(("first", threading.get_ident())))
    states.listen(lambda _, __: heard.append(("second", threading.get_ident())))
    thread = threading.Thread(target=states.set, args=(RunState.RUNNING,))
    thread.start()
    ident = thread.ident
    thread.join(10)
    assert heard == [("first", ident), ("second", ident)]


def test_threads_that_race_make_each_transition_once() -> None:
    states = RunStates(RunState.RUNNING)
    won: list[str] = []
    start = threading.Barrier(8)

    def pause() -> None:
        start.wait(10)
        try:
            states.set(RunState.PAUSED)
        except StateError:
            return
        won.append("one")

    threads = [threading.Thread(target=pause) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert won == ["one"]
    assert states.history == [RunState.RUNNING, RunState.PAUSED]


def test_history_is_bounded() -> None:
    states = RunStates()
    for _ in range(200):
        states.set(RunState.RUNNING)
        states.set(RunState.PRELAUNCH)
    assert len(states.history) == 256
    assert states.history[-1] is RunState.PRELAUNCH
