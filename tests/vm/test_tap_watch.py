"""The watch on a real tap: what the guest sends is seen with its tags, and nothing else is.

Most need no guest: the test holds the tap's descriptor, as a guest's NIC does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_bench import Bench, Guest, announced

from godwit.announce.dissect import Sighting
from godwit.announce.entries import Entry
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.observer import Observer
from godwit.errors import HostError
from godwit.host.loop import Loop
from godwit.host.net.bpf import Bits, bits
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q
from godwit.host.net.tap import HEADER, Tap
from godwit.host.net.tap_watch import INTERVAL_S, MAX_FRAMES, TapWatch
from godwit.spec.values import parse_mac
from lab.addresses import LANS
from lab.netns import inside
from lab.scenario import MAC as LAB_MAC

MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("5254000000aa")
IP4 = bytes([192, 0, 2, 7])
IP6 = bytes.fromhex("20010db8" + "00" * 11 + "07")
NETNS, TAP = f"godwit-{os.getpid()}-watch", "watched0"
VLAN = ((TPID_8021Q, 100),)
QINQ = ((TPID_8021AD, 10), (TPID_8021Q, 100))


def ip(*words: str) -> None:
    subprocess.run(["ip", "-n", NETNS, *words], check=True, timeout=60)


class Place:
    """A tap in a namespace of its own, and a loop."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.network: TapWatch | None = None
        # The host's own frames would disturb the counts.
        with inside(NETNS):
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        self.tap = self.attach()

    def attach(self) -> Tap:
        """Make the tap, and set it up."""
        with inside(NETNS):
            self.tap = Tap(TAP)
        ip("link", "set", TAP, "up")
        return self.tap

    def watch(self, *arguments: object, **more: object) -> TapWatch:
        with inside(NETNS):
            return TapWatch(TAP, *arguments, **more)  # type: ignore[arg-type]

    def until(self, done: Callable[[], object]) -> None:
        """Run the loop until it is so."""
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            self.loop.run_once(1)

    def got(self) -> bytes | None:
        """The next frame that came to the guest."""
        try:
            return os.read(self.tap.fd, 1 << 16)[HEADER:]
        except BlockingIOError:
            return None

    def to_guest(self, frame: bytes, interface: str = TAP) -> None:
        """Send as the host's network does, from a socket that is not the watch's."""
        with inside(NETNS), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind((interface, 0))
            sock.send(frame)

    def close(self) -> None:
        self.tap.close()
        self.loop.close()


@pytest.fixture
def place() -> Iterator[Place]:
    subprocess.run(["ip", "netns", "add", NETNS], check=True, timeout=60)
    try:
        place = Place()
        yield place
        place.close()
    finally:
        subprocess.run(["ip", "netns", "del", NETNS], check=True, timeout=60)


Frames = list[tuple[bytes, tuple[int, int] | None]]


@pytest.fixture
def watched(place: Place) -> Iterator[tuple[TapWatch, Frames, list[OSError]]]:
    frames: Frames = []
    errors: list[OSError] = []
    tap = place.watch(lambda *frame: frames.append(frame), place.loop, errors.append)
    yield tap, frames, errors
    tap.close()


def stripped(frame: bytes) -> bytes:
    return frame[:12] + frame[16:]


def test_what_the_guest_sends_is_seen_with_its_tags(
    place: Place, watched: tuple[TapWatch, Frames, list[OSError]]
) -> None:
    tap, frames, errors = watched
    head, na = OTHER + MAC, unsolicited_na(MAC, IP6)
    others = [
        head + bytes.fromhex("0800450000280000000040110000") + bytes(40),  # UDP
        head + bytes.fromhex("810000640800450000280000000040110000") + bytes(40),
        na[:54] + b"\x80" + na[55:],  # echo request
        na[:54] + b"\x85" + na[55:],  # router solicitation
        na[:20] + b"\x11" + na[21:],  # UDP over IPv6
        head + bytes.fromhex("88cc") + bytes(46),  # LLDP
    ]
    sent: list[tuple[bytes, tuple[int, int] | None]] = []
    for tags in ((), VLAN, QINQ, (*QINQ, (TPID_8021Q, 7))):
        for frame in (
            rarp(MAC, tags),
            gratuitous_arp(MAC, IP4, tags),
            unsolicited_na(MAC, IP6, tags),
        ):
            place.tap.send(frame)
            place.tap.send(bytes(others[len(sent) % len(others)]))
            sent.append((stripped(frame), tags[0]) if tags else (frame, None))
    # Four tags are more than any honest guest's.
    place.tap.send(rarp(MAC, (*QINQ, *QINQ)))
    place.tap.send(rarp(OTHER))
    sent.append((rarp(OTHER), None))
    place.until(lambda: len(frames) >= len(sent))
    assert frames == sent
    assert (tap.dropped, errors) == (0, [])


def test_a_priority_tag_is_taken_off_too(
    place: Place, watched: tuple[TapWatch, Frames, list[OSError]]
) -> None:
    _, frames, _ = watched
    frame = rarp(MAC)
    place.tap.send(frame[:12] + bytes.fromhex("8100e000") + frame[12:])
    place.until(lambda: frames)
    assert frames == [(frame, (TPID_8021Q, 0))]


def test_what_goes_to_the_guest_is_not_seen(
    place: Place, watched: tuple[TapWatch, Frames, list[OSError]]
) -> None:
    _, frames, _ = watched
    for frame in (gratuitous_arp(OTHER, IP4), rarp(OTHER), unsolicited_na(OTHER, IP6, VLAN)):
        place.to_guest(frame)
        assert place.got() == frame
    place.tap.send(rarp(MAC))
    place.until(lambda: frames)
    assert frames == [(rarp(MAC), None)]


def test_a_frame_is_injected(place: Place, watched: tuple[TapWatch, Frames, list[OSError]]) -> None:
    tap, frames, _ = watched
    for frame in (gratuitous_arp(OTHER, IP4), unsolicited_na(OTHER, IP6, VLAN), rarp(MAC, QINQ)):
        tap.inject(frame)
        assert place.got() == frame
    with pytest.raises(OSError):
        tap.inject(b"short")
    place.tap.send(rarp(MAC))
    place.until(lambda: frames)
    assert len(frames) == 1


#: 192.0.2.1 tells the guest where it is.
REPLY = (
    MAC + OTHER + bytes.fromhex("08060001080006040002")
    + OTHER + bytes([192, 0, 2, 1]) + MAC + IP4
)  # fmt: skip


@pytest.fixture
def answers(place: Place) -> Iterator[Frames]:
    frames: Frames = []
    place.network = tap = place.watch(lambda *frame: frames.append(frame), place.loop, network=True)
    yield frames
    tap.close()


def test_what_others_send_to_the_guest_is_seen(place: Place, answers: Frames) -> None:
    tagged = REPLY[:12] + bytes.fromhex("810000c8") + REPLY[12:]
    place.tap.send(REPLY)  # of the guest's own
    place.to_guest(rarp(OTHER))
    to_many = [gratuitous_arp(OTHER, IP4), unsolicited_na(OTHER, IP6, QINQ)]
    sent = [REPLY, tagged, *to_many]
    for frame in sent:
        place.to_guest(frame)
    place.until(lambda: len(answers) >= len(sent))
    assert [whole(*frame) for frame in answers] == sent
    # Of what is sent to many, only what concerns the guest.
    for known, passed in (
        (Bits(), []),
        (Bits(ipv4=bits([IP4])), to_many[:1]),
        (Bits(ipv6=bits([IP6])), to_many[1:]),
        (Bits(peers=bits([IP6])), to_many[1:]),
        (Bits(macs=bits([OTHER])), to_many),
    ):
        answers.clear()
        assert place.network is not None
        place.network.narrow(known)
        for frame in (*to_many, REPLY):
            place.to_guest(frame)
        place.until(lambda: REPLY in [whole(*frame) for frame in answers])
        assert [whole(*frame) for frame in answers] == [*passed, REPLY]


def test_a_tag_beside_an_answer_is_seen(place: Place, answers: Frames) -> None:
    # As a bridge sends it: the tag is put into the frame by the tap.
    ip("link", "add", "link", TAP, "name", "tagged", "type", "vlan", "id", "100")
    ip("link", "set", "tagged", "up")
    place.to_guest(REPLY, "tagged")
    place.until(lambda: answers)
    assert answers == [(REPLY, (TPID_8021Q, 100))]
    assert place.got() == REPLY[:12] + bytes.fromhex("81000064") + REPLY[12:]


def whole(frame: bytes, outer: tuple[int, int] | None) -> bytes:
    """With the tag that the kernel took off."""
    if outer is None:
        return frame
    tpid, vid = outer
    return frame[:12] + tpid.to_bytes(2, "big") + vid.to_bytes(2, "big") + frame[12:]


def test_a_flood_is_read_at_a_limited_rate(
    place: Place, watched: tuple[TapWatch, Frames, list[OSError]]
) -> None:
    tap, frames, errors = watched
    flood = 3000
    for number in range(flood):
        place.tap.send(gratuitous_arp(MAC, number.to_bytes(4, "big")))
    began = time.monotonic()
    place.until(lambda: len(frames) + tap.dropped >= flood)
    took = time.monotonic() - began
    assert tap.dropped > 0
    assert len(frames) >= MAX_FRAMES
    assert len(frames) <= MAX_FRAMES * (1 + took / INTERVAL_S)
    place.tap.send(rarp(MAC))
    place.until(lambda: frames[-1] == (rarp(MAC), None))
    assert errors == []


def test_the_interface_may_go_down_and_up(
    place: Place, watched: tuple[TapWatch, Frames, list[OSError]]
) -> None:
    tap, frames, errors = watched
    ip("link", "set", TAP, "down")
    place.loop.run_once(0)
    ip("link", "set", TAP, "up")
    place.tap.send(rarp(MAC))
    place.until(lambda: frames)
    assert (errors, tap.closed) == ([], False)


def test_one_that_is_down_can_be_watched(place: Place) -> None:
    ip("link", "set", TAP, "down")
    frames: Frames = []
    tap = place.watch(lambda *frame: frames.append(frame), place.loop)
    ip("link", "set", TAP, "up")
    place.tap.send(rarp(MAC))
    place.until(lambda: frames)
    tap.close()


def test_an_interface_that_is_gone_is_reported_once(
    place: Place, watched: tuple[TapWatch, Frames, list[OSError]]
) -> None:
    tap, frames, errors = watched
    place.tap.close()  # it is not persistent
    place.until(lambda: errors)
    place.loop.run_once(0)
    assert len(errors) == 1
    assert tap.closed
    with inside(NETNS), pytest.raises(HostError, match="there is no such interface"):
        tap.reopen()
    place.attach()
    with inside(NETNS):
        tap.reopen()
    place.tap.send(rarp(MAC))
    place.until(lambda: frames)
    assert len(errors) == 1


def _entries(observer: Observer, now: float) -> list[Entry]:
    with observer.book(now) as book:
        return book.entries()


def _missing(observer: Observer, now: float) -> list[Entry]:
    with observer.book(now) as book:
        return [one for one in book.entries() if not book.seen.announced_since(one, None)]


def test_the_observer_tells_the_guests_frames_from_the_hosts(place: Place) -> None:
    seen: list[Sighting] = []
    observer = Observer(MAC, place.loop.now(), seen.append)
    tap = place.watch(
        lambda frame, outer: observer.frame(frame, outer, place.loop.now()), place.loop
    )
    with observer.book(place.loop.now()) as book:
        book.seen.begin()
    for frame in (rarp(MAC), gratuitous_arp(MAC, IP4, VLAN), unsolicited_na(MAC, IP6, QINQ)):
        observer.host_sends(frame, place.loop.now())
        place.tap.send(frame)
        place.until(lambda: observer.host_frames)
        observer.host_frames = 0
    assert seen == []
    for frame in (gratuitous_arp(MAC, IP4, VLAN), unsolicited_na(MAC, IP6, QINQ)):
        place.tap.send(frame)
    place.until(lambda: len(seen) == 2)
    tap.close()
    assert [(one.tags, one.ip) for one in seen] == [(VLAN, IP4), (QINQ, IP6)]
    assert [entry.ip for entry in _missing(observer, place.loop.now())] == [None]


@contextmanager
def observed(netns: str, tap: str) -> Iterator[tuple[Observer, Callable[..., None]]]:
    """An observer of a VM's tap, and what waits until something is so."""
    loop = Loop()
    observer = Observer(parse_mac(LAB_MAC), loop.now())
    with inside(netns):
        watch = TapWatch(
            tap, lambda frame, outer: observer.frame(frame, outer, loop.now()), loop
        )  # fmt: skip

    def until(done: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, _entries(observer, loop.now())
            loop.run_once(0.5)

    try:
        yield observer, until
        assert (watch.closed, observer.malformed) == (False, 0)
    finally:
        watch.close()
        loop.close()


def _lab_addresses() -> set[tuple[tuple[tuple[int, int], ...], bytes]]:
    """(tags, IP address) of the lab's guest."""
    return {
        (((TPID_8021Q, lan.vlan),) if lan.vlan else (), socket.inet_pton(family, address))
        for lan in LANS
        for family, address in zip((socket.AF_INET, socket.AF_INET6), lan.guest, strict=True)
    }


def _known(entries: list[Entry]) -> set[tuple[object, object]]:
    assert {entry.mac.hex(":") for entry in entries} == {LAB_MAC}
    return {(entry.tags, entry.ip) for entry in entries}


def test_a_guests_addresses_are_learned_past_vhost_and_its_announcement_is_seen(
    bench: Bench, guest: Guest
) -> None:
    source, now = guest.vm, time.monotonic
    with observed(source.host.netns, source.tap) as (observer, until):
        # Who does not know the guest any more asks, and the guest answers.
        subprocess.run(
            ["ip", "-n", bench.net.client.netns, "neigh", "flush", "all"], check=True, timeout=60
        )
        bench.answers()
        until(lambda: _lab_addresses() <= _known(_entries(observer, now())))
        with observer.book(now()) as book:
            state = book.save(now())

    target = bench.target(guest)
    with observed(target.host.netns, target.tap) as (observer, until):
        with observer.book(now()) as book:
            book.load(state, now())
            book.seen.begin()
        bench.move(guest, target)
        announced(target)
        until(
            lambda: not _lab_addresses() & {(e.tags, e.ip) for e in _missing(observer, now())}
        )  # fmt: skip
        first = _entries(observer, now())[0]
        with observer.book(now()) as book:
            assert book.seen.announced_at(first) is not None
