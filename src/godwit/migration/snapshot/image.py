"""A snapshot's file while being written: pages at their places, then checksums, index, and header.

Checksums are of the file's bytes, read back chunk by chunk: no guest has to stand still for them,
and earlier versions of a page do not matter.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from godwit.errors import LinkLost
from godwit.hw.memory import PAGE, GuestMemory

from ..wire.messages import Run
from . import format
from .compression import Compress
from .format import CHUNK, RAM_AT, Header

_ZEROS = bytes(CHUNK)


class Guest(NamedTuple):
    """A guest in a file, all but its RAM."""

    machine: str
    hello: bytes
    state: bytes
    running: bool


class Image:
    """An uncompressed snapshot in the open file ``fd``, called ``name``, of a guest's ``memory``.

    Attributes:
        written: bytes of pages written.
    """

    def __init__(self, fd: int, name: str, memory: GuestMemory) -> None:
        self.fd = fd
        self.written = 0
        self._name = name
        self._memory = memory
        self._chunks: dict[int, int] = {}  # number -> checksum
        self._stale: set[int] = set()
        self._held: list[tuple[Run, bytes]] = []
        self._space = 0  # for pages to hold, bytes

    # --- pages ------------------------------------------------------------------------------------
    def hold(self, most: int) -> None:
        """Copy pages, up to ``most`` bytes, and write them at :meth:`release`.

        For a guest that stands still. All beyond ``most`` is written at once.
        """
        self._space = most

    def release(self) -> None:
        """Write the pages held until now.

        Raises:
            LinkLost: the file cannot be written.
        """
        self._space = 0
        held, self._held = self._held, []
        for run, data in held:
            self._write(run, memoryview(data))

    def put(self, runs: Sequence[Run]) -> None:
        """Take pages as they are now.

        Raises:
            LinkLost: the file cannot be written.
        """
        for run, view in zip(runs, self._memory.views(runs), strict=True):
            self.written += len(view)
            if len(view) <= self._space:
                self._held.append((run, bytes(view)))
                self._space -= len(view)
            else:
                self._write(run, view)

    def _write(self, run: Run, data: memoryview) -> None:
        address, pages = run
        at = self._memory.offset_of(address)
        self._stale.update(range(at // CHUNK, (at + pages * PAGE - 1) // CHUNK + 1))
        self._put(data, RAM_AT + at)

    # --- what makes the file whole ----------------------------------------------------------------
    def checksum(self, check: Callable[[], None]) -> None:
        """Look at each chunk written since the last call, and keep its checksum.

        ``check`` is called between two chunks, and may raise.

        Raises:
            LinkLost: the file cannot be read.
        """
        buffer = memoryview(bytearray(CHUNK))
        for number in sorted(self._stale):
            check()
            self._get(buffer, RAM_AT + number * CHUNK)
            self._chunks[number] = zlib.crc32(buffer)
        self._stale.clear()

    def finish(self, guest: Guest, check: Callable[[], None]) -> None:
        """Write checksums, index and header, with which the file is whole, and have it on the disk.

        Raises:
            LinkLost: the file cannot be written.
        """
        self.checksum(check)
        size = self._memory.size
        table = (
            (CHUNK, self._chunks[number]) if number in self._chunks else (0, 0)
            for number in range(size // CHUNK)
        )
        _finish(self._put, "", guest, size, RAM_AT + size, table)
        self.sync()

    def compress(
        self, fd: int, guest: Guest, compress: Compress, check: Callable[[], None]
    ) -> None:
        """Write a compressed snapshot like this one into another file.

        Raises:
            LinkLost: one of the files cannot be read or written.
        """
        buffer = memoryview(bytearray(CHUNK))
        numbers = self._stale | self._chunks.keys()
        target = Image(fd, self._name, self._memory)
        size, at = self._memory.size, format.PAGE
        table: list[tuple[int, int]] = []
        for number in range(size // CHUNK):
            check()
            stored = b""
            if number in numbers:
                self._get(buffer, RAM_AT + number * CHUNK)
                stored = b"" if _ZEROS.startswith(buffer) else compress(buffer)
            target._put(memoryview(stored), at)
            table.append((len(stored), zlib.crc32(stored)))
            at += len(stored)
        _finish(target._put, "zstd", guest, size, at, table)
        target.sync()

    def sync(self) -> None:
        """Have all written bytes on the disk.

        Raises:
            LinkLost: the file cannot be written.
        """
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise self._lost("write", error) from error

    # --- bytes ------------------------------------------------------------------------------------
    def _put(self, data: memoryview, at: int) -> None:
        try:
            while len(data):
                done = os.pwrite(self.fd, data, at)
                data, at = data[done:], at + done
        except OSError as error:
            raise self._lost("write", error) from error

    def _get(self, buffer: memoryview, at: int) -> None:
        """Fill a buffer from the file, with zeros behind its end."""
        try:
            while len(buffer):
                got = os.preadv(self.fd, [buffer], at)
                if not got:
                    buffer[:] = bytes(len(buffer))
                buffer, at = buffer[got or len(buffer) :], at + got
        except OSError as error:
            raise self._lost("read", error) from error

    def _lost(self, what: str, error: OSError) -> LinkLost:
        return LinkLost(f"cannot {what} '{self._name}': {error.strerror}")


def _finish(
    put: Callable[[memoryview, int], None],
    compression: str,
    guest: Guest,
    memory: int,
    at: int,
    table: Iterable[tuple[int, int]],
) -> None:
    """Write index and header of a file whose RAM ends ``at``."""
    chunks = format.encode_chunks(iter(table))
    index = format.encode_index(format.Index(guest.hello, guest.state, guest.running, chunks))
    put(memoryview(index), at)
    header = Header(compression, guest.machine, memory, at, len(index), zlib.crc32(index))
    put(memoryview(format.encode_header(header)), 0)
