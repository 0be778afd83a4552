"""The schedule: QEMU's defaults, ranges and delays; and the fake clock it is tested on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.announce.schedule import delays
from godwit.errors import ConfigError
from godwit.spec.parameters import RANGES, AnnounceParameters
from tests.fakes.clock import FakeClock

NAMES = ("initial", "max", "rounds", "step")

valid = st.builds(
    AnnounceParameters,
    **{name: st.integers(*RANGES[f"announce-{name}"][:2]) for name in NAMES},
)


def test_the_defaults_are_qemus() -> None:
    assert AnnounceParameters() == AnnounceParameters(50, 550, 5, 100)
    assert list(delays(AnnounceParameters())) == [0.0, 0.05, 0.15, 0.25, 0.35]


def test_delays_grow_up_to_the_greatest() -> None:
    chosen = AnnounceParameters(initial=100, max=250, rounds=6, step=60)
    assert list(delays(chosen)) == [0.0, 0.1, 0.16, 0.22, 0.25, 0.25]


def test_initial_beyond_max_is_max() -> None:
    assert list(delays(AnnounceParameters(initial=900, max=70, rounds=3))) == [0.0, 0.07, 0.07]


@given(valid)
def test_against_qemus_countdown(parameters: AnnounceParameters) -> None:
    # net/announce.c: 'round' counts down from 'rounds'; the step is taken after each but the last.
    expected = []
    left = parameters.rounds
    while left:
        left -= 1
        if left:
            step = parameters.initial + (parameters.rounds - left - 1) * parameters.step
            expected.append(parameters.max if step > parameters.max else step)
    found = list(delays(parameters))
    assert found[:1] == [0.0][: parameters.rounds]
    assert [round(delay * 1000) for delay in found[1:]] == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_each_range(name: str) -> None:
    least, most, _ = RANGES[f"announce-{name}"]
    for value in (least, most):
        assert getattr(AnnounceParameters(**{name: value}), name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError, match=f"'{name}' is {value}.*from {least} to {most}"):
            AnnounceParameters(**{name: value})


def test_the_clock_makes_calls_in_order_and_at_their_time() -> None:
    clock = FakeClock(start=0.0)
    seen: list[tuple[str, float]] = []

    def first() -> None:
        seen.append(("first", clock.now()))
        clock.call_later(0.5, lambda: seen.append(("made by first", clock.now())))

    clock.call_later(2.0, lambda: seen.append(("last", clock.now())))
    clock.call_later(1.0, first)
    clock.call_later(1.0, lambda: seen.append(("same time", clock.now())))
    clock.call_later(1.2, lambda: seen.append(("cancelled", clock.now()))).cancel()
    clock.advance(0.9)
    assert seen == []
    assert clock.pending == pytest.approx([0.1, 0.1, 1.1])
    clock.advance(0.7)
    clock.advance(5)
    assert seen == [("first", 1.0), ("same time", 1.0), ("made by first", 1.5), ("last", 2.0)]
    assert clock.now() == pytest.approx(6.6)


def test_the_clock_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="forward"):
        FakeClock().advance(-1)
