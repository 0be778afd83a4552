"""Frames of the guest and of the network, into the dissection, the observer and its address book.

Findings: an exception but Malformed; an address book beyond its bounds; a book that is saved and is
not the same when loaded; announcements that cannot be built from what was learned.
"""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from godwit.announce import frames, saved
from godwit.announce.dissect import Malformed, dissect
from godwit.announce.frames import read_cookie, stack_of
from godwit.announce.memberships import report
from godwit.announce.uplink import Uplink
from godwit.spec.saved import decode, encode
from tests.fakes.clock import FakeClock

from .target import Choices, Target, allowed, piece, require

GUEST, PEER = bytes.fromhex("525400000030"), bytes.fromhex("5254000000bb")
#: The first byte of an input that fills the address book.
SERIES = 0x55
#: 512 from frames, 128 from the filter (docs of the address book).
_MOST_ENTRIES = 512 + 128 + 1


def run(data: bytes) -> None:
    """Bring frames to an uplink, of which some come from the network, at growing times.

    With :data:`SERIES` as the first byte, each is one of 100 that differ in their addresses.
    """
    from announce_bench import Nic

    clock = FakeClock()
    uplink = Uplink(Nic(clock), clock)
    choices = Choices(data)
    count = 100 if choices.number() == SERIES else 1
    while choices:
        how, frame = choices.number(), choices.piece(9000)
        outer = None
        if how & 1:
            outer = ((0x8100, 0x88A8)[how >> 1 & 1], choices.number(2) % 4096)
        clock.advance((0.0, 0.001, 1.0, 4000.0)[how >> 2 & 3])
        for number in range(count):
            _one(uplink, _varied(frame, number), outer, clock.now(), how)
    _check(uplink, clock.now())


def _varied(frame: bytes, number: int) -> bytes:
    """Return a frame whose addresses' last bytes are others: ARP's, a neighbour's, a group's."""
    changed = bytearray(frame)
    for at in (11, 27, 31, 37, 53, 77):
        if number and at < len(changed):
            changed[at] ^= number
    return bytes(changed)


def _one(uplink: Uplink, frame: bytes, outer: tuple[int, int] | None, now: float, how: int) -> None:
    observer = uplink.observer
    for own in (True, False):
        with allowed(Malformed):
            dissect(memoryview(frame), outer, own=own)
    stack_of(frame)
    read_cookie(memoryview(frame))
    if how & 0x10:
        observer.guest_here(bool(how & 0x20))
    if how & 0x40:
        observer.network_frame(frame, outer, now)
    else:
        observer.frame(frame, outer, now)
    if how & 0x80 and len(frame) >= 14:
        observer.host_sends(frame, now)


def _check(uplink: Uplink, now: float) -> None:
    observer = uplink.observer
    with observer.book(now) as book:
        require(len(book.entries()) <= _MOST_ENTRIES, "more addresses than the book may have")
        require(len(book.peers()) <= saved.MAX_PEERS, "more peers than the book may have")
        require(len(book.memberships) <= saved.MAX_MEMBERSHIPS, "more memberships than may be")
        state = book.save(now)
        reports = [report(one) for one in book.memberships]
    require(all(14 <= len(one) <= 1514 for one in reports), "a report that is no frame")
    observer.known()
    for rarp in (True, False):
        uplink.announce(uplink.announced(), base=rarp)
    uplink.layer2_updates(lambda number: bytes(16) + number.to_bytes(4, "big"), 64)
    uplink.report(uplink.memberships())
    uplink.missing()
    require(all(len(frame) >= 14 for _, frame in uplink.nic.sent), "what was sent is no frame")
    other = Uplink(uplink.nic, FakeClock())
    with other.observer.book(now) as book:
        book.load(decode(encode(state), saved.AddressBookState), now)
        again = book.save(now)
    require(encode(again) == encode(state), "a loaded address book differs from the saved one")


def entry(frame: bytes, how: int = 0, tci: int | None = None) -> bytes:
    """Return a frame as the target reads it; ``tci`` is that of a tag the kernel took off."""
    tag = b"" if tci is None else struct.pack("<H", tci)
    return bytes([how | (tci is not None)]) + piece(frame) + tag


_macs = st.one_of(
    st.sampled_from([GUEST, PEER]),
    st.binary(min_size=6, max_size=6).map(lambda mac: bytes([mac[0] & 0xFE]) + mac[1:]),
)
_ip4 = st.one_of(st.binary(min_size=4, max_size=4), st.just(bytes([192, 0, 2, 7])))
_ip6 = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.just(bytes.fromhex("20010db8" + "00" * 11 + "07")),
    st.just(bytes.fromhex("fe80" + "00" * 13 + "01")),
)
_tags = st.lists(
    st.tuples(st.sampled_from([0x8100, 0x88A8]), st.integers(1, 4094)), max_size=2
).map(tuple)
_frames = st.one_of(
    st.builds(frames.rarp, _macs, _tags),
    st.builds(frames.gratuitous_arp, _macs, _ip4, _tags),
    st.builds(frames.unsolicited_na, _macs, _ip6, _tags, router=st.booleans()),
    st.builds(frames.arp_request, _macs, _ip4, _ip4, _tags),
    st.builds(frames.arp_probe, _macs, _ip4, _tags),
    st.builds(frames.solicitation, _macs, _ip6, _ip6, _tags),
    st.builds(frames.layer2_update, _macs, _tags, st.binary(max_size=20)),
    st.binary(max_size=120),
)
_entries = st.builds(
    lambda frame, how, tci: entry(frame, how & 0xFE, tci),
    _frames,
    st.integers(0, 255),
    st.one_of(st.none(), st.integers(0, 4095)),
)
TARGET = Target(
    "dissect",
    run,
    ("/godwit/announce/",),
    st.builds(
        lambda first, entries: first + b"".join(entries[: 12 if first[0] else 30]),
        st.sampled_from([b"\0"] * 20 + [bytes([SERIES])]),
        st.lists(_entries, max_size=30),
    ),
    (
        *(b"\x81\0", b"\x88\xa8", b"\x08\x06", b"\x80\x35", b"\x86\xdd", b"\x08\0", b"\xff" * 6),
        *(bytes.fromhex("3333000000fb"), bytes.fromhex("01005e0000fb"), b"\x3a", b"\x8f", b"\x22"),
        GUEST,
    ),
)
