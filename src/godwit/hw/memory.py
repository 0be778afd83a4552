"""Guest RAM: private memory or a shared memfd, with transparent huge pages, every access checked.

Layout: RAM from 0, a hole for devices from 3 GiB to 4 GiB, the rest from 4 GiB up. Writes by the
VMM itself are noted in a dirty set while a migration logs, because KVM sees only the guest's own.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from typing import NamedTuple

from godwit.errors import ConfigError, GuestError
from godwit.host import memory
from godwit.host.ioctl import address_of

PAGE = 4096
HUGE = 2 << 20
#: Bytes that are copied at once when RAM is not to be a file's any more.
_COPIED = 1 << 30
_MAP_NORESERVE = 0x4000  # not in Python's mmap module before 3.13 (asm-generic/mman.h)
HOLE_START = 0xC000_0000
HOLE_END = 0x1_0000_0000


class Region(NamedTuple):
    """A part of RAM: ``size`` bytes at guest address ``start``, at ``host`` in this process.

    ``offset`` bytes of RAM come before it: where shared RAM lies in the memfd.
    """

    slot: int
    start: int
    size: int
    host: int
    view: memoryview
    offset: int = 0

    @property
    def end(self) -> int:
        """The first guest address after the region."""
        return self.start + self.size

    @property
    def delta(self) -> int:
        """The host address of a byte less its guest address."""
        return self.host - self.start


def layout(size: int) -> list[tuple[int, int]]:
    """Return (guest address, bytes) of each region of a guest with ``size`` bytes of RAM."""
    low = min(size, HOLE_START)
    return [(0, low)] + ([(HOLE_END, size - low)] if size > low else [])


class GuestMemory:
    """A guest's RAM: private to this process, or ``shared``, as a memfd others can map.

    Attributes:
        size: bytes.
        regions: the parts of RAM, from guest address 0 upwards.
        fd: the memfd of shared RAM; None for private RAM.

    Raises:
        ConfigError: ``size`` is not a multiple of 2 MiB, or the host does not give the memory.
    """

    def __init__(self, size: int, shared: bool = False) -> None:
        if size < 32 << 20 or size % HUGE:
            raise ConfigError(f"memory of {size} bytes; give at least 32M, a multiple of 2M")
        self.size = size
        self.regions: list[Region] = []
        self.fd: int | None = None
        self._maps: list[mmap.mmap] = []
        #: Parts of RAM that are a file's until written: host address, bytes, file, offset there.
        self._backed: list[tuple[int, int, int, int]] = []
        self._dirty: set[int] | None = None
        self._dirty_lock = threading.Lock()
        try:
            if shared:
                self.fd = memory.sealed_memfd("godwit-guest-ram", size)
            for slot, (start, length) in enumerate(layout(size)):
                self.regions.append(self._allocate(slot, start, length))
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise ConfigError(
                f"the host does not give {size >> 20} MiB for the guest: {error}; "
                "ask for less with --memory"
            ) from error

    def _allocate(self, slot: int, start: int, length: int) -> Region:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # 2 MiB more than asked, so that guest and host addresses agree modulo a huge page.
        mapping = mmap.mmap(-1, length + HUGE, flags=flags)
        self._maps.append(mapping)
        whole = memoryview(mapping)
        before = -address_of(whole) % HUGE
        view = whole[before : before + length]
        host = address_of(view)
        offset = sum(region.size for region in self.regions)
        if self.fd is not None:
            memory.map_shared(host, length, self.fd, offset)
        # For a memfd where shmem_enabled is 'advise' (Documentation/admin-guide/mm/transhuge.rst).
        memory.advise_huge(host, length)
        return Region(slot, start, length, host, view, offset)

    # --- pages that exist -------------------------------------------------------------------------
    def populated(self) -> list[tuple[int, int]]:
        """Return the pages that exist, as (guest address, pages). All others are zeros.

        Pages of shared RAM another process alone has used count as well.

        Raises:
            HostError, OSError: the kernel does not answer.
        """
        from godwit.host import pagemap  # only migrations ask

        runs: list[tuple[int, int]] = []
        for region in self.regions:
            if self.fd is None:
                base, found = region.host, pagemap.populated(region.host, region.size)
                if self._backed:
                    found = self._with_file(region, found)
            else:
                base = region.offset
                found = pagemap.populated_file(self.fd, region.offset, region.size)
            for at, pages in found:
                address = region.start + at - base
                if runs and runs[-1][0] + runs[-1][1] * PAGE == address:
                    runs[-1] = runs[-1][0], runs[-1][1] + pages
                else:
                    runs.append((address, pages))
        return runs

    def _with_file(self, region: Region, found: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return present pages, by host address, and the file's pages as well."""
        from godwit.host import pagemap

        for host, size, fd, at in self._backed:
            if region.host <= host < region.host + region.size:
                for place, pages in pagemap.populated_file(fd, at, size):
                    found.append((host + place - at, pages))
        merged: list[tuple[int, int]] = []
        for host, pages in sorted(found):
            if merged and host <= merged[-1][0] + merged[-1][1] * PAGE:
                first, count = merged[-1]
                merged[-1] = first, max(count, (host - first) // PAGE + pages)
            else:
                merged.append((host, pages))
        return merged

    def back_by_file(self, fd: int, at: int, parts: Iterable[tuple[int, int]]) -> None:
        """Make parts of private RAM, (offset in RAM, bytes), a file's, until they are written.

        RAM is ``at`` in the file, which stays open and as it is until :meth:`leave_file` or the
        end.

        Raises:
            OSError: the kernel refuses.
        """
        for offset, length in parts:
            for region in self.regions:
                first = max(offset, region.offset)
                size = min(offset + length, region.offset + region.size) - first
                if size > 0:
                    host = region.host + first - region.offset
                    memory.map_private(host, size, fd, at + first)
                    self._backed.append((host, size, fd, at + first))

    def leave_file(self) -> None:
        """Copy the parts of RAM that are a file's, while nobody writes RAM, to need no file.

        Raises:
            OSError: the kernel refuses.
        """
        while self._backed:
            host, size, _, _ = self._backed[-1]
            for start in range(host, host + size, _COPIED):
                memory.make_private(start, min(_COPIED, host + size - start))
            self._backed.pop()

    def populate(self, host: int, size: int) -> None:
        """Populate ``size`` bytes at ``host`` of this process, before they are used."""
        memory.populate(host, size)

    def discard(self, host: int, size: int) -> None:
        """Give ``size`` bytes at ``host`` of this process back, which then read as zeros."""
        if self._backed:  # the file's pages would come back
            memory.map_zeros(host, size)
        else:
            memory.discard(host, size, shared=self.fd is not None)

    # --- access -----------------------------------------------------------------------------------

    def address_of(self, offset: int) -> int:
        """Return the guest address of a byte of RAM, counted without the hole.

        Raises:
            GuestError: there is no such byte.
        """
        for region in self.regions:
            if region.offset <= offset < region.offset + region.size:
                return region.start + offset - region.offset
        raise GuestError(f"RAM has no byte {offset:#x}")

    def offset_of(self, address: int) -> int:
        """Return which byte of RAM is at a guest address, counted without the hole.

        Raises:
            GuestError: the address is not RAM.
        """
        for region in self.regions:
            if region.start <= address < region.end:
                return region.offset + address - region.start
        raise GuestError(f"guest address {address:#x} is not in its RAM")

    def view(self, address: int, length: int) -> memoryview:
        """Return the bytes of RAM themselves, for reading.

        Raises:
            GuestError: some of the bytes are not RAM.
        """
        for region in self.regions:
            offset = address - region.start
            if offset >= 0 and offset + length <= region.size:
                if length < 0:
                    break
                return region.view[offset : offset + length]
        raise GuestError(f"guest address {address:#x}+{length:#x} is not in its RAM")

    def views(self, runs: Iterable[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of runs of pages, (guest address, pages).

        Raises:
            GuestError: some of the bytes are not RAM.
        """
        found = []
        # From 0 on, and nearly always all there is; none of it is left once it was closed.
        low = self.regions[0].view if self.regions else memoryview(b"")
        size = len(low)
        for address, pages in runs:
            stop = address + pages * PAGE
            inside = 0 <= address < stop <= size
            found.append(low[address:stop] if inside else self.view(address, pages * PAGE))
        return found

    def region(self, low: int, end: int) -> Region | None:
        """Return the region that has all guest addresses from ``low`` to ``end``, if one has."""
        for region in self.regions:
            if end <= region.end:
                return region if region.start <= low else None
        return None

    def writable(self, address: int, length: int) -> memoryview:
        """Return the bytes of RAM themselves, for writing before the next round.

        The pages are marked dirty now.

        Raises:
            GuestError: some of the bytes are not RAM.
        """
        view = self.view(address, length)
        self.mark_dirty(address, length)
        return view

    def read(self, address: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes.

        Raises:
            GuestError: some of the bytes are not RAM.
        """
        return bytes(self.view(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into RAM at ``address``.

        Raises:
            GuestError: some of the bytes are not RAM.
        """
        view = self.view(address, len(data))
        view[:] = data
        self.mark_dirty(address, len(data))

    def start_log(self) -> None:
        """Begin to note the pages the VMM writes."""
        self._dirty = set()

    def stop_log(self) -> None:
        """Note no more pages the VMM writes."""
        self._dirty = None

    def take_log(self) -> set[int]:
        """Return the page numbers (guest address / 4096) written since the last call."""
        with self._dirty_lock:
            taken = self._dirty
            if taken is None:
                return set()
            self._dirty = set()
            return taken

    @property
    def logging(self) -> bool:
        """True while a migration logs the pages that the VMM writes."""
        return self._dirty is not None

    def mark_dirty(self, address: int, length: int) -> None:
        """Note that the VMM wrote to these pages, if a migration logs."""
        if self._dirty is None:
            return
        with self._dirty_lock:
            if self._dirty is not None:
                self._dirty.update(range(address // PAGE, (address + length - 1) // PAGE + 1))

    def clear(self) -> None:
        """Make all of RAM zeros again, as after power-on."""
        for region in self.regions:
            self.discard(region.host, region.size)
        self._backed.clear()

    def close(self) -> None:
        """Give the memory back, of which no view may be in use."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        for region in self.regions:
            region.view.release()
        self.regions.clear()
        for mapping in self._maps:
            try:
                mapping.close()
            except BufferError:
                # A ctypes view of it still lives: the process' end frees it.
                pass
