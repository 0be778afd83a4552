"""The migration stream's bytes: round trips, truncations, garbage."""

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.errors import StreamError
from godwit.hw.capabilities import SetupHints
from godwit.hw.memory import PAGE
from godwit.hw.power import PowerState
from godwit.hw.serial import SerialState
from godwit.migration.ram.page_runs import chunks
from godwit.migration.wire import messages
from godwit.migration.wire.messages import (
    MAX_PAGES,
    MAX_RUNS,
    Commit,
    Hello,
    HelloDevice,
    Kind,
    Reason,
    Run,
    Started,
)
from godwit.spec import saved

NIC = HelloDevice(
    "nic0",
    "virtio-net",
    1,
    {"mac": "52:54:00:00:00:01", "mtu": None, "queue-size": 256},
    1 << 63,
    SetupHints(1 << 31, [0, 2], bytes(16), 1 << 63),
)
HELLO = Hello("godwit-0.2", bytes(16), 2, [(0, 1 << 28)], [NIC], 2)
STRUCTS: list[msgspec.Struct] = [
    HELLO,
    NIC,
    Reason("because"),
    Commit(bytes(range(16)), True),
    Started({"vcpus": 1.5}, ["inmigrate", "running"]),
    PowerState(1, 2, 3),
    SerialState(1, 2, 3, 4, 5, 6, 7, True, b"in"),
]


# --- headers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", Kind)
def test_headers_round_trip(kind: Kind) -> None:
    assert messages.parse_header(messages.header(kind, 1234)) == (kind, 1234)
    whole = messages.message(kind, b"payload")
    assert messages.parse_header(whole[:8]) == (kind, 7)
    assert whole[8:] == b"payload"


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_has_a_limit(kind: Kind) -> None:
    limits = {
        Kind.PREFAULT: 1 << 20,
        Kind.ZERO: 1 << 20,
        Kind.STATE: 4 << 20,
        Kind.PACKETS: 4 << 20,
        Kind.RAM: messages.table_size(messages.MAX_RUNS) + messages.MAX_PAGES * PAGE,
    }
    limit = limits.get(kind, 64 << 10)
    assert messages.parse_header(messages.header(kind, limit)) == (kind, limit)
    with pytest.raises(StreamError, match=kind.name):
        messages.parse_header(messages.header(kind, limit + 1))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\0\2" + bytes(6), "kind 0"),
        (b"\x1f\2" + bytes(6), "kind 31"),
        (b"\xff\2" + b"\xff" * 6, "kind 255"),
        (b"\1\1" + bytes(6), "protocol 1"),
        (b"\1\2\0\1" + bytes(4), "reserved"),
        (b"", "0 bytes"),
        (b"\1" + bytes(6), "7 bytes"),
        (b"\1" + bytes(8), "9 bytes"),
    ],
)
def test_headers_that_are_none(raw: bytes, says: str) -> None:
    with pytest.raises(StreamError, match=says):
        messages.parse_header(raw)


@given(st.binary(max_size=16))
def test_any_header_is_one_or_a_stream_error(raw: bytes) -> None:
    try:
        kind, length = messages.parse_header(raw)
    except StreamError:
        return
    assert messages.header(kind, length) == raw


# --- structs --------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", STRUCTS, ids=lambda value: type(value).__name__)
def test_structs_round_trip(value: msgspec.Struct) -> None:
    assert saved.decode(saved.encode(value), type(value)) == value


@pytest.mark.parametrize("value", STRUCTS, ids=lambda value: type(value).__name__)
def test_every_truncation_is_a_stream_error(value: msgspec.Struct) -> None:
    payload = saved.encode(value)
    for end in range(len(payload)):
        with pytest.raises(StreamError, match=type(value).__name__):
            saved.decode(payload[:end], type(value))
    with pytest.raises(StreamError):
        saved.decode(payload + b"\0", type(value))


@pytest.mark.parametrize("value", STRUCTS, ids=lambda value: type(value).__name__)
def test_a_missing_or_unknown_field_is_named(value: msgspec.Struct) -> None:
    fields: dict[str, Any] = msgspec.msgpack.decode(saved.encode(value))
    required = [f.encode_name for f in msgspec.structs.fields(value) if f.required]
    for name in required:
        less = {key: content for key, content in fields.items() if key != name}
        with pytest.raises(StreamError, match=name):
            saved.decode(msgspec.msgpack.encode(less), type(value))
    with pytest.raises(StreamError, match="surprise"):
        saved.decode(msgspec.msgpack.encode({**fields, "surprise": 1}), type(value))


@pytest.mark.parametrize(
    ("value", "field", "content"),
    [
        (HELLO, "token", bytes(15)),
        (HELLO, "token", "x" * 16),
        (HELLO, "ram", [[0, 1]] * 9),
        (HELLO, "ram", [[0]]),
        (HELLO, "cpus", "two"),
        (HELLO, "versions", {"vcpu": None}),
        (NIC, "negotiated", -1),
        (NIC, "properties", {"mtu": 1.5}),
        (Reason("x"), "reason", "x" * 4097),
        (PowerState(0, 0, 0), "enable", 1 << 16),
        (PowerState(0, 0, 0), "status", -1),
        (PowerState(0, 0, 0), "version", 2),
        (STRUCTS[-1], "lcr", 256),
        (STRUCTS[-1], "received", bytes((1 << 16) + 1)),
        (STRUCTS[-1], "thr_pending", 1),
        (STRUCTS[-1], "version", 0),
    ],
)
def test_a_field_out_of_range_is_named(value: msgspec.Struct, field: str, content: object) -> None:
    fields: dict[str, Any] = msgspec.msgpack.decode(saved.encode(value))
    with pytest.raises(StreamError, match=field):
        saved.decode(msgspec.msgpack.encode({**fields, field: content}), type(value))


def test_a_struct_of_another_type_is_refused() -> None:
    with pytest.raises(StreamError):
        saved.decode(saved.encode(Reason("x")), Commit)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x81\xa6reason\xa2\xff\xfe",  # no UTF-8 in a value
        b"\x81\xa6reaso\xff\xa1x",  # nor in a key
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6reason\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa6reason" + b"\x91" * 100_000,
        b"\x81" * 100_000,
        b"\xc1",
        b"\x81\xa6reason\xd6\xff\0\0\0\0",
    ],
)
def test_what_no_peer_sends_is_a_stream_error(payload: bytes) -> None:
    with pytest.raises(StreamError):
        saved.decode(payload, Reason)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_garbage_is_a_stream_error_or_a_struct(data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(STRUCTS))
    payload = bytearray(saved.encode(value))
    for at in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=6)):
        payload[at] = data.draw(st.integers(0, 255))
    payload = payload[data.draw(st.integers(0, 3)) :]
    try:
        decoded = saved.decode(payload, type(value))
    except StreamError:
        return
    assert isinstance(decoded, type(value))


# --- tables of runs -------------------------------------------------------------------------------
_runs = st.lists(
    st.tuples(st.integers(0, (1 << 52) - 1).map(lambda n: n * PAGE), st.integers(1, (1 << 32) - 1)),
    max_size=20,
)


@given(_runs)
def test_tables_round_trip(runs: list[Run]) -> None:
    table = messages.encode_runs(runs)
    assert len(table) == messages.table_size(len(runs))
    count = messages.decode_count(table, len(table))
    assert messages.decode_runs(memoryview(table)[4:], count) == runs


def test_tables_that_end_too_early() -> None:
    table = messages.encode_runs([(0, 1), (PAGE, 2)])
    for end in range(len(table)):
        with pytest.raises(StreamError):
            messages.decode_count(table[:end], end)
        with pytest.raises(StreamError):
            messages.decode_runs(table[4:end], 2)
    with pytest.raises(StreamError):
        messages.decode_count(struct.pack("<I", 0xFFFF_FFFF), 1 << 20)


@pytest.mark.parametrize("run", [(1, 1), (PAGE - 1, 1), (0, 0), (PAGE, 0), ((1 << 64) - 1, 1)])
def test_runs_that_are_none(run: Run) -> None:
    with pytest.raises(StreamError, match=f"{run[0]:#x}"):
        messages.decode_runs(struct.pack("<QI", *run), 1)


@given(st.binary(max_size=100), st.integers(0, 1 << 21))
def test_any_table_is_one_or_a_stream_error(raw: bytes, length: int) -> None:
    try:
        count = messages.decode_count(raw, length)
        runs = messages.decode_runs(raw[4:], count)
    except StreamError:
        return
    assert messages.encode_runs(runs) == raw[: messages.table_size(count)]


_small = st.lists(
    st.tuples(st.integers(0, 1 << 20).map(lambda n: n * PAGE), st.integers(1, 1500)), max_size=40
)


@settings(max_examples=50, deadline=None)
@given(_small)
def test_batches_are_exactly_the_runs_and_fit(runs: list[Run]) -> None:
    groups = list(chunks(runs, MAX_PAGES, MAX_RUNS))
    assert [page for group in groups for page in _pages(group)] == list(_pages(runs))
    for group in groups:
        assert 0 < len(group) <= messages.MAX_RUNS
        assert 0 < sum(pages for _, pages in group) <= messages.MAX_PAGES
        size = messages.table_size(len(group)) + PAGE * sum(pages for _, pages in group)
        messages.parse_header(messages.header(Kind.RAM, size))


def test_many_small_runs_are_cut_by_their_number() -> None:
    runs = [(2 * i * PAGE, 1) for i in range(2000)]
    groups = list(chunks(runs, MAX_PAGES, MAX_RUNS))
    assert [len(group) for group in groups] == [512, 512, 512, 464]
    assert list(chunks([])) == []


def _pages(runs: list[Run]) -> list[int]:
    return [address + i * PAGE for address, pages in runs for i in range(pages)]
