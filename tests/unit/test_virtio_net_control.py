"""The control queue: filter commands, requests that are wrong, and very many of them."""

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.hw.memory import GuestMemory
from tests.fakes.driver import Part
from virtio_bench import ALL, F_EVENT_IDX, MAC, NEEDS_RESET, Bench

OK, ERR = 0, 1
F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA, F_CTRL_MAC = 1 << 18, 1 << 19, 1 << 20, 1 << 23
A, B, C = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02", b"\x01\0\x5e\0\0\x01"


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
            assert getattr(bench.net.control.filter, name) is bool(value)
    assert bench.guest.command(0, 6, b"\1") == ERR


def test_tables(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    guest.probe()
    # Linux sends both tables as one buffer each.
    whole = _tables([A, B], [C])
    assert guest.command(1, 0, whole[:16], whole[16:]) == OK
    assert (net.control.filter.unicast, net.control.filter.multicast) == ([A, B], [C])
    many = [struct.pack("<HI", 2, i) for i in range(65)]
    assert guest.command(1, 0, _tables(many, [])) == OK
    assert (net.control.filter.unicast, net.control.filter.unicast_overflow) == ([], True)
    assert (net.control.filter.multicast, net.control.filter.multicast_overflow) == ([], False)
    assert guest.command(1, 0, _tables([], [])) == OK
    assert not net.control.filter.unicast_overflow


def test_vlans(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    guest.probe()
    for vid in (0, 100, 4095, 100):
        assert guest.command(2, 0, vid.to_bytes(2, "little")) == OK
    assert net.control.filter.vlans == [0, 100, 4095]
    for _ in range(2):
        assert guest.command(2, 1, b"\x64\0") == OK
    assert net.control.filter.vlans == [0, 4095]


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
    before = bench.net.control.filter.copy()
    assert bench.guest.command(kind, command, data) == ERR
    assert bench.net.control.filter == before
    assert bench.net.mac == MAC
    assert not bench.errors


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
def test_a_request_without_space_needs_a_reset(
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
    assert len(bench.errors) == 1
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
    assert not bench.errors


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


# --- what operators and the address book are told -------------------------------------------------
def test_the_filter_as_it_is_shown(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    guest.probe()
    view = net.rx_filter()
    assert (view.promiscuous, view.unicast, view.multicast, view.broadcast) == (
        True, "normal", "normal", True,
    )  # fmt: skip
    assert (view.main_mac, view.vlan, view.vlan_table) == (MAC, "normal", ())
    guest.command(0, 0, b"\0")
    guest.command(1, 0, _tables([A, B], [C]))
    guest.command(2, 0, b"\x64\0")
    guest.command(1, 1, A)
    view = net.rx_filter()
    assert (view.promiscuous, view.main_mac) == (False, A)
    assert (view.unicast_table, view.multicast_table) == ((A, B), (C,))
    assert (view.vlan, view.vlan_table) == ("normal", (100,))


@pytest.mark.parametrize(
    ("commands", "unicast", "multicast", "broadcast"),
    [
        ([], "normal", "normal", True),
        ([1], "normal", "all", True),
        ([2], "all", "normal", True),
        ([3], "normal", "none", True),
        ([4], "none", "normal", True),
        ([5], "normal", "normal", False),
        ([1, 2, 3, 4], "none", "none", True),
    ],
)
def test_the_switches_as_they_are_shown(
    bench: Bench, commands: list[int], unicast: str, multicast: str, broadcast: bool
) -> None:
    bench.guest.probe()
    for command in commands:
        assert bench.guest.command(0, command, b"\1") == OK
    view = bench.net.rx_filter()
    assert (view.unicast, view.multicast, view.broadcast) == (unicast, multicast, broadcast)


def test_tables_that_overflow_are_shown_as_all(bench: Bench) -> None:
    bench.guest.probe()
    many = [struct.pack("<HI", 2, i) for i in range(65)]
    assert bench.guest.command(1, 0, _tables(many, [C])) == OK
    view = bench.net.rx_filter()
    assert (view.unicast, view.unicast_overflow, view.unicast_table) == ("all", True, ())
    assert (view.multicast, view.multicast_overflow) == ("normal", False)


def test_a_driver_that_filters_no_vlans_takes_all(bench: Bench) -> None:
    bench.guest.probe(ALL & ~F_CTRL_VLAN)
    view = bench.net.rx_filter()
    assert (view.vlan, view.vlan_table) == ("all", ())


def test_a_change_of_filter_or_mac_is_told_without_the_lock(bench: Bench) -> None:
    guest, net = bench.guest, bench.net
    told: list[bool] = []
    # The lock is reentrant: only another thread can tell whether it is held.
    net.on_filter = lambda: told.append(_free(net.lock))
    guest.probe()
    changes = [
        (0, 0, b"\0"),
        (1, 0, _tables([A], [C])),
        (2, 0, b"\x64\0"),
        (1, 1, A),
        (2, 1, b"\x64\0"),
    ]
    for kind, command, data in changes:
        for _ in range(2):  # the second time it changes nothing
            assert guest.command(kind, command, data) == OK
    assert told == [True] * len(changes)
    assert guest.command(2, 2, b"\1\0") == ERR
    net.announce()
    assert guest.command(3, 0) == OK
    assert len(told) == len(changes)


def test_many_requests_in_one_go_are_one_change(bench: Bench) -> None:
    guest = bench.guest
    told: list[int] = []
    bench.net.on_filter = lambda: told.append(1)
    guest.probe()
    driver = guest.queues[2]
    for vid in (1, 2, 3):
        data = driver.place(b"\2\0" + vid.to_bytes(2, "little"))
        driver.add([Part(data, 4), Part(driver.place(b"\xee"), 1, True)])
    guest.kick(2)
    bench.serve()
    assert told == [1]
    assert bench.net.rx_filter().vlan_table == (1, 2, 3)


def _free(lock: Any) -> bool:
    found: list[bool] = []

    def take() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(10)
    return found == [True]
