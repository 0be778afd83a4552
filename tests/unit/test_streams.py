"""The recorded streams of each machine type (tests/streams) are what this version understands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

import e1000_bench
import virtio_bench
from godwit.announce.addresses import AddressBook
from godwit.announce.entries import Source
from godwit.announce.saved import AddressBookState
from godwit.errors import StreamError
from godwit.host.kvm import abi
from godwit.host.kvm.cpustate import tsc_of
from godwit.hw.generation import GenerationState
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000.state import E1000State
from godwit.hw.pci import PciBusState
from godwit.hw.power import PowerState
from godwit.hw.pvpanic import PanicState
from godwit.hw.registry import KINDS
from godwit.hw.serial import SerialState
from godwit.hw.virtio.net import offloads
from godwit.hw.virtio.net.device import NetState
from godwit.hw.virtio.pci import VirtioState
from godwit.machine.state import MachineState
from godwit.migration.guest import ADDRESSES
from godwit.migration.wire import compatibility, messages
from godwit.spec import machine_types, saved
from godwit.spec.machine_types import machine_type
from godwit.spec.values import parse_size
from recorded import STREAMS, Stream
from tests.fakes.backend import FEATURES
from tests.fakes.host import Host, config

MAC = bytes.fromhex("525400677701")
F_ANNOUNCE = virtio_bench.F_ANNOUNCE
#: As a tap with vhost-net in the lab, where the streams were recorded.
LAB_FEATURES = FEATURES | offloads.GUEST_ECN | offloads.GUEST_UFO
LAB_FEATURES |= offloads.HOST_ECN | offloads.HOST_UFO
#: What the guest and its peer had in each VLAN.
GUEST = [
    (0, "10.0.0.2"),
    (0, "fd00::2"),
    (100, "10.0.100.2"),
    (100, "fd00:100::2"),
    (200, "10.0.200.2"),
    (200, "fd00:200::2"),
]
each = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
virtio = pytest.mark.parametrize("stream", STREAMS[:2], ids=lambda stream: stream.name)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(256 << 20)
    yield memory
    memory.close()


def _hello(stream: Stream) -> messages.Hello:
    return saved.decode(stream.read()[0], messages.Hello)


def _state(stream: Stream) -> MachineState:
    return saved.decode(stream.read()[1], MachineState)


def _nic_hello(stream: Stream) -> messages.HelloDevice:
    (nic,) = [device for device in _hello(stream).devices if device.id == "nic0"]
    return nic


def _nic_state(stream: Stream) -> Any:
    """The NIC's state, of its kind's own type."""
    (nic,) = [device for device in _state(stream).devices if device.id == "nic0"]
    kind: Any = E1000State if stream.model == "e1000" else VirtioState[NetState]
    return saved.decode(nic.state, kind)


def _check(hello: messages.Hello, stream: Stream, machine: str = "") -> None:
    """Have a machine of the recorded configuration judge a HELLO."""
    nic = f"tap=tap0,mac={MAC.hex(':')},model={stream.model}"
    if stream.model == "virtio-net":
        nic += ",vhost=off"
    host = Host(
        config(
            ("--nic", nic),
            memory=parse_size(stream.memory),
            cpus=stream.cpus,
            machine=machine_type(machine or stream.machine),
        )
    )
    try:  # the CPU is compared in other tests: a fake KVM has another
        compatibility.check(structs.replace(hello, cpu=None), host.machine)
    finally:
        host.close()


# --- what is in them ------------------------------------------------------------------------------
def test_each_machine_type_and_model_has_a_stream() -> None:
    assert {stream.machine for stream in STREAMS} == set(machine_types._TYPES)
    nics = {kind for kind in KINDS if kind in ("virtio-net", "e1000")}
    assert {stream.model for stream in STREAMS} == nics
    for stream in STREAMS:
        assert stream.path().stat().st_size < 50_000


@each
def test_hello_and_state_are_those_of_that_machine(stream: Stream) -> None:
    hello, state = _hello(stream), _state(stream)
    assert machine_type(hello.machine).name == stream.machine
    assert hello.ram == [(0, parse_size(stream.memory))]
    assert hello.cpus == len(state.vcpus) == stream.cpus
    assert [(device.id, device.kind, device.version) for device in hello.devices] == [
        (device.id, device.kind, device.version) for device in state.devices
    ]
    nic = _nic_hello(stream)
    assert (nic.kind, nic.version, nic.properties["mac"]) == (stream.model, 1, MAC.hex(":"))
    assert _nic_state(stream)
    informs = ("pvpanic", "vmgenid") if machine_type(stream.machine).informs else ()
    assert {device.kind for device in hello.devices} == {
        *("serial", "power", "pci-host", stream.model, *informs)
    }


@each
def test_what_was_decoded_encodes_to_the_same_bytes(stream: Stream) -> None:
    hello, state = stream.read()
    assert saved.encode(_hello(stream)) == hello
    assert saved.encode(_state(stream)) == state


@virtio
def test_only_the_newer_type_has_guest_announce(stream: Stream) -> None:
    has = stream.machine != "godwit-0.1"
    assert machine_type(stream.machine).guest_announce is has
    state = _nic_state(stream)
    for negotiated in (
        _nic_hello(stream).negotiated,
        state.transport.negotiated,
        state.transport.common.driver_features,
    ):
        assert bool(negotiated & F_ANNOUNCE) is has
        assert negotiated & virtio_bench.F_VERSION_1


# --- HELLO ----------------------------------------------------------------------------------------
@each
def test_a_machine_takes_a_stream_of_its_own_type_alone(stream: Stream) -> None:
    hello = _hello(stream)
    _check(hello, stream)
    other = "godwit-0.2" if stream.machine == "godwit-0.1" else "godwit-0.1"
    with pytest.raises(
        StreamError, match=f"machine type: {stream.machine} at the source, {other} here"
    ):
        _check(hello, stream, other)


@each
def test_another_version_of_a_state_is_refused_in_hello(stream: Stream) -> None:
    hello = _hello(stream)
    for index, device in enumerate(hello.devices):
        devices = [*hello.devices]
        devices[index] = structs.replace(device, version=2)
        with pytest.raises(StreamError, match=f"{device.id}, version: 2 at the source, 1 here"):
            _check(structs.replace(hello, devices=devices), stream)
    with pytest.raises(StreamError, match="version of the machine's state: 2 at the source"):
        _check(structs.replace(hello, version=2), stream)


@each
def test_devices_that_only_one_side_has_are_named(stream: Stream) -> None:
    hello = _hello(stream)
    with pytest.raises(StreamError, match=r"device nic0 \(.*\): here, missing at the source"):
        _check(structs.replace(hello, devices=hello.devices[:-1]), stream)
    extra = messages.HelloDevice("disk9", "virtio-blk", 1, {})
    with pytest.raises(StreamError, match=r"disk9 \(virtio-blk\): at the source, missing here"):
        _check(structs.replace(hello, devices=[*hello.devices, extra]), stream)
    with pytest.raises(StreamError, match="two devices at the source have one id"):
        _check(structs.replace(hello, devices=[*hello.devices, hello.devices[0]]), stream)


@each
def test_what_the_guest_sees_of_a_device_is_compared(stream: Stream) -> None:
    hello = _hello(stream)
    for change, text in (
        ({"properties": {**hello.devices[-1].properties, "mac": "02:00:00:00:00:01"}}, "mac: 02:"),
        (
            {"properties": {**hello.devices[-1].properties, "colour": "red"}},
            "colour: red .* absent",
        ),
        ({"kind": "virtio-net-2"}, "kind: virtio-net-2"),
        ({"negotiated": 1 << 62}, f"features {1 << 62:#x} that are not offered"),
    ):
        devices = [*hello.devices[:-1], structs.replace(hello.devices[-1], **change)]
        with pytest.raises(StreamError, match=f"device nic0.*{text}"):
            _check(structs.replace(hello, devices=devices), stream)


# --- the NICs' states -----------------------------------------------------------------------------
@virtio
def test_a_virtio_net_takes_the_state_and_goes_on(stream: Stream, memory: GuestMemory) -> None:
    state = _nic_state(stream)
    announce = machine_type(stream.machine).guest_announce
    bench = virtio_bench.Bench(memory, announce=announce, resume=False, features=LAB_FEATURES)
    try:
        bench.load(state)
        assert bench.save() == state
        assert bench.net.mac == MAC
        assert bench.net.control.filter.vlans == [0, 100, 200]
        assert not bench.net.control.filter.promiscuous
        assert all(queue.enabled for queue in bench.net.queues)
        bench.pci.resume()
        assert bench.backend.running
        assert bench.backend.negotiated == state.transport.negotiated
        assert bench.net.announce() is announce
        assert not bench.errors
    finally:
        bench.close()


def test_a_virtio_net_without_guest_announce_refuses_its_user(memory: GuestMemory) -> None:
    state = _nic_state(STREAMS[1])
    bench = virtio_bench.Bench(memory, announce=False, resume=False, features=LAB_FEATURES)
    try:
        with pytest.raises(StreamError, match=f"negotiated: .*{F_ANNOUNCE:#x}"):
            bench.load(state)
    finally:
        bench.close()


def test_an_e1000_takes_the_state_and_goes_on(memory: GuestMemory) -> None:
    state = _nic_state(STREAMS[2])
    bench = e1000_bench.Bench(memory, enable=False)
    try:
        bench.nic.load(state)
        assert bench.nic.save() == state
        assert bench.nic.mac == MAC
        view = bench.nic.rx_filter()
        assert {100, 200} <= set(view.vlan_table)
        bench.nic.resume()
        bench.serve()
        assert not bench.errors
        assert bench.read_config(4, 2) & 7 == 7
    finally:
        bench.close()


@each
def test_the_address_book_knows_what_the_guest_used(stream: Stream) -> None:
    book = AddressBook(MAC)
    books = saved.decode(_state(stream).sections[ADDRESSES], dict[str, AddressBookState])
    assert books.keys() == {"nic0"}
    book.load(books["nic0"], 5000.0)
    found = [entry for entry in book.entries() if entry.ip is not None]
    tags = {vlan: ((0x8100, vlan),) if vlan else () for vlan, _ in GUEST}
    assert {(entry.tags, entry.ip) for entry in found} == {
        (tags[vlan], ip_address(ip).packed) for vlan, ip in GUEST
    }
    for entry in found:
        assert (entry.mac, entry.source, entry.confirmed) == (MAC, Source.SAVED, None)
        assert 4900 < entry.last_seen <= 5000
    assert {(peer.tags, peer.ip) for peer in book.peers()} == {
        (tags[vlan], ip_address(ip).packed[:-1] + b"\1") for vlan, ip in GUEST
    }


# --- what a stream of another version would have --------------------------------------------------
#: Maps that are no structs: their keys are data.
_DATA = ("registers", "properties", "sections")
#: Has a default: of HELLO, of the CPU or a device in HELLO, of a machine's or power button's state.
_OPTIONAL = {"cookie", "negotiated", "hints", "cpu", "arch_capabilities", "events_enabled"}
#: The states of the devices in the recorded streams.
_DEVICES: dict[str, Any] = {
    "serial": SerialState,
    "power": PowerState,
    "pci-host": PciBusState,
    "virtio-net": VirtioState[NetState],
    "e1000": E1000State,
    "pvpanic": PanicState,
    "vmgenid": GenerationState,
}


def _decode(payload: bytes, kind: Any) -> None:
    """Decode all of a HELLO or a machine's state, devices and sections as well."""
    value = saved.decode(payload, kind)
    if isinstance(value, MachineState):
        for device in value.devices:
            saved.decode(device.state, _DEVICES.get(device.kind, SerialState))
        for section in value.sections.values():
            saved.decode(section, dict[str, AddressBookState])


def _maps(value: Any, replace: Callable[[Any], Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each struct within ``value``, and how to put another in its place."""
    if isinstance(value, dict):
        yield value, replace
        for key, part in value.items():
            if key not in _DATA:
                yield from _maps(
                    part, lambda new, key=key, at=value, put=replace: put({**at, key: new})
                )
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        alike = not (isinstance(value[0], dict) and "kind" in value[0])
        for index in {0, len(value) - 1} if alike else range(len(value)):
            yield from _maps(
                value[index],
                lambda new, i=index, at=value, put=replace: put([*at[:i], new, *at[i + 1 :]]),
            )


@each
@pytest.mark.parametrize(("index", "kind"), [(0, messages.Hello), (1, MachineState)])
def test_a_missing_and_an_unknown_field_are_named(stream: Stream, index: int, kind: Any) -> None:
    plain = msgspec.msgpack.decode(stream.read()[index])
    fields = 0
    for at, put in _maps(plain, lambda new: new):
        with pytest.raises(StreamError, match="`surprise`"):
            _decode(msgspec.msgpack.encode(put({**at, "surprise": 1})), kind)
        for field in at:
            payload = msgspec.msgpack.encode(put({k: v for k, v in at.items() if k != field}))
            optional = field in _OPTIONAL and "transport" not in at and "isr" not in at
            if optional or (field == "version" and "platform" in at):
                _decode(payload, kind)
                continue
            with pytest.raises(StreamError, match=f"`{field}`"):
                _decode(payload, kind)
            fields += 1
    assert fields > (12 if kind is messages.Hello else 70)


@pytest.mark.parametrize(
    ("clock", "fits"),
    [(0, True), ((1 << 63) - 1, True), (1 << 63, False), ((1 << 64) - 1, False)],
)
def test_a_clock_leaves_space_for_the_time_to_come(clock: int, fits: bool) -> None:
    plain = msgspec.msgpack.decode(STREAMS[0].read()[1])
    plain["platform"]["clock_ns"] = clock
    payload = msgspec.msgpack.encode(plain)
    if fits:
        assert saved.decode(payload, MachineState).platform.clock_ns == clock
    else:
        with pytest.raises(StreamError, match="clock_ns"):
            saved.decode(payload, MachineState)


def test_a_vcpu_without_a_tsc_is_refused() -> None:
    vcpu = saved.decode(STREAMS[0].read()[1], MachineState).vcpus[0]
    assert tsc_of(vcpu) > 0
    without = [pair for pair in vcpu.msrs if pair[0] != abi.MSR_TSC]
    with pytest.raises(StreamError, match="the TSC is not among them"):
        tsc_of(structs.replace(vcpu, msrs=without))


@each
@pytest.mark.parametrize("version", [0, 2])
def test_another_version_of_the_machines_state_is_named(stream: Stream, version: int) -> None:
    """Of the devices' states: tests/unit/test_devices.py."""
    plain = msgspec.msgpack.decode(stream.read()[1])
    with pytest.raises(StreamError, match=r"\.version`"):
        saved.decode(msgspec.msgpack.encode({**plain, "version": version}), MachineState)


# --- damage ---------------------------------------------------------------------------------------
_STATES = {stream.name: stream.read()[1] for stream in STREAMS}
_some = st.sampled_from(sorted(_STATES))


@settings(max_examples=150, deadline=None)
@given(name=_some, data=st.data())
def test_a_truncated_state_is_a_stream_error(name: str, data: st.DataObject) -> None:
    whole = _STATES[name]
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(StreamError):
        _decode(whole[:end], MachineState)


@settings(max_examples=400, deadline=None)
@given(name=_some, data=st.data())
def test_a_damaged_state_is_a_stream_error_or_a_state(name: str, data: st.DataObject) -> None:
    payload = bytearray(_STATES[name])
    # Beside any byte: keys and numbers, most of which stand at both ends, around KVM's structs.
    near = st.integers(0, 200) | st.integers(len(payload) - 2500, len(payload) - 1)
    for at in data.draw(st.lists(near | st.integers(0, len(payload) - 1), min_size=1, max_size=8)):
        payload[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(payload)))
        payload[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    _decodes_or_is_refused(bytes(payload))


_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.binary(max_size=20)
    | st.text(max_size=8)
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(name=_some, value=_values, data=st.data())
def test_any_value_anywhere_is_a_stream_error_or_a_state(
    name: str, value: Any, data: st.DataObject
) -> None:
    plain = msgspec.msgpack.decode(_STATES[name])
    maps = [(at, put) for at, put in _maps(plain, lambda new: new) if at]
    at, put = data.draw(st.sampled_from(maps))
    field = data.draw(st.sampled_from(sorted(at)))
    _decodes_or_is_refused(msgspec.msgpack.encode(put({**at, field: value})))


def _decodes_or_is_refused(payload: bytes) -> None:
    with contextlib.suppress(StreamError):
        _decode(payload, MachineState)
