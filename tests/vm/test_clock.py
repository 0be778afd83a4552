"""The guest's clocks go on across a move as if it had not been: judged against the client's."""

from __future__ import annotations

from vm_bench import Bench

from lab import clocks
from lab.guest import WATCHFUL_CMDLINE

_MOVES = 4
#: Two clocks of one host drift apart a little between two readings, s.
_DRIFT_S = 0.0005


def test_no_clock_of_the_guest_jumps(bench: Bench) -> None:
    """Its kernel watches its TSC, as a stock one does."""
    guest = bench.boot("--append", WATCHFUL_CMDLINE)
    agent = guest.agent
    log = "dmesg | grep -i -e unstable -e 'clocksource.*skew' || true"
    before = agent.sh(log)
    for target in bench.targets(guest, _MOVES):
        then = clocks.read(agent)
        bench.move(guest, target)
        now = clocks.read(agent)
        error = then.error + now.error + _DRIFT_S
        assert abs(now.realtime - then.realtime) <= error
        assert abs(now.monotonic - then.monotonic) <= error
    assert agent.sh(log) == before == ""
