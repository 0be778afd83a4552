"""The schedule of an announcement's rounds: QEMU's defaults, ranges and delays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.announce.pacing import round_delays
from godwit.errors import ConfigError
from godwit.spec.parameters import RANGES, AnnounceParameters

NAMES = ("initial", "max", "rounds", "step")

valid = st.builds(
    AnnounceParameters,
    **{name: st.integers(*RANGES[f"announce-{name}"][:2]) for name in NAMES},
)


def test_the_defaults_are_qemus() -> None:
    assert AnnounceParameters() == AnnounceParameters(50, 550, 5, 100)
    assert list(round_delays(AnnounceParameters())) == [0.0, 0.05, 0.15, 0.25, 0.35]


def test_delays_grow_up_to_the_greatest() -> None:
    chosen = AnnounceParameters(initial=100, max=250, rounds=6, step=60)
    assert list(round_delays(chosen)) == [0.0, 0.1, 0.16, 0.22, 0.25, 0.25]


def test_initial_beyond_max_is_max() -> None:
    assert list(round_delays(AnnounceParameters(initial=900, max=70, rounds=3))) == [
        0.0,
        0.07,
        0.07,
    ]


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
    found = list(round_delays(parameters))
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
