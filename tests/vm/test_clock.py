"""The guest's clocks go on across a move as if it had not been: judged against the client's."""

from __future__ import annotations

import time
from typing import NamedTuple

from vm_bench import ONE_BACKEND, Bench, Guest

from godwit.lab.agent import Agent

pytestmark = ONE_BACKEND
_MOVES = 4
_ASKED = 40
#: Two clocks of one host drift apart a little between two readings, s.
_DRIFT_S = 0.0005


class Reading(NamedTuple):
    """The guest's clocks minus the client's, s, and by how much that may be wrong."""

    realtime: float
    monotonic: float
    error: float


def _read(agent: Agent) -> Reading:
    """From the quickest of some answers: the guest read its clocks within that time."""
    answers = []
    for _ in range(_ASKED):
        asked, asked_mono = time.time(), time.monotonic()
        real, mono = agent.clock()
        took = time.monotonic() - asked_mono
        middle = took / 2
        answers.append(
            Reading(real / 1e9 - asked - middle, mono / 1e9 - asked_mono - middle, middle)
        )
    return min(answers, key=lambda reading: reading.error)


def test_no_clock_of_the_guest_jumps(bench: Bench, guest: Guest) -> None:
    agent = guest.agent
    log = "dmesg | grep -i -e unstable -e 'clocksource.*skew' || true"
    before = agent.sh(log)
    for target in bench.targets(guest, _MOVES):
        then = _read(agent)
        bench.move(guest, target)
        now = _read(agent)
        error = then.error + now.error + _DRIFT_S
        assert abs(now.realtime - then.realtime) <= error
        assert abs(now.monotonic - then.monotonic) <= error
    assert agent.sh(log) == before == ""
