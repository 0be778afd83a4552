"""The destination's RAM, populated before use.

Page faults, not Python, are what limits the copy. While no source is there, RAM is populated from
its start, as far as the host has memory to spare; once a source has sent which pages will come,
those go first. What was populated in vain is given back: a guest takes no more memory here than
there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from godwit.host.ioctl import address_of
from godwit.hw.memory import HUGE, GuestMemory

#: The share of the host's available memory that is taken before anybody asked for it.
_SHARE = 0.5
#: Huge pages between two looks at what the host still has.
_LOOK = 32


class Prefault:
    """A thread that populates ``memory``, and holds no lock of Python's meanwhile."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._changed = threading.Condition()
        self._wanted: deque[int] = deque()  # host addresses of huge pages
        self._needed: set[int] = set()
        self._done: set[int] = set()
        self._ending = False
        self._thread = threading.Thread(target=self._main, name="prefault", daemon=True)

    def start(self) -> None:
        """Begin with pages that nobody asked for yet."""
        self._thread.start()

    def want(self, views: Sequence[memoryview]) -> None:
        """Populate these parts of RAM next."""
        blocks = [block for view in views for block in _blocks(view)]
        with self._changed:
            self._wanted.extend(blocks)
            self._needed.update(blocks)
            self._changed.notify()

    def use(self, views: Sequence[memoryview]) -> None:
        """Give these parts of RAM back no more, as they are about to hold data."""
        with self._changed:
            for view in views:
                self._needed.update(_blocks(view))

    @property
    def finished(self) -> bool:
        """True if :meth:`finish` was called."""
        return self._ending

    @property
    def idle(self) -> bool:
        """True once a source has sent its runs, and all of their pages are populated."""
        with self._changed:
            return bool(self._needed) and not self._wanted and not self._done - self._needed

    def finish(self) -> None:
        """Populate no more, give back no more, and wait for the thread.

        The guest's pages are here, and the guest may stand still for this.
        """
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        spare = self._spare_blocks()
        while True:
            with self._changed:
                block = self._next(spare)
                if block is None:
                    return
                self._done.add(block)
            self._memory.populate(block, HUGE)

    def _next(self, spare: Iterator[int]) -> int | None:
        """Return the next huge page to populate, and give back those a source does not have.

        Called under the lock.
        """
        while not self._ending:
            block = None
            if self._wanted:
                block = self._wanted.popleft()
            elif not self._needed:
                block = next(spare, None)
            elif self._give_back():
                continue
            if block is None:
                self._changed.wait()
            elif block not in self._done:
                return block
        return None

    def _give_back(self) -> bool:
        """Give one huge page back under the lock, and return whether there may be more."""
        for block in self._done - self._needed:
            self._done.discard(block)
            self._memory.discard(block, HUGE)
            # Others get their turn: pages are arriving meanwhile.
            self._changed.wait(0)
            return True
        return False

    def _spare_blocks(self) -> Iterator[int]:
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
    """Return the host addresses of the huge pages that ``view`` overlaps."""
    host = address_of(view)
    return range(host // HUGE * HUGE, host + len(view), HUGE)


def _available() -> int:
    """Return the bytes the host could give without swapping (proc(5), meminfo)."""
    try:
        with open("/proc/meminfo", "rb") as meminfo:
            for line in meminfo:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
