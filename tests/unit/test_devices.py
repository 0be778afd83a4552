"""The conformance suite: what is true of every device, tried on each of device_cases.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from device_cases import CASES, Case, Rig
from godwit.errors import StreamError
from godwit.hw.capabilities import Counts, HasSetupHints, LogsDirtyPages, Negotiates
from godwit.hw.devices import Devices
from godwit.hw.memory import GuestMemory
from godwit.hw.registry import KINDS
from godwit.spec import saved

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@contextlib.contextmanager
def rig(shared: GuestMemory, case: Case) -> Iterator[Rig]:
    rig = Rig(shared, case)
    try:
        yield rig
    finally:
        rig.close()


def _driven(rig: Rig) -> Any:
    """Drive the device, and return its state, as it comes over a connection."""
    rig.device.resume()
    rig.case.drive(rig)
    rig.pause()
    return saved.decode(saved.encode(rig.device.save()), rig.device.State)


# --- what is true of each -------------------------------------------------------------------------
@each
def test_a_state_that_is_loaded_is_saved_as_itself(shared: GuestMemory, case: Case) -> None:
    with rig(shared, case) as one, rig(shared, case) as other:
        state = _driven(one)
        assert state != other.device.save(), "the case should drive the device somewhere"
        assert one.device.save() == state, "to save changes nothing"
        other.device.load(state)
        assert other.device.save() == state
        other.device.load(state)
        assert other.device.save() == state


@each
def test_a_reset_makes_it_a_new_one(shared: GuestMemory, case: Case) -> None:
    with rig(shared, case) as one, rig(shared, case) as new:
        state = _driven(one)
        one.device.reset()
        first = _without_generation(new.device.save())
        assert _without_generation(one.device.save()) == first
        # And it is driven from there as the first time.
        assert _without_generation(_driven(one)) == _without_generation(state)


def _without_generation(state: msgspec.Struct) -> object:
    """The state but for virtio's configuration generation, which a reset does not take back."""
    plain: Any = msgspec.msgpack.decode(saved.encode(state))
    if "transport" in plain:
        del plain["transport"]["common"]["generation"]
    return plain


@each
def test_what_is_in_flight_at_a_pause_is_done_where_the_guest_goes_on(
    shared: GuestMemory, case: Case
) -> None:
    with rig(shared, case) as one, rig(shared, case) as other:
        one.device.resume()
        check = case.in_flight(one)
        one.pause()
        other.device.load(saved.decode(saved.encode(one.device.save()), other.device.State))
        other.device.resume()
        check(other)
        assert other.board.errors == []


@each
def test_what_is_in_flight_at_a_pause_is_done_after_it(shared: GuestMemory, case: Case) -> None:
    with rig(shared, case) as one:
        one.device.resume()
        check = case.in_flight(one)
        one.pause()
        before = one.device.save()
        one.serve()
        assert one.device.save() == before, "a paused device does nothing"
        one.device.resume()
        check(one)
        assert one.board.errors == []


@each
def test_two_pauses_and_two_resumes_are_one(shared: GuestMemory, case: Case) -> None:
    with rig(shared, case) as one:
        one.pause()
        one.device.resume()
        one.device.resume()
        one.case.drive(one)
        one.pause()
        state = one.device.save()
        one.pause()
        assert one.device.save() == state
        one.device.resume()
        one.device.resume()
        one.pause()
        assert _without_generation(one.device.save()) == _without_generation(state)


@each
def test_another_kind_or_version_is_refused_by_name(shared: GuestMemory, case: Case) -> None:
    with rig(shared, case) as one:
        devices = Devices()
        devices.add(one.device)
        (good,) = devices.save()
        (state,) = devices.decode([good])
        assert state == one.device.save()
        name = one.device.id
        for wrong, says in (
            (replace(good, version=good.version + 1), f"'{name}': version {good.version + 1}"),
            (replace(good, kind="teapot"), f"'{name}': kind teapot in the stream"),
            (replace(good, id="other"), "'other' not known here"),
        ):
            with pytest.raises(StreamError, match=says):
                devices.decode([wrong])
        with pytest.raises(StreamError, match=f"'{name}': missing"):
            devices.decode([])
        with pytest.raises(StreamError, match="twice"):
            devices.decode([good, good])


_scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
_values = _scalars | st.binary(max_size=40) | st.lists(_scalars, max_size=3)


def _places(value: Any, put: Callable[[Any], Any]) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """Each value within ``value``, and how the whole is with another in its place."""
    yield value, put
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _places(part, lambda new, key=key: put({**value, key: new}))
    elif isinstance(value, list):
        for index in range(min(len(value), 8)):
            yield from _places(
                value[index], lambda new, i=index: put([*value[:i], new, *value[i + 1 :]])
            )


def _near(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 1 << 16) | st.sampled_from([0, 1 << 31, (1 << 32) - 1, 1 << 63])
    if isinstance(value, bytes):
        return st.binary(min_size=len(value), max_size=len(value)) | st.binary(max_size=80)
    return _values


@each
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_hostile_state_is_refused_or_harmless(
    shared: GuestMemory, case: Case, data: st.DataObject
) -> None:
    with rig(shared, case) as one, rig(shared, case) as other:
        plain = msgspec.msgpack.decode(saved.encode(_driven(one)))
        for _ in range(data.draw(st.integers(1, 3))):
            value, put = data.draw(st.sampled_from(list(_places(plain, lambda new: new))))
            plain = put(data.draw(_near(value) | _values))
        try:
            other.device.load(saved.decode(msgspec.msgpack.encode(plain), other.device.State))
        except StreamError:
            return
        # It runs, and whatever it does to itself, the VM lives: no error leaves the device.
        other.device.resume()
        other.serve()
        other.pause()
        other.device.save()
        other.device.reset()


@each
def test_properties_and_capabilities_are_what_the_rest_expects(
    shared: GuestMemory, case: Case
) -> None:
    with rig(shared, case) as one:
        device = one.device
        assert saved.encode(device.save())
        assert all(
            isinstance(value, (str, int, type(None))) for value in device.properties().values()
        )
        devices = Devices()
        devices.add(device)
        for counts in devices.having(Counts):
            assert all(type(count) is int for count in counts.counters().values())
        for part in devices.having(Negotiates):
            assert part.negotiated & ~part.offered == 0
        for part in devices.having(HasSetupHints):
            part.prepare(part.hints())
        for part in devices.having(LogsDirtyPages):
            part.start_log()
            assert part.take_log() == bytes(shared.size // 4096 // 8)
            part.stop_log()


def test_the_suite_has_each_kind_that_can_be_configured() -> None:
    assert {name.split(",")[0] for name in CASES} >= KINDS.keys()
