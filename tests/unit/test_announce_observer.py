"""The observer: the guest's frames told apart from the host's, and learned from."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.announce.addresses import MAX_AGE_S
from godwit.announce.dissect import Sighting
from godwit.announce.entries import Entry
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.observer import HOST_FRAME_MAX_AGE_S, MAX_HOST_FRAMES, Observer
from godwit.announce.saved import AddressBookState, SavedPeer
from godwit.errors import StreamError
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q

MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("525400123457")
IP4 = bytes([192, 0, 2, 7])
IP6 = bytes.fromhex("20010db8" + "00" * 11 + "07")
VLAN = ((TPID_8021Q, 100),)
QINQ = ((TPID_8021AD, 10), (TPID_8021Q, 100))


def stripped(frame: bytes) -> bytes:
    """Return a tagged frame as the kernel hands the frame over."""
    return frame[:12] + frame[16:]


def observer() -> tuple[Observer, list[Sighting]]:
    seen: list[Sighting] = []
    return Observer(MAC, 0.0, seen.append), seen


def begin(watcher: Observer, now: float = 0.0) -> None:
    with watcher.book(now) as book:
        book.seen.begin()


def entries(watcher: Observer, now: float) -> list[Entry]:
    with watcher.book(now) as book:
        return book.entries()


def missing(watcher: Observer, now: float) -> list[Entry]:
    with watcher.book(now) as book:
        return [one for one in book.entries() if not book.seen.announced_since(one, None)]


def test_the_guests_frames_are_learned_and_reported() -> None:
    watcher, seen = observer()
    begin(watcher)
    for frame, outer in (
        (gratuitous_arp(MAC, IP4), None),
        (stripped(gratuitous_arp(MAC, IP4, VLAN)), VLAN[0]),
        (stripped(unsolicited_na(MAC, IP6, QINQ)), QINQ[0]),
    ):
        assert watcher.frame(memoryview(frame), outer, 1.0) == seen[-1]
    assert [one.tags for one in seen] == [(), VLAN, QINQ]
    assert (watcher.guest_frames, watcher.malformed, watcher.host_frames) == (3, 0, 0)
    known = entries(watcher, 1.0)
    assert len(known) == 4
    assert missing(watcher, 1.0) == []
    with watcher.book(1.0) as book:
        assert book.seen.announced_at(known[1]) == 1.0


def test_what_is_no_announcement_is_learned_and_not_reported() -> None:
    watcher, seen = observer()
    frame = bytearray(gratuitous_arp(MAC, IP4))
    frame[41] = 1  # asks for 192.0.2.1
    assert watcher.frame(bytes(frame), None, 1.0) is not None
    assert seen == []
    with watcher.book(1.0) as book:
        assert book.peers()[0].ip == bytes([192, 0, 2, 1])


def test_malformed_and_other_frames_are_counted() -> None:
    watcher, seen = observer()
    assert watcher.frame(b"\xff" * 60, None, 1.0) is None
    assert watcher.frame(gratuitous_arp(MAC, IP4)[:30], None, 1.0) is None
    assert watcher.frame(gratuitous_arp(MAC, b"\xe0\0\0\1"), None, 1.0) is None
    assert (watcher.guest_frames, watcher.malformed, seen) == (3, 2, [])
    assert len(entries(watcher, 1.0)) == 1


def test_the_hosts_own_frames_are_not_the_guests() -> None:
    watcher, seen = observer()
    begin(watcher)
    for frame, outer in (
        (rarp(MAC), None),
        (gratuitous_arp(OTHER, IP4, VLAN), VLAN[0]),
        (unsolicited_na(MAC, IP6, QINQ), QINQ[0]),
    ):
        watcher.host_sends(frame, 1.0)
        assert watcher.frame(stripped(frame) if outer else frame, outer, 1.1) is None
    assert (watcher.guest_frames, watcher.host_frames, seen) == (0, 3, [])
    assert len(entries(watcher, 1.1)) == 1
    assert len(missing(watcher, 1.1)) == 1


def test_as_many_are_the_hosts_as_were_sent() -> None:
    watcher, seen = observer()
    frame = gratuitous_arp(MAC, IP4)
    for _ in range(3):
        watcher.host_sends(frame, 1.0)
    for _ in range(5):
        watcher.frame(frame, None, 1.0)
    assert (watcher.host_frames, len(seen)) == (3, 2)


def test_a_host_frame_that_does_not_come_by_is_waited_for_no_longer() -> None:
    watcher, seen = observer()
    frame = gratuitous_arp(MAC, IP4)
    watcher.host_sends(frame, 1.0)
    watcher.host_sends(frame, 2.0)
    watcher.frame(frame, None, 1.5 + HOST_FRAME_MAX_AGE_S)  # the second is still due
    watcher.frame(frame, None, 1.5 + HOST_FRAME_MAX_AGE_S)
    assert (watcher.host_frames, len(seen)) == (1, 1)
    watcher.host_sends(frame, 10.0)
    watcher.host_sends(rarp(MAC), 11.0 + HOST_FRAME_MAX_AGE_S)
    assert len(watcher._awaited) == 1


def test_host_frames_are_bounded() -> None:
    watcher, _ = observer()
    for number in range(3 * MAX_HOST_FRAMES):
        watcher.host_sends(gratuitous_arp(MAC, (0xC0000000 + number).to_bytes(4, "big")), 1.0)
    assert len(watcher._awaited) == len(watcher._awaited._sent) == MAX_HOST_FRAMES
    for _ in range(3 * MAX_HOST_FRAMES):
        watcher.host_sends(rarp(MAC), 1.0)
    assert len(watcher._awaited) == MAX_HOST_FRAMES
    assert list(watcher._awaited._sent) == [rarp(MAC)]
    for _ in range(MAX_HOST_FRAMES):
        watcher.frame(rarp(MAC), None, 1.0)
    assert watcher.host_frames == MAX_HOST_FRAMES
    assert (len(watcher._awaited), watcher._awaited._sent) == (0, {})


def test_a_listener_may_ask_the_observer() -> None:
    found: list[int] = []
    watcher = Observer(MAC, 0.0, lambda sighting: found.append(len(entries(watcher, 1.0))))
    watcher.frame(gratuitous_arp(MAC, IP4), None, 1.0)
    assert found == [2]


def test_the_book_migrates_with_the_guest() -> None:
    source, _ = observer()
    with source.book(0.0) as book:
        book.set_filter([OTHER], [100], 0.0)
    source.frame(gratuitous_arp(MAC, IP4), None, 1.0)
    with source.book(2.0) as book:
        state = book.save(2.0)
    target = Observer(OTHER, 500.0)
    with target.book(500.0) as book:
        book.set_configured(MAC, 500.0)
        book.load(state, 500.0)
    begin(target, 500.0)
    assert [entry.ip for entry in missing(target, 500.0)] == [None, IP4]


def test_threads_share_it() -> None:
    watcher, _ = observer()
    frame = gratuitous_arp(MAC, IP4)

    def send() -> None:
        for _ in range(500):
            watcher.host_sends(frame, 1.0)
            missing(watcher, 1.0)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        watcher.frame(rarp(OTHER), None, 1.0)
    for thread in threads:
        thread.join()
    assert len(watcher._awaited) == 1500


def test_what_is_too_old_is_not_lent() -> None:
    watcher, _ = observer()
    watcher.frame(gratuitous_arp(MAC, IP4), None, 1.0)
    assert len(entries(watcher, 1.0 + MAX_AGE_S)) == 2
    assert len(entries(watcher, 2.0 + MAX_AGE_S)) == 1


def test_the_book_is_lent_under_the_lock() -> None:
    watcher, _ = observer()
    with watcher.book(1.0):
        assert watcher._lock.locked()
    assert not watcher._lock.locked()


def test_an_error_gives_the_book_back() -> None:
    watcher, _ = observer()
    with pytest.raises(StreamError), watcher.book(1.0) as book:
        book.load(AddressBookState([], [SavedPeer([], bytes(4), 1.0, 1)]), 1.0)
    assert len(entries(watcher, 1.0)) == 1


# --- frames of others -----------------------------------------------------------------------------
def test_another_hosts_claim_is_learned_with_the_tag_the_kernel_took_off() -> None:
    watcher, _ = observer()
    watcher.frame(stripped(gratuitous_arp(MAC, IP4, QINQ)), QINQ[0], 1.0)
    watcher.frame(gratuitous_arp(MAC, IP4), None, 1.0)
    claim = gratuitous_arp(OTHER, IP4, QINQ)
    assert watcher.network_frame(stripped(claim), QINQ[0], 2.0) is not None
    assert {(one.tags, one.ip) for one in entries(watcher, 2.0)} == {
        ((), None), ((), IP4), (QINQ, None),
    }  # fmt: skip
    assert (watcher.guest_frames, watcher.malformed) == (2, 0)


def test_others_malformed_frames_are_not_the_guests() -> None:
    watcher, _ = observer()
    assert watcher.network_frame(gratuitous_arp(OTHER, IP4)[:30], None, 1.0) is None
    assert watcher.network_frame(b"", None, 1.0) is None
    assert watcher.malformed == 0


@given(st.binary(max_size=150), st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 4095)))
def test_the_network_may_send_anything(data: bytes, outer: tuple[int, int] | None) -> None:
    watcher, _ = observer()
    watcher.guest_here(True)
    watcher.frame(gratuitous_arp(MAC, IP4), None, 0.0)
    for start in (b"", b"\xff" * 6 + OTHER, gratuitous_arp(OTHER, IP4)[:28]):
        watcher.network_frame(start + data, outer, 1.0)
    assert entries(watcher, 1.0)[0].mac == MAC
