"""Which frames a NIC takes, and which offloads its tap must do."""

import msgspec
import pytest

from godwit.host.net.tap import F_CSUM, F_TSO4, F_TSO6, F_UFO
from godwit.hw.virtio.net import offloads
from godwit.hw.virtio.net.rxfilter import TABLE_LIMIT, RxFilter, RxFilterState
from tests.fakes.tap import FakeTap

OWN, OTHER = b"\x52\x54\0\0\0\1", b"\x52\x54\0\0\0\2"
GROUP, GROUP2, ALL = b"\x33\x33\0\0\0\1", b"\x01\0\x5e\0\0\1", b"\xff" * 6


def _frame(to: bytes, vid: int | None = None) -> bytes:
    tag = b"" if vid is None else b"\x81\0" + (0xE000 | vid).to_bytes(2, "big")
    return (to + OTHER + tag + b"\x08\0").ljust(60, b"\0")


def _taken(rules: RxFilter) -> set[bytes]:
    return {to for to in (OWN, OTHER, GROUP, GROUP2, ALL) if rules.accepts(_frame(to), OWN, False)}


@pytest.mark.parametrize(
    ("rules", "taken"),
    [
        (RxFilter(), {OWN, OTHER, GROUP, GROUP2, ALL}),
        (RxFilter(promiscuous=False), {OWN, ALL}),
        (RxFilter(promiscuous=False, all_multicast=True), {OWN, GROUP, GROUP2, ALL}),
        (RxFilter(promiscuous=False, all_unicast=True), {OWN, OTHER, ALL}),
        (RxFilter(promiscuous=False, multicast=[GROUP]), {OWN, GROUP, ALL}),
        (RxFilter(promiscuous=False, unicast=[OTHER]), {OWN, OTHER, ALL}),
        (RxFilter(promiscuous=False, no_broadcast=True), {OWN}),
        (RxFilter(promiscuous=False, no_unicast=True, unicast=[OTHER]), {ALL}),
        (RxFilter(promiscuous=False, no_multicast=True, all_multicast=True), {OWN, ALL}),
        (RxFilter(promiscuous=False, multicast_overflow=True), {OWN, GROUP, GROUP2, ALL}),
        (RxFilter(promiscuous=False, unicast_overflow=True), {OWN, OTHER, ALL}),
    ],
)
def test_the_switches_and_tables(rules: RxFilter, taken: set[bytes]) -> None:
    assert _taken(rules) == taken


def test_vlans_are_filtered_only_if_negotiated() -> None:
    rules = RxFilter(promiscuous=False, vlans=[100, 4095])
    for vid, wanted in ((100, True), (4095, True), (101, False), (0, False), (None, True)):
        assert rules.accepts(_frame(OWN, vid), OWN, True) is wanted
        assert rules.accepts(_frame(OWN, vid), OWN, False)
    assert not rules.accepts(_frame(OTHER, 100), OWN, True)
    assert RxFilter().accepts(_frame(OTHER, 7), OWN, True)


def test_what_is_no_frame_is_not_taken() -> None:
    for size in range(14):
        assert not RxFilter().accepts(ALL.ljust(14, b"\0")[:size], OWN, True)
    short = OWN + OTHER + b"\x81\0"
    assert RxFilter(promiscuous=False).accepts(memoryview(short), OWN, True)


def test_tables_that_are_too_long_are_given_up() -> None:
    rules = RxFilter(promiscuous=False)
    many = [b"\2" + i.to_bytes(5, "big") for i in range(TABLE_LIMIT + 1)]
    rules.set_tables(many[:-1], [])
    assert len(rules.unicast) == TABLE_LIMIT
    assert not rules.unicast_overflow
    rules.set_tables(many, [])
    assert (rules.unicast, rules.unicast_overflow) == ([], True)


def test_a_copy_shares_nothing() -> None:
    rules = RxFilter(vlans=[1], unicast=[OTHER], multicast=[GROUP])
    copy = rules.copy()
    assert copy == rules
    rules.vlans.append(2)
    rules.unicast.clear()
    rules.multicast.clear()
    assert copy == RxFilter(vlans=[1], unicast=[OTHER], multicast=[GROUP])
    assert RxFilter().vlans is not RxFilter().vlans


def test_a_saved_one_shares_nothing_and_lacks_nothing() -> None:
    rules = RxFilter(promiscuous=False, vlans=[1], unicast=[OTHER], multicast=[GROUP])
    before, state = rules.copy(), rules.save()
    for table in (rules.vlans, rules.unicast, rules.multicast):
        table.clear()
    loaded = RxFilter.load(state)
    assert loaded == before
    loaded.vlans.append(2)
    assert RxFilter.load(state) == before
    plain = msgspec.to_builtins(state)
    for field in plain:
        less = {key: value for key, value in plain.items() if key != field}
        with pytest.raises(msgspec.ValidationError, match=field):
            msgspec.convert(less, RxFilterState)


def test_what_a_tap_cannot_do_is_not_offered() -> None:
    nothing = offloads.offered(0)
    assert nothing == offloads.CSUM | offloads.HOST_TSO4 | offloads.HOST_TSO6 | offloads.HOST_ECN
    assert offloads.offered(F_CSUM) == nothing | offloads.GUEST_CSUM
    everything = offloads.offered(31)
    assert everything & (offloads.GUEST_UFO | offloads.HOST_UFO | offloads.GUEST_ECN) == (
        offloads.GUEST_UFO | offloads.HOST_UFO | offloads.GUEST_ECN
    )


@pytest.mark.parametrize("features", range(32))
def test_whatever_is_negotiated_the_tap_takes_it(features: int) -> None:
    bits = (
        offloads.GUEST_CSUM,
        offloads.GUEST_TSO4,
        offloads.GUEST_TSO6,
        offloads.GUEST_ECN,
        offloads.GUEST_UFO,
    )
    negotiated = sum(bit for i, bit in enumerate(bits) if features & 1 << i)
    tap = FakeTap()
    tap.set_offloads(offloads.tap_flags(negotiated))
    if not negotiated & offloads.GUEST_CSUM:
        assert tap.flags == 0
    else:
        for bit, flag in ((bits[1], F_TSO4), (bits[2], F_TSO6), (bits[4], F_UFO)):
            assert bool(negotiated & bit) == bool(tap.flags & flag)
    tap.close()
