"""A snapshot's file being read: header and index first, then RAM, each chunk checked.

A file is trusted as little as a peer. The RAM of the machine that takes the guest bounds what is
kept of the file.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from godwit.errors import ConfigError, GodwitError, StreamError
from godwit.host import pagemap, sandbox
from godwit.hw.memory import GuestMemory
from godwit.spec import machine_types

from . import format
from .format import CHUNK, PAGE, RAM_AT, Chunk, Header, Index

_ZEROS = bytes(CHUNK)


class Snapshot:
    """An open snapshot, whose header and index :meth:`look` reads.

    Attributes:
        path: the file's path.
        fd: a descriptor for reading.

    Raises:
        ConfigError: the file cannot be read.
    """

    header: Header
    index: Index

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Non-blocking, so that a pipe that nobody writes is opened, and found to be no file.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(
                f"cannot read the snapshot '{path}': {error.strerror}{sandbox.hint(error)}"
            ) from error
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            self.close()
            raise ConfigError(f"cannot read the snapshot '{path}': it is no regular file")
        self._chunks: list[Chunk] = []
        self._data: list[tuple[int, int]] = []

    def close(self) -> None:
        """Close the descriptor of the file, harmlessly if done before."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def look(self, machine: str, memory: int) -> None:
        """Read and check everything but RAM, for a machine of this type with so many bytes of RAM.

        Raises:
            StreamError: no snapshot of such a machine, or an altered one, or part of one.
        """
        self.header = header = format.decode_header(self._read(0, PAGE, exact=False))
        _check_machine(header, machine, memory)
        size = os.fstat(self.fd).st_size
        if header.index_length > format.most_index(memory):
            raise StreamError(f"its index has {header.index_length} bytes, which is too long")
        if size != header.end:
            what = "not whole" if size < header.end else "longer than it was"
            raise StreamError(f"it ends at offset {size}, and not at {header.end}: it is {what}")
        payload = self._read(header.index_at, header.index_length)
        self.index, self._chunks = format.decode_index(payload, header)
        if not header.compression:
            self._data = _data(self.fd, header.index_at)
            self._check_zeros(PAGE, RAM_AT)

    # --- RAM --------------------------------------------------------------------------------------
    @property
    def used(self) -> list[Chunk]:
        """The stored chunks, in their order. All others are zeros."""
        return [chunk for chunk in self._chunks if chunk.length]

    def read_ram(self, memory: GuestMemory, check: Callable[[], None]) -> None:
        """Read all of RAM into ``memory``, which has zeros, and check every chunk there.

        ``check`` is called between two chunks, and may raise.

        Raises:
            StreamError: a chunk was altered; the message names it.
        """
        take = self._take_compressed() if self.header.compression else self._take
        for chunk in self._chunks:
            check()
            if chunk.length:
                take(chunk, memory.view(memory.address_of(chunk.number * CHUNK), CHUNK))
            elif not self.header.compression:
                self._check_zeros(chunk.offset, chunk.offset + CHUNK)

    def check_ram(self, check: Callable[[], None]) -> None:
        """Check all of RAM, of an uncompressed file, without a copy, as :meth:`read_ram` does."""
        buffer = memoryview(bytearray(CHUNK))
        for chunk in self._chunks:
            check()
            if chunk.length:
                self._fill(buffer, chunk.offset)
                self._compare(chunk, buffer)
            else:
                self._check_zeros(chunk.offset, chunk.offset + CHUNK)

    def _take(self, chunk: Chunk, view: memoryview) -> None:
        # What is a hole there takes no memory here.
        for at, end in _within(self._data, chunk.offset, chunk.offset + CHUNK):
            self._fill(view[at - chunk.offset : end - chunk.offset], at)
        self._compare(chunk, view)

    def _take_compressed(self) -> Callable[[Chunk, memoryview], None]:
        from .compression import decompressor

        decompress = decompressor()

        def take(chunk: Chunk, view: memoryview) -> None:
            stored = self._read(chunk.offset, chunk.length)
            self._compare(chunk, stored)
            try:
                decompress(stored, view)
            except StreamError as error:
                raise StreamError(f"{_place(chunk)}: {error}") from error

        return take

    def _compare(self, chunk: Chunk, data: bytearray | memoryview) -> None:
        if zlib.crc32(data) != chunk.crc:
            raise StreamError(f"{_place(chunk)} was altered: the checksum differs")

    def _check_zeros(self, start: int, end: int) -> None:
        """Check a part of the file for zeros: a hole, unless the file was copied."""
        for first, last in _within(self._data, start, end):
            for at in range(first, last, CHUNK):
                found = self._read(at, min(CHUNK, last - at))
                if not _ZEROS.startswith(found):
                    raise StreamError(f"it was altered at offset {at}: zeros were there")

    # --- bytes ------------------------------------------------------------------------------------
    def _read(self, at: int, length: int, exact: bool = True) -> bytearray:
        data = bytearray(length)
        got = self._fill(memoryview(data), at, exact)
        return data[:got]

    def _fill(self, view: memoryview, at: int, exact: bool = True) -> int:
        """Fill a buffer from the file, and return the number of bytes found."""
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self.fd, [view[done:]], at + done)
                if not got:
                    break
                done += got
        except OSError as error:
            raise StreamError(
                f"it cannot be read at offset {at + done}: {error.strerror}"
            ) from error
        if exact and done < len(view):
            raise StreamError(f"it ends at offset {at + done}: it is not whole")
        return done


def _place(chunk: Chunk) -> str:
    return f"its chunk {chunk.number} of RAM (offset {chunk.offset})"


def _check_machine(header: Header, machine: str, memory: int) -> None:
    if header.machine not in machine_types.names():
        raise StreamError(
            f"it is of machine type '{header.machine}', which this Godwit does not know: "
            "a newer one made it; restore it with that"
        )
    if header.machine != machine:
        raise StreamError(
            f"it is of machine type '{header.machine}', and this VM is a '{machine}'; "
            f"give --machine {header.machine}"
        )
    if header.memory != memory:
        raise StreamError(
            f"it has {header.memory >> 20} MiB of RAM, and this VM {memory >> 20} MiB; "
            f"give --memory {header.memory >> 20}M"
        )


def _data(fd: int, end: int) -> list[tuple[int, int]]:
    """Return (start, end) of each part of a file between holes."""
    try:
        found = pagemap.populated_file(fd, 0, end)
    except OSError:  # a file system that does not know
        return [(0, end)]
    return [(at, at + pages * PAGE) for at, pages in found]


def _within(parts: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return what of ``parts``, which are in order, is between ``start`` and ``end``."""
    from bisect import bisect_right

    found = []
    for first, last in parts[max(0, bisect_right(parts, (start, end)) - 1) :]:
        if first >= end:
            break
        if last > start:
            found.append((max(first, start), min(last, end)))
    return found


def named(path: Path, error: GodwitError) -> StreamError:
    """Return an error of a file's content with the file's name."""
    return StreamError(f"the snapshot '{path}' is refused: {error}")
