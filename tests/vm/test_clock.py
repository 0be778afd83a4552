"""The guest's clocks go on across a move as if it had not been: judged against the client's."""

from __future__ import annotations

from vm_bench import ONE_BACKEND, Bench, Guest

from godwit.lab import clocks

pytestmark = ONE_BACKEND
_MOVES = 4
#: Two clocks of one host drift apart a little between two readings, s.
_DRIFT_S = 0.0005


def test_no_clock_of_the_guest_jumps(bench: Bench, guest: Guest) -> None:
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
