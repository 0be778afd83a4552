"""Pacing: a burst at once, the rest at the rate; two hundred NICs are told of without a flood."""

import math

import pytest
from announce_bench import Bench, S

from godwit.announce.pacing import BURST_S, RATE, Pacer
from godwit.announce.schedule import AnnounceOptions, AnnounceParameters
from godwit.errors import ConfigError


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    pacer = Pacer()
    waits = [pacer.reserve(1, 1000, 50.0) for _ in range(300)]
    at_once = [wait for wait in waits if wait == 0.0]
    assert len(at_once) == pytest.approx(1000 * BURST_S, abs=1)
    assert waits[-1] == pytest.approx((300 - 1) / 1000 - BURST_S)
    assert waits == sorted(waits)


def test_time_that_was_not_used_is_saved_up_to_a_burst() -> None:
    pacer = Pacer()
    pacer.reserve(100, 1000, 0.0)
    assert pacer.reserve(1, 1000, 0.0) == 0.0
    assert pacer.reserve(1, 1000, 0.0) == pytest.approx(0.001)
    waits = [pacer.reserve(1, 1000, 1000.0) for _ in range(150)]
    assert sum(wait == 0.0 for wait in waits) == pytest.approx(100, abs=1)


def test_no_limit() -> None:
    pacer = Pacer()
    assert [pacer.reserve(10_000, 0, 1.0) for _ in range(3)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [-1, 1_000_001])
def test_rates_out_of_range(rate: int) -> None:
    with pytest.raises(ConfigError, match=f"'rate' is {rate}"):
        AnnounceOptions(rate=rate)


@pytest.mark.parametrize("rate", [RATE, 200])
def test_two_hundred_nics_are_paced(rate: int) -> None:
    bench = Bench(**{f"nic{number}": False for number in range(200)})
    bench.announcer.options = AnnounceOptions(rate=rate)
    bench.go(S.RUNNING)
    bench.clock.advance(60)
    times = sorted(at for nic in bench.nics for at, _ in nic.sent)
    assert len(times) == 5 * 200
    # In each window no more than the burst and the rate allow: frames in (t, t + w].
    allowed = rate * BURST_S + 1
    for index, first in enumerate(times):
        for window in (0.01, 0.1, 1.0):
            later = index
            while later < len(times) and times[later] <= first + window:
                later += 1
            assert later - index <= math.ceil(allowed + rate * window) + 1
    # The NICs come in their order, and none waits for another's later rounds only.
    firsts = [nic.sent[0][0] for nic in bench.nics]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0.0
    assert firsts[-1] <= 200 / rate


def test_a_vm_with_few_addresses_does_not_notice() -> None:
    bench = Bench(nic0=False, nic1=False)
    bench.announcer.parameters = AnnounceParameters(rounds=2)
    bench.go(S.RUNNING)
    assert [nic.sent[0][0] for nic in bench.nics] == [0.0, 0.0]
