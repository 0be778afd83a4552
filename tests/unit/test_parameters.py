"""The operator's parameters: one struct, its ranges, and its names in QMP."""

from typing import Any

import msgspec
import pytest

from announce_bench import Bench, S
from godwit.errors import ConfigError
from godwit.spec.parameters import (
    CAPABILITIES,
    PLACES,
    RANGES,
    AnnounceOptions,
    AnnounceParameters,
    ConvergenceParameters,
    MigrationParameters,
    Verify,
    types,
)


def test_each_parameter_has_one_name_one_type_and_one_default() -> None:
    shown = MigrationParameters().shown()
    assert list(shown) == list(PLACES)
    assert set(types()) == set(PLACES)
    assert len(set(PLACES.values())) == len(PLACES)
    assert set(CAPABILITIES) < set(PLACES)
    for name, kind in types().items():
        assert msgspec.convert(shown[name], kind) == shown[name]


def test_every_number_has_a_range_and_nothing_else_has() -> None:
    assert set(RANGES) == {name for name, kind in types().items() if kind is int}


def test_the_names_are_as_in_qmp() -> None:
    assert PLACES["announce-initial"] == ("announce", "initial")
    assert PLACES["announce-rate"] == ("announce_options", "rate")
    assert PLACES["downtime-limit"] == ("", "downtime_limit")
    assert PLACES["max-cpu-throttle"] == ("convergence", "max_cpu_throttle")


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_each_range(name: str) -> None:
    least, most, unit = RANGES[name]
    # So that no bound but the range's own is met.
    others = {"cpu-throttle-initial": 1} if name == "max-cpu-throttle" else {}
    for value in (least, most):
        new = MigrationParameters().changed({**others, name: value})
        assert new.shown()[name] == value
    short = name.removeprefix("announce-")
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError) as caught:
            MigrationParameters().changed({name: value})
        text = str(caught.value)
        assert f"arameter '{short}' is {value}" in text
        assert text.endswith(f": choose a value from {least} to {most} {unit}".rstrip())


def test_a_change_makes_new_parameters_and_leaves_the_old() -> None:
    old = MigrationParameters()
    new = old.changed({"announce-rounds": 3, "announce-verify": Verify.FDB, "handover": False})
    assert old == MigrationParameters()
    assert new == MigrationParameters(
        announce=AnnounceParameters(rounds=3),
        announce_options=AnnounceOptions(verify=Verify.FDB),
        handover=False,
    )
    assert new.convergence is old.convergence
    assert new.changed({}) == new
    with pytest.raises(AttributeError):
        old.handover = False  # type: ignore[misc]


def test_a_change_is_checked_as_a_whole() -> None:
    both = {"cpu-throttle-initial": 60, "max-cpu-throttle": 70}
    new = MigrationParameters().changed({"max-cpu-throttle": 50}).changed(both)
    assert new.convergence == ConvergenceParameters(cpu_throttle_initial=60, max_cpu_throttle=70)
    with pytest.raises(ConfigError, match="less than 'cpu-throttle-initial', which is 60"):
        new.changed({"max-cpu-throttle": 59})


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"max_bandwidth": -1}, "'max-bandwidth' is -1: choose a value from 0 to 9223372"),
        ({"downtime_limit": 2_000_001}, "'downtime-limit' is 2000001: .* from 0 to 2000000 ms$"),
    ],
)
def test_the_struct_itself_refuses(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MigrationParameters(**wrong)


def test_an_announcement_keeps_the_parameters_with_which_it_began() -> None:
    bench = Bench(nic0=True)
    bench.nics[0].acks_after = None
    bench.parameters = bench.parameters.changed({"announce-deadline": 1000})
    bench.go(S.RUNNING)
    bench.parameters = bench.parameters.changed({"announce-deadline": 10, "announce-rounds": 0})
    bench.clock.advance(0.999)
    assert len(bench.nics[0].asked) == 1
    bench.clock.advance(0.001)
    assert len(bench.nics[0].asked) == 2
