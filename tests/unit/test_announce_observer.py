"""The guest's frames told from the host's, and noted."""

from __future__ import annotations

import threading

from godwit.announce.dissect import Sighting
from godwit.announce.frames import gratuitous_arp, rarp, unsolicited_na
from godwit.announce.observer import OWN_AGE_S, OWN_LIMIT, Observer
from godwit.host.net.ethernet import TPID_8021AD, TPID_8021Q

MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("525400123457")
IP4 = bytes([192, 0, 2, 7])
IP6 = bytes.fromhex("20010db8" + "00" * 11 + "07")
VLAN = ((TPID_8021Q, 100),)
QINQ = ((TPID_8021AD, 10), (TPID_8021Q, 100))


def stripped(frame: bytes) -> bytes:
    """As the kernel hands a tagged frame over."""
    return frame[:12] + frame[16:]


def observer() -> tuple[Observer, list[Sighting]]:
    seen: list[Sighting] = []
    return Observer(MAC, 0.0, seen.append), seen


def test_the_guests_frames_are_learned_and_told() -> None:
    watcher, seen = observer()
    watcher.begin(0.0)
    for frame, outer in (
        (gratuitous_arp(MAC, IP4), None),
        (stripped(gratuitous_arp(MAC, IP4, VLAN)), VLAN[0]),
        (stripped(unsolicited_na(MAC, IP6, QINQ)), QINQ[0]),
    ):
        assert watcher.frame(memoryview(frame), outer, 1.0) == seen[-1]
    assert [one.tags for one in seen] == [(), VLAN, QINQ]
    assert (watcher.frames, watcher.malformed, watcher.own) == (3, 0, 0)
    entries = watcher.entries(1.0)
    assert len(entries) == 4
    assert watcher.missing(1.0) == []
    assert watcher.announced_at(entries[1]) == 1.0


def test_what_says_nothing_to_all_is_learned_and_not_told() -> None:
    watcher, seen = observer()
    frame = bytearray(gratuitous_arp(MAC, IP4))
    frame[41] = 1  # asks for 192.0.2.1
    assert watcher.frame(bytes(frame), None, 1.0) is not None
    assert seen == []
    assert watcher.peers(1.0)[0].ip == bytes([192, 0, 2, 1])


def test_malformed_and_other_frames_are_counted() -> None:
    watcher, seen = observer()
    assert watcher.frame(b"\xff" * 60, None, 1.0) is None
    assert watcher.frame(gratuitous_arp(MAC, IP4)[:30], None, 1.0) is None
    assert watcher.frame(gratuitous_arp(MAC, b"\xe0\0\0\1"), None, 1.0) is None
    assert (watcher.frames, watcher.malformed, seen) == (3, 2, [])
    assert len(watcher.entries(1.0)) == 1


def test_the_hosts_own_frames_are_not_the_guests() -> None:
    watcher, seen = observer()
    watcher.begin(0.0)
    for frame, outer in (
        (rarp(MAC), None),
        (gratuitous_arp(OTHER, IP4, VLAN), VLAN[0]),
        (unsolicited_na(MAC, IP6, QINQ), QINQ[0]),
    ):
        watcher.host_sent(frame, 1.0)
        assert watcher.frame(stripped(frame) if outer else frame, outer, 1.1) is None
    assert (watcher.frames, watcher.own, seen) == (0, 3, [])
    assert len(watcher.entries(1.1)) == 1
    assert len(watcher.missing(1.1)) == 1


def test_as_many_are_own_as_were_sent() -> None:
    watcher, seen = observer()
    frame = gratuitous_arp(MAC, IP4)
    for _ in range(3):
        watcher.host_sent(frame, 1.0)
    for _ in range(5):
        watcher.frame(frame, None, 1.0)
    assert (watcher.own, len(seen)) == (3, 2)


def test_an_own_frame_that_does_not_come_by_is_waited_for_no_longer() -> None:
    watcher, seen = observer()
    frame = gratuitous_arp(MAC, IP4)
    watcher.host_sent(frame, 1.0)
    watcher.host_sent(frame, 2.0)
    watcher.frame(frame, None, 1.5 + OWN_AGE_S)  # the second is still due
    watcher.frame(frame, None, 1.5 + OWN_AGE_S)
    assert (watcher.own, len(seen)) == (1, 1)
    watcher.host_sent(frame, 10.0)
    watcher.host_sent(rarp(MAC), 11.0 + OWN_AGE_S)
    assert len(watcher._own) == 1


def test_own_frames_are_bounded() -> None:
    watcher, _ = observer()
    for number in range(3 * OWN_LIMIT):
        watcher.host_sent(gratuitous_arp(MAC, (0xC0000000 + number).to_bytes(4, "big")), 1.0)
    assert len(watcher._own) == len(watcher._own._sent) == OWN_LIMIT
    for _ in range(3 * OWN_LIMIT):
        watcher.host_sent(rarp(MAC), 1.0)
    assert len(watcher._own) == OWN_LIMIT
    assert list(watcher._own._sent) == [rarp(MAC)]
    for _ in range(OWN_LIMIT):
        watcher.frame(rarp(MAC), None, 1.0)
    assert watcher.own == OWN_LIMIT
    assert (len(watcher._own), watcher._own._sent) == (0, {})


def test_a_listener_may_ask_the_observer() -> None:
    found: list[int] = []
    watcher = Observer(MAC, 0.0, lambda sighting: found.append(len(watcher.entries(1.0))))
    watcher.frame(gratuitous_arp(MAC, IP4), None, 1.0)
    assert found == [2]


def test_the_book_moves_with_the_guest() -> None:
    source, _ = observer()
    source.set_filter([OTHER], [100], 0.0)
    source.frame(gratuitous_arp(MAC, IP4), None, 1.0)
    target = Observer(OTHER, 500.0)
    target.set_configured(MAC, 500.0)
    target.load(source.save(2.0), 500.0)
    target.begin(500.0)
    assert [entry.ip for entry in target.missing(500.0)] == [None, IP4]


def test_threads_share_it() -> None:
    watcher, _ = observer()
    frame = gratuitous_arp(MAC, IP4)

    def send() -> None:
        for _ in range(500):
            watcher.host_sent(frame, 1.0)
            watcher.missing(1.0)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        watcher.frame(rarp(OTHER), None, 1.0)
    for thread in threads:
        thread.join()
    assert len(watcher._own) == 1500
