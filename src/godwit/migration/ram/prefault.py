"""The destination's RAM made before it is needed.

Page faults, not Python, are what limits the copy. While no source is there, RAM is populated from
its start, as far as the host has memory to spare; once a source says which pages will come, those
go first. What was populated in vain is given back: a guest takes no more here than it took there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from godwit.host.ioctl import address_of
from godwit.hw.memory import HUGE, GuestMemory

#: Of the memory that the host has available, so much is taken before anybody asked for it.
_SHARE = 0.5
#: Huge pages between two looks at what the host still has.
_LOOK = 32


class Prefault:
    """Populates ``memory`` in a thread of its own, which holds no lock of Python's meanwhile."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._changed = threading.Condition()
        self._wanted: deque[int] = deque()  # host addresses of huge pages
        self._needed: set[int] = set()
        self._done: set[int] = set()
        self._ending = False
        self._thread = threading.Thread(target=self._main, name="prefault", daemon=True)

    def start(self) -> None:
        """Begin, with what nobody asked for yet."""
        self._thread.start()

    def want(self, views: Sequence[memoryview]) -> None:
        """These parts of RAM come next."""
        blocks = [block for view in views for block in _blocks(view)]
        with self._changed:
            self._wanted.extend(blocks)
            self._needed.update(blocks)
            self._changed.notify()

    def use(self, views: Sequence[memoryview]) -> None:
        """These parts of RAM are about to hold data: they are not given back any more."""
        with self._changed:
            for view in views:
                self._needed.update(_blocks(view))

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was called."""
        return self._ending

    @property
    def idle(self) -> bool:
        """Whether a source has said what it has, and all of it is done."""
        with self._changed:
            return bool(self._needed) and not self._wanted and not self._done - self._needed

    def finish(self) -> None:
        """Populate no more, give back no more, and wait for the thread: the guest's pages are here,
        and the guest may stand still for this."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        ahead = self._ahead()
        while True:
            with self._changed:
                block = self._next(ahead)
                if block is None:
                    return
                self._done.add(block)
            self._memory.populate(block, HUGE)

    def _next(self, ahead: Iterator[int]) -> int | None:
        """What to populate; gives back, under the lock, what a source does not have."""
        while not self._ending:
            block = None
            if self._wanted:
                block = self._wanted.popleft()
            elif not self._needed:
                block = next(ahead, None)
            elif self._give_back():
                continue
            if block is None:
                self._changed.wait()
            elif block not in self._done:
                return block
        return None

    def _give_back(self) -> bool:
        """One huge page; whether there may be more. Under the lock, so that nobody uses it now."""
        for block in self._done - self._needed:
            self._done.discard(block)
            self._memory.discard(block, HUGE)
            # Others get their turn: pages are arriving meanwhile.
            self._changed.wait(0)
            return True
        return False

    def _ahead(self) -> Iterator[int]:
        space = int(_available() * _SHARE)
        floor = space  # what has to be left: others may take from it as well
        count = 0
        for region in self._memory.regions:
            for block in _blocks(region.view):
                count += 1
                if space < HUGE or (count % _LOOK == 0 and _available() < floor):
                    return
                space -= HUGE
                yield block


def _blocks(view: memoryview) -> range:
    """Host addresses of the huge pages that ``view`` touches; RAM consists of whole ones."""
    host = address_of(view)
    return range(host // HUGE * HUGE, host + len(view), HUGE)


def _available() -> int:
    """What the host could give without swapping, bytes (proc(5), meminfo)."""
    try:
        with open("/proc/meminfo", "rb") as meminfo:
            for line in meminfo:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
