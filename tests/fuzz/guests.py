"""What the devices' targets share: RAM that shows unlogged writes, and the parts of a bench."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from godwit.host.ioctl import address_of
from godwit.hw.memory import PAGE, GuestMemory
from godwit.hw.virtio.queue import Virtqueue
from tests.fakes.vhost import FakeVhost

from .target import Finding, require

_NO_HUGE_PAGES = 15  # MADV_NOHUGEPAGE (asm-generic/mman-common.h)
_EMPTY = bytes(PAGE)


@cache
def memory() -> GuestMemory:
    """Return the RAM that all guests of this process have one after the other."""
    ram = GuestMemory(32 << 20)
    for mapping in ram._maps:
        mapping.madvise(_NO_HUGE_PAGES)  # each would be zeroed and compared, for a few bytes
    return ram


@contextmanager
def logged_memory() -> Iterator[GuestMemory]:
    """Lend zeroed RAM, and find pages with content that no dirty log has.

    Raises:
        Finding: the VMM wrote a page without marking the page.
    """
    ram = memory()
    ram.clear()
    ram.start_log()
    try:
        yield ram
        _check(ram, ram.take_log())
    finally:
        ram.stop_log()


def _check(ram: GuestMemory, logged: set[int]) -> None:
    for start, pages in ram.populated():
        for page in range(start // PAGE, start // PAGE + pages):
            if page not in logged and ram.view(page * PAGE, PAGE) != _EMPTY:
                raise Finding(f"page {page:#x} was written, and no dirty log has it")


class CheckedVhost(FakeVhost):
    """A fake vhost that checks that rings lie in RAM as a whole, where the kernel would write."""

    def __init__(self, ram: GuestMemory) -> None:
        super().__init__()
        self._ram = ram
        self._sizes = [0, 0]

    def set_size(self, index: int, size: int) -> None:
        """Note the ring's size, which is a power of two of at most 32,768."""
        super().set_size(index, size)
        require(0 < size <= 32768 and not size & (size - 1), f"a ring of {size} entries")
        self._sizes[index] = size

    def set_addresses(
        self, index: int, parts: tuple[int, int, int], log: bool, used_in_guest: int
    ) -> None:
        """Check the parts of a ring against the regions of RAM."""
        super().set_addresses(index, parts, log, used_in_guest)
        size = self._sizes[index]
        for start, length in zip(parts, (16 * size, 6 + 8 * size, 6 + 2 * size), strict=True):
            require(
                any(
                    region.host <= start and start + length <= region.host + region.size
                    for region in self._ram.regions
                ),
                f"ring {index}: {length} bytes are not in RAM",
            )
        used = self._ram.view(used_in_guest, 1)
        require(address_of(used) == parts[1], f"ring {index}: the log has another used ring")


def check_queue(queue: Virtqueue) -> None:
    """Check what a queue's positions may be."""
    require(0 <= queue.last_avail <= 0xFFFF, "a position beyond 16 bits")
    require(0 <= queue.last_used <= 0xFFFF, "a position beyond 16 bits")
