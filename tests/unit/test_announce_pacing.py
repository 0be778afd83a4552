"""Pacing: a burst at once, the rest at the rate, and two hundred NICs without a flood."""

import math

import pytest

from announce_bench import Bench, S, wanted
from godwit.announce.pacing import BURST_S, Pacer
from godwit.errors import ConfigError
from godwit.spec.parameters import (
    ANNOUNCE_RATE,
    AnnounceOptions,
    AnnounceParameters,
)


def _send(pacer: Pacer, count: int, rate: int, now: float) -> list[float]:
    """Send single frames, each as soon as the pacer allows, and return when each was sent."""
    sent = []
    for _ in range(count):
        while wait := pacer.take(1, rate, now):
            now += wait
        sent.append(now)
    return sent


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    sent = _send(Pacer(), 300, 1000, 50.0)
    assert sum(at == 50.0 for at in sent) == pytest.approx(1000 * BURST_S, abs=2)
    assert sent[-1] - 50.0 == pytest.approx(300 / 1000 - BURST_S, abs=0.002)
    assert sent == sorted(sent)


def test_time_that_was_not_used_is_saved_up_to_a_burst() -> None:
    pacer = Pacer()
    _send(pacer, 500, 1000, 0.0)
    sent = _send(pacer, 150, 1000, 1000.0)
    assert sum(at == 1000.0 for at in sent) == pytest.approx(100, abs=2)


def test_who_waits_holds_no_place() -> None:
    pacer = Pacer()
    pacer.take(600, 1000, 0.0)
    waits = [pacer.take(600, 1000, 0.1) for _ in range(10)]
    assert waits == pytest.approx([0.4] * 10)
    assert pacer.take(600, 1000, 0.5) == 0.0


def test_no_limit() -> None:
    pacer = Pacer()
    assert [pacer.take(10_000, 0, 1.0) for _ in range(3)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [-1, 1_000_001])
def test_rates_out_of_range(rate: int) -> None:
    with pytest.raises(ConfigError, match=f"'rate' is {rate}"):
        AnnounceOptions(rate=rate)


@pytest.mark.parametrize("rate", [ANNOUNCE_RATE, 200])
def test_two_hundred_nics_are_paced(rate: int) -> None:
    bench = Bench(**{f"nic{number}": False for number in range(200)})
    for uplink in bench.uplinks:
        uplink.siblings = ()  # of many VMs, and one pace
    bench.parameters = wanted(rate=rate)
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
    bench.parameters = wanted(AnnounceParameters(rounds=2))
    bench.go(S.RUNNING)
    assert [nic.sent[0][0] for nic in bench.nics] == [0.0, 0.0]
