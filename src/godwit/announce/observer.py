"""What is known of one NIC's guest from its frames: the address book, and what it announced itself.

No I/O: :class:`godwit.host.net.tap_watch.TapWatch` brings the frames. It sees those too that the
host writes to the tap in the guest's name, so the host says beforehand what it sends.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable

from .addresses import AddressBook, Entry, Peer, Seen
from .dissect import Malformed, Sighting, dissect
from .frames import Tag
from .saved import AddressBookState

#: Frames of the host's that have not come by yet, at most: each address once as RARP and once with
#: its IP address, and some to spare.
OWN_LIMIT = 2048
#: How long one is waited for, s. The watch pauses for less; what comes later, it has dropped.
OWN_AGE_S = 2.0


class _Own:
    """Frames that the host sent and that have not come by: a multiset whose members expire."""

    def __init__(self) -> None:
        self._sent: dict[bytes, deque[float]] = {}  # when each expires; the latest frame last
        self._count = 0

    def add(self, frame: bytes, now: float) -> None:
        due = self._sent.pop(frame, None) or deque()
        due.append(now + OWN_AGE_S)
        self._sent[frame] = due
        self._count += 1
        while self._sent:
            first, due = next(iter(self._sent.items()))
            if due[-1] < now:
                self._count -= len(due)
                del self._sent[first]
            elif self._count > OWN_LIMIT:
                self._take(first, due)
            else:
                break

    def take(self, frame: bytes, now: float) -> bool:
        """Whether it is one of them; it is no more."""
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
    """One NIC's address book and what its guest announced. Thread-safe; its lock is a leaf.

    Times are the clock's, s.

    Attributes:
        frames: frames that came by, the host's own not among them.
        malformed: how many of them no honest host sends.
        own: the host's own that came by.
    """

    def __init__(
        self,
        mac: bytes,
        now: float,
        on_seen: Callable[[Sighting], None] = lambda sighting: None,
    ) -> None:
        self.frames = 0
        self.malformed = 0
        self.own = 0
        self._lock = threading.Lock()
        self._book = AddressBook(mac, now)
        self._seen = Seen()
        self._own = _Own()
        self._on_seen = on_seen

    # --- frames -----------------------------------------------------------------------------------
    def host_sent(self, frame: bytes, now: float) -> None:
        """The host is about to write ``frame`` to the tap; afterwards is too late."""
        with self._lock:
            self._own.add(frame, now)

    def frame(self, data: bytes | memoryview, outer: Tag | None, now: float) -> Sighting | None:
        """A frame that came out of the tap, and the tag that the kernel took off it.

        Returns what it says; None for the host's own, for malformed and other frames. ``on_seen``
        is called for each announcement of the guest's, without the lock.
        """
        whole = bytes(data)
        if outer is not None:
            whole = whole[:12] + struct.pack("!HH", *outer) + whole[12:]
        with self._lock:
            if self._own.take(whole, now):
                self.own += 1
                return None
            self.frames += 1
            try:
                sighting = dissect(data, outer)
            except Malformed:
                self.malformed += 1
                return None
            if sighting is None:
                return None
            self._book.learn(sighting, now)
            self._seen.note(sighting, now)
        if sighting.announces:
            self._on_seen(sighting)
        return sighting

    # --- what the NIC says ------------------------------------------------------------------------
    def set_configured(self, mac: bytes, now: float) -> None:
        """See :meth:`AddressBook.set_configured`."""
        with self._lock:
            self._book.set_configured(mac, now)

    def set_filter(self, macs: Iterable[bytes], vlans: Iterable[int], now: float) -> None:
        """See :meth:`AddressBook.set_filter`."""
        with self._lock:
            self._book.set_filter(macs, vlans, now)

    # --- what is known ----------------------------------------------------------------------------
    def entries(self, now: float) -> list[Entry]:
        """The addresses that are not too old, the most important first."""
        with self._lock:
            self._book.forget_old(now)
            return self._book.entries()

    def peers(self, now: float) -> list[Peer]:
        """The peers that are not too old, the one met most often first."""
        with self._lock:
            self._book.forget_old(now)
            return self._book.peers()

    def begin(self, now: float) -> None:
        """The mark from which on announcements count."""
        with self._lock:
            self._seen.begin(now)

    def missing(self, now: float) -> list[Entry]:
        """Of :meth:`entries`, those that the guest has not announced since the mark."""
        with self._lock:
            self._book.forget_old(now)
            return self._seen.missing(self._book.entries())

    def announced_at(self, entry: Entry) -> float | None:
        """When the guest announced it first since the mark; None: it did not."""
        with self._lock:
            return self._seen.when(entry)

    # --- the saved state --------------------------------------------------------------------------
    def save(self, now: float) -> AddressBookState:
        """The address book."""
        with self._lock:
            return self._book.save(now)

    def load(self, state: AddressBookState, now: float) -> None:
        """Replace what was learned. Raises StreamError."""
        with self._lock:
            self._book.load(state, now)
