"""The observer of one NIC: what frames from and to the guest show, kept in the NIC's address book.

No I/O: :class:`godwit.host.net.tap_watch.TapWatch` brings the frames. The watch also sees what the
host writes to the tap in the guest's name, so the observer has to know of such a frame before.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from godwit.host.net.bpf import Bits, bits

from .addresses import REFLECTED_S, AddressBook
from .dissect import Malformed, Sighting, dissect, tags_of
from .frames import Tag

#: Frames of the host's that have not come by yet, at most: each address once as RARP and once with
#: its IP address, and some to spare.
MAX_HOST_FRAMES = 2048
#: How long a frame of the host's is waited for, seconds. The watch pauses for less; what comes
#: later, the watch has dropped.
HOST_FRAME_MAX_AGE_S = 2.0


class _HostFrames:
    """The frames the host sent and the observer has not seen: a multiset whose members expire."""

    def __init__(self) -> None:
        self._sent: dict[bytes, deque[float]] = {}  # when each expires; the latest frame last
        self._count = 0

    def add(self, frame: bytes, now: float) -> None:
        due = self._sent.pop(frame, None) or deque()
        due.append(now + HOST_FRAME_MAX_AGE_S)
        self._sent[frame] = due
        self._count += 1
        while self._sent:
            first, due = next(iter(self._sent.items()))
            if due[-1] < now:
                self._count -= len(due)
                del self._sent[first]
            elif self._count > MAX_HOST_FRAMES:
                self._take(first, due)
            else:
                break

    def take(self, frame: bytes, now: float) -> bool:
        """Take a frame out, and return whether the frame was the host's."""
        due = self._sent.get(frame)
        while due:
            if self._take(frame, due) >= now:
                return True
        return False

    def _take(self, frame: bytes, due: deque[float]) -> float:
        self._count -= 1
        expires = due.popleft()
        if not due:
            del self._sent[frame]
        return expires

    def __len__(self) -> int:
        return self._count


class Observer:
    """The observer of one NIC's frames, and the keeper of its address book.

    Thread-safe; its lock is a leaf. Times are the clock's, in seconds.

    Attributes:
        is_siblings: returns whether a MAC address is that of another NIC of the guest's. Called
            without the lock.
        guest_frames: frames of the guest's that came by.
        malformed: how many of the guest's frames no honest host sends.
        host_frames: frames of the host's that came by.
    """

    def __init__(
        self,
        mac: bytes,
        now: float,
        on_seen: Callable[[Sighting], None] = lambda sighting: None,
    ) -> None:
        self._here = False
        self.is_siblings: Callable[[bytes], bool] = lambda mac: False
        self.guest_frames = 0
        self.malformed = 0
        self.host_frames = 0
        self._lock = threading.Lock()
        self._book = AddressBook(mac, now)
        self._awaited = _HostFrames()
        self._host_used: dict[bytes, float] = {}  # MAC -> when the host last sent in its name
        self._on_seen = on_seen

    @contextmanager
    def book(self, now: float) -> Iterator[AddressBook]:
        """Lend the address book, without what is too old, for the length of a ``with`` block.

        The lock is held meanwhile, so the block calls nothing that may lock.
        """
        with self._lock:
            self._book.forget_old(now)
            yield self._book

    @property
    def version(self) -> int | None:
        """The version of the address book, or None while its guest is awaited."""
        book = self._book
        return None if book.expects_guest else book.version

    def macs(self) -> set[bytes]:
        """Return the MAC addresses in the address book, a set replaced and never changed."""
        with self._lock:
            return self._book.macs()

    def known(self) -> tuple[int | None, Bits]:
        """Return the version, and the addresses in the address book for the kernel's filter.

        The configured MAC address is left out: whoever has the same is no news.
        """
        with self._lock:
            book = self._book
            ips, peers = book.ips(), [peer.ip for peer in book.peers() if len(peer.ip) == 16]
            return self.version, Bits(
                ipv4=bits(ip for ip in ips if len(ip) == 4),
                ipv6=bits(ip for ip in ips if len(ip) == 16),
                peers=bits(peers),
                macs=bits(book.macs() - {book.mac}),
            )

    def guest_here(self, here: bool) -> None:
        """Take note of whether the guest is here: it runs, or was loaded after its stop elsewhere.

        Only then a MAC address of the guest's that comes from the network is another's. Before and
        after, the guest may itself be there.
        """
        with self._lock:
            self._here = here
            if here:
                self._book.guest_came()

    def host_sends(self, frame: bytes, now: float) -> None:
        """Take note of a frame the host is about to write to the tap.

        After the write, the note may be too late. ``frame`` is whole, with all its VLAN tags.
        """
        with self._lock:
            self._awaited.add(frame, now)
            if len(self._host_used) >= MAX_HOST_FRAMES:
                self._host_used.clear()
            self._host_used[frame[6:12]] = now

    def frame(self, data: bytes | memoryview, outer: Tag | None, now: float) -> Sighting | None:
        """Learn from a frame that came out of the tap, and return what the guest's frame shows.

        ``outer`` is the tag the kernel took off the frame. Returns None for the host's own
        frames, for malformed and other ones. ``on_seen`` is called, without the lock, for each
        announcement of the guest's own.
        """
        whole = bytes(data)
        if outer is not None:
            whole = whole[:12] + struct.pack("!HH", *outer) + whole[12:]
        with self._lock:
            if self._awaited.take(whole, now):
                self.host_frames += 1
                return None
            self.guest_frames += 1
            try:
                sighting = dissect(data, outer)
                if sighting is None:
                    self._book.memberships.learn(bytes(data), outer, now)
                    return None
            except Malformed:
                self.malformed += 1
                return None
            self._book.learn(sighting, now)
        if sighting.announces:
            self._on_seen(sighting)
        return sighting

    def network_frame(
        self, data: bytes | memoryview, outer: Tag | None, now: float
    ) -> Sighting | None:
        """Learn from a frame on its way to the guest, and return what another host shows there.

        Returns None for malformed frames and frames without an address.
        """
        try:
            tags = tags_of(data, outer)
            sighting = dissect(data, outer, own=False)
        except Malformed:
            return None
        # A guest answers at one NIC for what it has at another (arp_ignore): that is no claim.
        others = sighting is not None and not self.is_siblings(sighting.mac)
        with self._lock:
            if self._here:
                self._used_elsewhere(bytes(data[6:12]), tags, now)
                if sighting is not None and data[0] & 1:  # to many, on another's behalf perhaps
                    self._used_elsewhere(sighting.mac, tags, now)
            if sighting is not None and others:
                self._book.claim(sighting, now)
        return sighting

    def _used_elsewhere(self, mac: bytes, tags: tuple[Tag, ...], now: float) -> None:
        """Take note of a frame from the network, unless the host's own came back."""
        if now >= self._host_used.get(mac, float("-inf")) + REFLECTED_S:
            self._book.used_elsewhere(mac, tags, now)

    def driver_macs(self) -> set[bytes]:
        """Return the MAC addresses that the driver has given to the NIC."""
        with self._lock:
            return self._book.driver_macs()
