"""A back end of vhost-user in a thread: a disk whose sectors have their numbers, or what is worse.

It speaks the back end's side of QEMU's docs/interop/vhost-user.rst by itself, with a map of the
guest's memory of its own.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
from collections.abc import Callable
from struct import Struct, pack, unpack

from godwit.errors import HostError

_HEADER = Struct("=III")
_DESC = Struct("<QIHH")
GET_FEATURES, SET_FEATURES, SET_MEM_TABLE, SET_LOG_BASE = 1, 2, 5, 6
SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL = 8, 9, 10, 11, 12, 13
GET_PROTOCOL, SET_PROTOCOL, GET_QUEUE_NUM, SET_ENABLE, SET_BACKEND_FD = 15, 16, 17, 18, 21
GET_CONFIG, GET_INFLIGHT, SET_INFLIGHT = 24, 31, 32
PROTOCOL = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12
FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 26 | 1 << 9 | 1 << 6 | 1 << 12
SECTORS = 2048


class Ring:
    """A ring as the messages have set it up."""

    def __init__(self) -> None:
        self.size = self.base = self.flags = self.log_at = 0
        self.places = (0, 0, 0)  # descriptors, used, avail, in the VMM's addresses
        self.kick = self.call = -1
        self.enabled = False


class FakeBackEnd:
    """A back end that serves one connection at a time, until :meth:`kill`.

    Attributes:
        hold: requests are taken from the rings, and not finished.
        backwards: the newest request that was taken is finished first.
        sessions: the connections, ended ones too.
        answers: by request, what is answered in place of the right payload; None: nothing.
        dies_at: the request at which the connection is closed.
        got: the requests that came.
        done: the heads of finished requests.
    """

    def __init__(self, protocol: int = PROTOCOL, features: int = FEATURES) -> None:
        self.protocol, self.features = protocol, features
        self.config = pack("<Q", SECTORS) + bytes(52)
        self.hold = self.backwards = False
        self.answers: dict[int, bytes | None] = {}
        self.dies_at: int | None = None
        self.got: list[int] = []
        self.done: list[int] = []
        self.alive = True
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._peers: list[socket.socket] = []
        self.sessions: list[Session] = []

    @property
    def taken(self) -> int:
        """The number of requests that were taken, and are not finished."""
        return sum(len(session.taken) for session in self.sessions)

    def connect(self) -> socket.socket:
        """Return the VMM's end of a new connection.

        Raises:
            HostError: the back end is dead.
        """
        with self._lock:
            return self._connect()

    def _connect(self) -> socket.socket:
        if not self.alive:
            raise HostError("Connection refused")
        ours, theirs = socket.socketpair()
        self._peers.append(theirs)
        session = Session(self, theirs)
        self.sessions.append(session)
        thread = threading.Thread(target=session.run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return ours

    def kill(self) -> None:
        """Close all connections, and take no others."""
        with self._lock:
            self.alive = False
        for peer in self._peers:
            with_no_error(lambda peer=peer: peer.shutdown(socket.SHUT_RDWR))  # type: ignore[misc]
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def revive(self) -> None:
        """Take connections again."""
        self._peers.clear()
        self._threads.clear()
        self.sessions.clear()
        self.alive = True


def with_no_error(act: Callable[[], None]) -> None:
    """Do what may fail because the other side was quicker."""
    try:
        act()
    except OSError:
        pass


class Session:
    """One connection: its memory, its rings, its record of requests in flight."""

    def __init__(self, owner: FakeBackEnd, peer: socket.socket) -> None:
        self._owner, self._peer = owner, peer
        self._regions: list[tuple[int, int, int, mmap.mmap, int]] = []
        self._rings: dict[int, Ring] = {}
        self._log: mmap.mmap | None = None
        self._features = 0
        self._backend_fd = -1
        self.taken: list[tuple[int, int]] = []

    def run(self) -> None:
        """Serve until the connection ends."""
        try:
            while True:
                kicks = {ring.kick: ring for ring in self._rings.values() if ring.kick >= 0}
                ready, _, _ = select.select([self._peer.fileno(), *kicks], [], [], 0.02)
                if self._peer.fileno() in ready and not self._message():
                    return
                for fd in ready:
                    if fd in kicks and kicks[fd].kick >= 0:
                        with_no_error(lambda fd=fd: os.eventfd_read(fd) and None)  # type: ignore
                self._serve()
        except (OSError, ValueError):
            return
        finally:
            self._peer.close()
            self._regions.clear()
            for ring in self._rings.values():
                for fd in (ring.kick, ring.call):
                    if fd >= 0:
                        os.close(fd)
            if self._backend_fd >= 0:
                os.close(self._backend_fd)

    def send_own(self, request: int) -> None:
        """Send a message of the back end's own."""
        self.send_own_bytes(_HEADER.pack(request, 1, 0))

    def send_own_bytes(self, data: bytes) -> None:
        """Send bytes where the back end's own messages are expected."""
        os.write(self._backend_fd, data)

    # --- messages ---------------------------------------------------------------------------------
    def _message(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._peer, _HEADER.size, 8)
        if len(data) < _HEADER.size:
            return False
        request, flags, size = _HEADER.unpack(data)
        assert flags == 1
        body = b""
        while len(body) < size:
            body += self._peer.recv(size - len(body))
        self._owner.got.append(request)
        if request == self._owner.dies_at:
            for fd in fds:
                os.close(fd)
            return False
        answer = self._handle(request, body, fds)
        if request in self._owner.answers:
            answer = self._owner.answers[request]
        if answer is not None:
            out, more = answer if isinstance(answer, tuple) else (answer, [])
            socket.send_fds(self._peer, [_HEADER.pack(request, 5, len(out)) + out], more)
            for fd in more:
                os.close(fd)
        return True

    def _handle(
        self, request: int, body: bytes, fds: list[int]
    ) -> bytes | tuple[bytes, list[int]] | None:
        ring = self._ring(body) if SET_NUM <= request <= SET_CALL or request == SET_ENABLE else None
        if request == GET_FEATURES:
            return pack("=Q", self._owner.features)
        if request == GET_PROTOCOL:
            return pack("=Q", self._owner.protocol)
        if request == GET_QUEUE_NUM:
            return pack("=Q", 4)
        if request == SET_FEATURES:
            (self._features,) = unpack("=Q", body)
            if self._features & ~self._owner.features:
                raise ValueError(f"features {self._features:#x}")
        elif request == SET_MEM_TABLE:
            self._map(body, fds)
        elif request == SET_LOG_BASE:
            size, offset = unpack("=QQ", body)
            assert offset == 0
            self._log = mmap.mmap(fds[0], size)
            os.close(fds[0])
            return pack("=Q", 0)
        elif request == SET_BACKEND_FD:
            (self._backend_fd,) = fds
        elif request == GET_CONFIG:
            offset, size, _ = unpack("=III", body[:12])
            return body[:12] + self._owner.config[offset : offset + size]
        elif request == GET_INFLIGHT:
            fd = os.memfd_create("inflight")
            os.ftruncate(fd, 8192)
            return pack("=QQHH4x", 8192, 0, *unpack("=HH", body[16:20])), [fd]
        elif request == SET_INFLIGHT:
            os.close(fds[0])
        elif ring is not None:
            return self._handle_ring(request, ring, body, fds)
        return None

    def _ring(self, body: bytes) -> Ring:
        return self._rings.setdefault(body[0], Ring())

    def _handle_ring(self, request: int, ring: Ring, body: bytes, fds: list[int]) -> bytes | None:
        if request == SET_NUM:
            ring.size = unpack("=II", body)[1]
        elif request == SET_BASE:
            ring.base = unpack("=II", body)[1]
        elif request == SET_ADDR:
            _, ring.flags, *places, ring.log_at = unpack("=IIQQQQ", body)
            ring.places = (places[0], places[1], places[2])
        elif request == SET_KICK:
            self._replace(ring, "kick", fds)
        elif request == SET_CALL:
            self._replace(ring, "call", fds)
        elif request == SET_ENABLE:
            ring.enabled = unpack("=II", body)[1] == 1
        elif request == GET_BASE:
            self._replace(ring, "kick", [])
            self._replace(ring, "call", [])
            ring.enabled = False
            return pack("=II", body[0], ring.base)
        return None

    def _replace(self, ring: Ring, name: str, fds: list[int]) -> None:
        old = getattr(ring, name)
        if old >= 0:
            os.close(old)
        setattr(ring, name, fds[0] if fds else -1)

    def _map(self, body: bytes, fds: list[int]) -> None:
        count = unpack("=II", body[:8])[0]
        for index, fd in zip(range(count), fds, strict=True):
            guest, size, user, offset = unpack("=QQQQ", body[8 + 32 * index : 40 + 32 * index])
            self._regions.append((guest, size, user, mmap.mmap(fd, offset + size), offset))
            os.close(fd)

    # --- rings ------------------------------------------------------------------------------------
    def _view(self, address: int, length: int, of_guest: bool) -> memoryview:
        for guest, size, user, map, offset in self._regions:
            at = address - (guest if of_guest else user)
            if at >= 0 and at + length <= size:
                return memoryview(map)[offset + at : offset + at + length]
        raise ValueError(f"{address:#x}+{length:#x} is not in memory")

    def _serve(self) -> None:
        for ring in self._rings.values():
            if ring.enabled and ring.kick >= 0:
                self._take(ring)
        if not self._owner.hold:
            taken, self.taken = self.taken, []
            if self._owner.backwards:
                taken.reverse()
            for index, head in taken:
                self._finish(self._rings[index], head)

    def _take(self, ring: Ring) -> None:
        avail = self._view(ring.places[2], 4 + 2 * ring.size, False).cast("H")
        index = next(i for i, one in self._rings.items() if one is ring)
        while (pending := avail[1] - ring.base & 0xFFFF) and pending <= ring.size:
            self.taken.append((index, avail[2 + ring.base % ring.size]))
            ring.base = ring.base + 1 & 0xFFFF

    def _finish(self, ring: Ring, head: int) -> None:
        parts = self._chain(ring, head)
        (sector,) = unpack("<8xQ", bytes(self._view(*parts[0][:2], True)[:16]))
        written = 0
        for address, length, write in parts[1:]:
            if write:
                view = self._view(address, length, True)
                view[:] = bytes(length) if length == 1 else pack("<Q", sector).ljust(length, b"\0")
                self._mark(address, length)
                written += length
        used = self._view(ring.places[1], 4 + 8 * ring.size, False)
        index = used.cast("H")[1]
        used[4 + 8 * (index % ring.size) :][:8] = pack("<II", head, written)
        used.cast("H")[1] = index + 1 & 0xFFFF
        if ring.flags & 1:
            self._mark(ring.log_at, 4 + 8 * ring.size)
        self._owner.done.append(head)
        if ring.call >= 0:
            os.eventfd_write(ring.call, 1)

    def _chain(self, ring: Ring, head: int) -> list[tuple[int, int, bool]]:
        table = self._view(ring.places[0], 16 * ring.size, False)
        parts, at = [], head
        while True:
            address, length, flags, following = _DESC.unpack_from(table, 16 * at)
            parts.append((address, length, bool(flags & 2)))
            if not flags & 1:
                return parts
            at = following

    def _mark(self, address: int, length: int) -> None:
        if self._log is not None and self._features & 1 << 26:
            for page in range(address // 4096, (address + length - 1) // 4096 + 1):
                self._log[page // 8] |= 1 << page % 8
