"""A disk request: parsed from a buffer of the guest's, done on an image (virtio 1.2, 5.2.6)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from godwit.errors import GuestError
from godwit.host import iovec
from godwit.host.image import SECTOR, Image
from godwit.host.iovec import Vector
from godwit.hw.virtio.chain import Chain
from godwit.hw.virtio.straight import StraightChain

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPPORTED = 0, 1, 2

_HEADER = Struct("<I4xQ")  # type, sector
#: Bytes of a header, and of a status.
_ENDS = _HEADER.size, 1
_NOTHING = Vector(b"", 0)
_SEGMENT = Struct("<QII")  # sector, sectors, flags
_UNMAP = 1
ID_SIZE = 20
#: Bytes that one request may move at the most: Linux asks for no more than a few MB.
MOST = 64 << 20
#: Seconds of a request that waited for nothing, and bytes a second on top: a read of cached data, a
#: write that the kernel did not hold up because too much is to be written back.
_READ, _WRITE = (0.0005, 250e6), (0.020, 50e6)
#: Requests that are handed over once one has taken longer.
_HANDED_OVER = 64
#: Segments of a discard or write zeroes, and sectors of each.
MAX_SEGMENTS, MAX_DISCARD, MAX_ZEROES = 16, 1 << 22, (64 << 20) // SECTOR


class Request(NamedTuple):
    """A request of queue ``queue``: what to do, where, and the guest's memory for that."""

    queue: int
    chain: Chain
    kind: int
    sector: int
    #: The guest's data that is written to the disk, and the memory that is filled from there.
    outward: Vector
    inward: Vector
    #: Keeps guest memory mapped, too.
    status: memoryview

    @property
    def operation(self) -> str:
        """The operation's name in QMP: read or write."""
        return "read" if self.kind in (IN, GET_ID) else "write"


class Done(NamedTuple):
    """The end of a request: status, and bytes written to guest memory before the status."""

    request: Request
    status: int
    written: int = 0


class Failed(NamedTuple):
    """The end of a request that the host could not do."""

    request: Request
    error: OSError
    #: Trying again is in vain: the kernel reports a lost write once, and each flush fails then.
    final: bool = False


def parse(queue: int, chain: Chain) -> Request:
    """Return the request of a buffer, whose header is read once.

    Raises:
        GuestError: there is no space for a header or a status.
    """
    if isinstance(chain, StraightChain) and chain.ends == _ENDS:
        # The form of Linux's driver: header and status are parts of their own.
        first = chain.first
        if 0 < first < chain.pieces:
            kind, sector = chain.header(_HEADER)
            data, space = (_NOTHING, chain.inner()) if first == 1 else (chain.inner(), _NOTHING)
            return Request(queue, chain, kind, sector, data, space, chain.last())
    header, readable = _split(chain.readable)
    kind, sector = _HEADER.unpack_from(header)
    writable = list(chain.writable)
    while writable and not len(writable[-1]):
        writable.pop()
    if not writable:
        raise GuestError("a request without space for its status")
    last = writable.pop()
    writable.append(last[:-1])
    data, space = Vector.of(readable), Vector.of(writable)
    return Request(queue, chain, kind, sector, data, space, last[-1:])


def _split(parts: Sequence[memoryview]) -> tuple[bytes, list[memoryview]]:
    """Return a request's header, and what follows.

    Raises:
        GuestError: all of it is shorter than a header.
    """
    header, left = b"", []
    for part in parts:
        need = _HEADER.size - len(header)
        header += part[:need]
        left.append(part[need:])
    if len(header) < _HEADER.size:
        raise GuestError(f"a request with a header of {len(header)} bytes, not {_HEADER.size}")
    return header, left


class Guess:
    """A guess whether the next request is worth a change of threads, by how long the last took.

    Each change costs some tens of microseconds, and two threads at one file wait for each other.
    """

    def __init__(self, seconds: float, rate: float) -> None:
        self._seconds, self._rate = seconds, rate
        self._to_hand_over = 0

    def is_quick(self) -> bool:
        """Return whether the next request is taken to be done at once."""
        self._to_hand_over = max(0, self._to_hand_over - 1)
        return not self._to_hand_over

    def took(self, seconds: float, size: int) -> None:
        """Note how long a request of ``size`` bytes took."""
        if seconds > self._seconds + size / self._rate:
            self._to_hand_over = _HANDED_OVER + 1


class Doer:
    """The image and the identity of a disk, on which requests are done.

    Attributes:
        writes_through: what is written is on the disk at the end of its request.
    """

    def __init__(self, image: Image, identity: bytes, discards: bool) -> None:
        self._image = image
        self._identity = identity
        self._discards = discards
        self.writes_through = False
        #: The image's file system says whether a read would wait. On tmpfs none does.
        self._says = not image.in_memory
        self._reads, self._writes = Guess(*_READ), Guess(*_WRITE)

    def quick(self, request: Request) -> Done | Failed | None:
        """Do a request that does not wait for a disk, as far as is known, or return None.

        By one thread at a time.
        """
        kind = request.kind
        if self._image.direct or kind not in (GET_ID, IN, OUT):
            return None
        if kind == OUT and self.writes_through:
            return None
        if kind == IN and self._says:
            try:
                return self._read(request, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    return None
                if error.errno != errno.EOPNOTSUPP:
                    return Failed(request, error)
                self._says = False  # NFS, 9p, overlayfs
        if kind != OUT and self._image.in_memory:
            return self.do(request)
        if kind == OUT and self._image.is_written:
            return None  # it would wait for that write
        guess, data = self._reads, request.inward
        if kind == OUT:
            guess, data = self._writes, request.outward
        if not guess.is_quick():
            return None
        begun = time.monotonic()
        end = self.do(request)
        guess.took(time.monotonic() - begun, data.size)
        return end

    def do(self, request: Request) -> Done | Failed:
        """Do a request, however long it takes."""
        try:
            end = self._do(request)
        except OSError as error:
            return Failed(request, error)
        except MemoryError:  # of the host, for pieces that have to be copied
            return Failed(request, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
        writes = request.kind in (OUT, DISCARD, WRITE_ZEROES)
        if end.status or not (request.kind == FLUSH or (writes and self.writes_through)):
            return end
        try:
            self._image.flush()
        except OSError as error:
            return Failed(request, error, final=True)
        return end

    def _do(self, request: Request) -> Done:
        kind = request.kind
        if kind == IN:
            return self._read(request, 0)
        if kind == GET_ID:
            return self._identify(request)
        if kind not in (OUT, FLUSH, DISCARD, WRITE_ZEROES) or (
            kind == DISCARD and not self._discards
        ):
            return Done(request, UNSUPPORTED)
        if kind == FLUSH:
            return Done(request, OK)
        if self._image.readonly:
            return Done(request, IOERR)
        return self._write(request) if kind == OUT else self._clear(request)

    def _read(self, request: Request, flags: int) -> Done:
        if not self._inside(request.sector, request.inward):
            return Done(request, IOERR)
        self._image.read(request.sector * SECTOR, request.inward, flags)
        return Done(request, OK, request.inward.size)

    def _write(self, request: Request) -> Done:
        if not self._inside(request.sector, request.outward):
            return Done(request, IOERR)
        self._image.write(request.sector * SECTOR, request.outward)
        return Done(request, OK)

    def _inside(self, sector: int, data: Vector) -> bool:
        """Return whether data are whole blocks of the disk, not too long nor in too many pieces."""
        size, end = data.size, sector * SECTOR + data.size
        if data.pieces > iovec.MOST_PIECES:
            return False
        whole = not size % self._image.block and not sector * SECTOR % self._image.block
        return 0 < size <= MOST and whole and end <= self._image.size

    def _identify(self, request: Request) -> Done:
        written = request.inward.fill(bytearray(self._identity.ljust(ID_SIZE, b"\0")))
        return Done(request, OK, written)

    def _clear(self, request: Request) -> Done:
        """Execute a discard, or a write of zeroes, of all segments."""
        discard = request.kind == DISCARD
        size = request.outward.size
        if not size or size % _SEGMENT.size or size > MAX_SEGMENTS * _SEGMENT.size:
            return Done(request, IOERR)
        most = MAX_DISCARD if discard else MAX_ZEROES
        segments = list(_SEGMENT.iter_unpack(request.outward.read()))
        for sector, sectors, flags in segments:
            # 5.2.6.2: unknown bits, and unmap of a discard, are unsupported.
            if flags & ~(0 if discard else _UNMAP):
                return Done(request, UNSUPPORTED)
            if sectors > most or (sector + sectors) * SECTOR > self._image.size:
                return Done(request, IOERR)
        for sector, sectors, flags in segments:
            if not sectors:
                continue
            at, length = sector * SECTOR, sectors * SECTOR
            if discard:
                self._image.discard(at, length)
            else:
                self._image.write_zeroes(at, length, bool(flags & _UNMAP))
        return Done(request, OK)
