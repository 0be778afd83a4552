"""The control queue: filter commands, requests that are wrong, and very many of them."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtio_bench import ALL, F_EVENT_IDX, MAC, NEEDS_RESET, Bench

from godwit.hw.memory import GuestMemory
from godwit.testing.driver import Part

OK, ERR = 0, 1
F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA, F_CTRL_MAC = 1 << 18, 1 << 19, 1 << 20, 1 << 23
A, B, C = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02", b"\x01\0\x5e\0\0\x01"


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(32 << 20)
    yield memory
    memory.close()


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


def _tables(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    return b"".join(
        struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast)
    )


def test_switches(bench: Bench) -> None:
    bench.guest.probe()
    names = ("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast")
    for command, name in enumerate((*names, "no_broadcast")):
        for value in (1, 0):
            assert bench.guest.command(0, command, bytes((value,))) == OK
            assert getattr(bench.net.filter, name) is bool(value)
    assert bench.guest.command(0, 6, b"\1") == ERR


def test_tables(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    guest.probe()
    # Linux sends both tables as one buffer each.
    whole = _tables([A, B], [C])
    assert guest.command(1, 0, whole[:16], whole[16:]) == OK
    assert (net.filter.unicast, net.filter.multicast) == ([A, B], [C])
    many = [struct.pack("<HI", 2, i) for i in range(65)]
    assert guest.command(1, 0, _tables(many, [])) == OK
    assert (net.filter.unicast, net.filter.unicast_overflow) == ([], True)
    assert (net.filter.multicast, net.filter.multicast_overflow) == ([], False)
    assert guest.command(1, 0, _tables([], [])) == OK
    assert not net.filter.unicast_overflow


def test_vlans(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    guest.probe()
    for vid in (0, 100, 4095, 100):
        assert guest.command(2, 0, vid.to_bytes(2, "little")) == OK
    assert net.filter.vlans == [0, 100, 4095]
    for _ in range(2):
        assert guest.command(2, 1, b"\x64\0") == OK
    assert net.filter.vlans == [0, 4095]


def test_the_mac_address(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    guest.probe()
    assert guest.command(1, 1, A) == OK
    assert net.mac == A
    assert guest.device_config()[:6] == A
    guest.status = 0
    assert net.mac == MAC


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (0, 0, b""),
        (0, 0, b"\1\1"),
        (1, 0, b""),
        (1, 0, bytes(4)),
        (1, 0, bytes(9)),
        (1, 0, b"\1\0\0\0" + A),
        (1, 0, b"\xff\xff\xff\xff" + A),
        (1, 0, _tables([A], [C])[:-1]),
        (1, 0, _tables([A], [C]) + b"\0"),
        (1, 1, A[:5]),
        (1, 1, A + b"\0"),
        (1, 1, C),
        (1, 2, A),
        (2, 0, b"\1"),
        (2, 0, b"\1\0\0"),
        (2, 0, b"\0\x10"),
        (2, 2, b"\1\0"),
        (4, 0, b"\1\0"),
        (255, 255, b""),
    ],
)
def test_malformed_and_unknown_requests_fail_and_change_nothing(
    bench: Bench, kind: int, command: int, data: bytes
) -> None:
    bench.guest.probe()
    before = bench.net.filter.copy()
    assert bench.guest.command(kind, command, data) == ERR
    assert bench.net.filter == before
    assert bench.net.mac == MAC
    assert not bench.offences


@pytest.mark.parametrize(
    ("feature", "kind", "command", "data"),
    [
        (F_CTRL_RX, 0, 0, b"\1"),
        (F_CTRL_RX, 0, 1, b"\1"),
        (F_CTRL_RX, 1, 0, _tables([], [])),
        (F_CTRL_RX_EXTRA, 0, 2, b"\1"),
        (F_CTRL_RX_EXTRA, 0, 5, b"\1"),
        (F_CTRL_VLAN, 2, 0, b"\1\0"),
        (F_CTRL_VLAN, 2, 1, b"\1\0"),
        (F_CTRL_MAC, 1, 1, A),
    ],
)
def test_what_was_not_negotiated_fails(
    bench: Bench, feature: int, kind: int, command: int, data: bytes
) -> None:
    bench.guest.probe(ALL & ~feature)
    assert bench.guest.command(kind, command, data) == ERR


@pytest.mark.parametrize(
    "parts",
    [
        [(b"", False)],
        [(b"\0", False), (b"\0", True)],
        [(b"\0\0\0", False)],
        [(b"\0", True)],
        [(b"\0\0\0", False), (b"", True)],
    ],
    ids=["empty", "one byte", "no answer", "only an answer", "an answer of no bytes"],
)
def test_a_request_without_room_needs_a_reset(
    bench: Bench, parts: list[tuple[bytes, bool]]
) -> None:
    guest = bench.guest
    guest.probe()
    driver = guest.queues[2]
    driver.add([Part(driver.place(data), len(data), write) for data, write in parts])
    guest.kick(2)
    bench.serve()
    assert guest.status & NEEDS_RESET
    assert guest.interrupts(0) == 1
    assert len(bench.offences) == 1
    assert not bench.backend.running
    guest.probe()
    assert guest.command(0, 0, b"\1") == OK


@pytest.mark.parametrize("features", [ALL, ALL & ~F_EVENT_IDX], ids=["event idx", "flags"])
def test_more_than_65536_requests(bench: Bench, features: int) -> None:
    guest = bench.guest
    guest.probe(features, size=16)
    driver = guest.queues[2]
    parts = [Part(driver.place(b"\2\0"), 2), Part(driver.place(b"\x05\0"), 2)]
    parts.append(Part(driver.place(b"\xee"), 1, True))
    count = 66_000
    while driver.taken < count:
        # A batch a kick: a real driver waits for each, but the ring allows this.
        added = [driver.add(parts) for _ in range(5)]
        if driver.must_kick():
            guest.kick(2)
        bench.serve()
        assert driver.take_all() == [(head, 1) for head in added]
    assert bench.memory.read(parts[2].address, 1) == b"\0"
    assert bench.net.queues[2].last_used == count - 65_536
    assert not bench.offences


def test_a_full_ring_is_answered_and_the_loop_gets_its_turn(bench: Bench) -> None:
    guest = bench.guest
    guest.probe(size=64)
    driver = guest.queues[2]
    parts = [Part(driver.place(b"\0\0\1"), 3), Part(driver.place(b"\xee"), 1, True)]
    heads = [driver.add(parts, indirect=True) for _ in range(64)]
    guest.kick(2)
    bench.serve()
    assert [head for head, _ in driver.take_all()] == heads
    bench.serve()
    assert guest.command(0, 0, b"\0") == OK


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.binary(max_size=40), st.booleans()), min_size=1, max_size=5))
def test_any_request_is_answered_or_needs_a_reset(
    memory: GuestMemory, parts: list[tuple[bytes, bool]]
) -> None:
    bench = Bench(memory)
    try:
        guest = bench.guest
        guest.probe()
        driver = guest.queues[2]
        driver.add([Part(driver.place(data), len(data), write) for data, write in parts])
        guest.kick(2)
        bench.serve()
        assert (driver.take() is not None) != bool(guest.status & NEEDS_RESET)
    finally:
        bench.close()
