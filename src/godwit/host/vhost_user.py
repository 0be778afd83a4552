"""vhost-user: a device's rings served by another process, the back end (QEMU's vhost-user.rst).

The back end is hostile until checked: each answer has the expected request, flags and length, and
all of an operation has :data:`REPLY_S`, from :meth:`BackEnd.begin` on. Whatever goes wrong is a
HostError, after which the connection is useless.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from struct import Struct
from typing import NamedTuple

from godwit.errors import HostError

#: How long the back end may take for an operation, which is some requests and answers, seconds.
REPLY_S = 5.0
#: How long a connection may take to be accepted, seconds.
CONNECT_S = 1.0

_HEADER = Struct("=III")  # request, flags, size
_U64 = Struct("=Q")
_STATE = Struct("=II")  # vring state: index, num
_ADDRESS = Struct("=IIQQQQ")  # index, flags, descriptors, used, avail, log
_REGION = Struct("=QQQQ")  # guest address, size, user address, mmap offset
_LOG = Struct("=QQ")  # size, offset
_CONFIG = Struct("=III")  # offset, size, flags
_INFLIGHT = Struct("=QQHH4x")  # mmap size, mmap offset, queues, queue size

_VERSION, _REPLY, _NEED_REPLY = 1, 1 << 2, 1 << 3
_FLAGS = _VERSION | _REPLY
#: Descriptors of a message at the most (VHOST_MEMORY_BASELINE_NREGIONS).
_MOST_FDS = 8
#: Bytes of a back end's own message that are read.
_LONGEST = 4096

# Requests (VHOST_USER_*)
_GET_FEATURES, _SET_FEATURES, _SET_OWNER = 1, 2, 3
_SET_MEM_TABLE, _SET_LOG_BASE = 5, 6
_SET_NUM, _SET_ADDR, _SET_BASE, _GET_BASE, _SET_KICK, _SET_CALL = 8, 9, 10, 11, 12, 13
_GET_PROTOCOL, _SET_PROTOCOL, _GET_QUEUE_NUM, _SET_ENABLE = 15, 16, 17, 18
_SET_BACKEND_FD = 21
_GET_CONFIG = 24
_GET_INFLIGHT, _SET_INFLIGHT = 31, 32
#: The back end's own (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
_CONFIG_CHANGE = 2

F_PROTOCOL = 1 << 30
F_LOG_ALL = 1 << 26
# Protocol features (VHOST_USER_PROTOCOL_F_*)
P_MQ, P_LOG_SHMFD, P_REPLY_ACK = 1 << 0, 1 << 1, 1 << 3
P_BACKEND_REQ, P_CONFIG, P_INFLIGHT = 1 << 5, 1 << 9, 1 << 12
_KNOWN = P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_BACKEND_REQ | P_CONFIG | P_INFLIGHT
#: The largest area for requests in flight: 64 queues of 1,024 with 16 bytes each, and more.
_MOST_INFLIGHT = 4 << 20


class Inflight(NamedTuple):
    """The back end's record of requests in flight, in a file which outlives the back end."""

    fd: int
    size: int
    offset: int


def connect(path: str) -> socket.socket:
    """Return a connection to what listens at ``path``.

    Raises:
        HostError: nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(CONNECT_S)
        connection.connect(path)
    except (OSError, ValueError) as error:
        connection.close()
        raise HostError(getattr(error, "strerror", None) or str(error)) from error
    return connection


class BackEnd:
    """A back end behind a connection of ours: introduced, the features read.

    Attributes:
        features: feature bits that the back end offers.
        protocol: protocol features in use.
        fd: hung up when the back end is gone.
        requests: readable when the back end sends by itself; -1 for never.

    Raises:
        HostError: what answers is no back end.
    """

    def __init__(self, connection: socket.socket, reply_s: float = REPLY_S) -> None:
        self._reply_s = reply_s
        self.begin()
        self.requests = -1
        self._own: socket.socket | None = None
        self._socket = connection
        try:
            self._introduce()
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The descriptor of the connection."""
        return self._socket.fileno()

    def _introduce(self) -> None:
        self.features = self._get(_GET_FEATURES)
        self.protocol = 0
        if self.features & F_PROTOCOL:
            self.protocol = self._get(_GET_PROTOCOL) & _KNOWN
            self._send(_SET_PROTOCOL, _U64.pack(self.protocol))
        self._send(_SET_OWNER)
        if self.protocol & P_BACKEND_REQ:
            self._own, theirs = socket.socketpair()
            with theirs:
                self._send(_SET_BACKEND_FD, fds=[theirs.fileno()])
            self._own.setblocking(False)
            self.requests = self._own.fileno()

    def begin(self) -> None:
        """Begin an operation, whose time counts from now on."""
        self._until = time.monotonic() + self._reply_s

    # --- the device -------------------------------------------------------------------------------
    def queues(self) -> int | None:
        """Return how many queues the back end has at the most, or None if not known."""
        return self._get(_GET_QUEUE_NUM) if self.protocol & P_MQ else None

    def config(self, size: int) -> bytes:
        """Return the first bytes of the device's configuration space.

        Raises:
            HostError: the back end has none so long.
        """
        if not self.protocol & P_CONFIG:
            raise HostError("the back end shows no configuration (VHOST_USER_PROTOCOL_F_CONFIG)")
        head = _CONFIG.pack(0, size, 0)
        answer = self._ask(_GET_CONFIG, head + bytes(size), len(head) + size)
        if answer[: len(head)] != head:
            raise HostError("the back end answered with another part of the configuration")
        return answer[len(head) :]

    def set_features(self, features: int) -> None:
        """Set the feature bits in use. :data:`F_LOG_ALL` may change while rings are served."""
        self._send(_SET_FEATURES, _U64.pack(features | (self.features & F_PROTOCOL)))

    def set_memory(self, fd: int, regions: Sequence[tuple[int, int, int, int]]) -> None:
        """Give the back end guest memory, a file.

        A region is (guest address, bytes, address in this process, offset in the file).
        """
        body = _STATE.pack(len(regions), 0) + b"".join(_REGION.pack(*one) for one in regions)
        self._send(_SET_MEM_TABLE, body, [fd] * len(regions))

    def set_log(self, fd: int, size: int) -> None:
        """Set the file for the bitmap of written pages, from this call's return on."""
        self._send(_SET_LOG_BASE, _LOG.pack(size, 0), [fd])
        self._answer(_SET_LOG_BASE, None)

    def make_inflight(self, queues: int, size: int) -> Inflight | None:
        """Return a new record of requests in flight, or None if the back end keeps none."""
        if not self.protocol & P_INFLIGHT:
            return None
        self._send(_GET_INFLIGHT, _INFLIGHT.pack(0, 0, queues, size))
        answer, fds = self._receive(_GET_INFLIGHT, _INFLIGHT.size)
        try:
            length, offset, *_ = _INFLIGHT.unpack(answer)
            if len(fds) != 1 or not 0 < length <= _MOST_INFLIGHT or offset % mmap.PAGESIZE:
                raise HostError("the back end's record of requests in flight is none")
            return Inflight(fds.pop(), length, offset)
        finally:
            _close(fds)

    def set_inflight(self, inflight: Inflight, queues: int, size: int) -> None:
        """Hand the record over to a back end, which does again what is in flight there."""
        body = _INFLIGHT.pack(inflight.size, inflight.offset, queues, size)
        self._send(_SET_INFLIGHT, body, [inflight.fd])

    # --- rings ------------------------------------------------------------------------------------
    def start_ring(
        self, index: int, size: int, base: int, parts: tuple[int, int, int], kick: int
    ) -> None:
        """Set a ring up, with the addresses of descriptors, used and avail ring in this process."""
        self._send(_SET_NUM, _STATE.pack(index, size))
        self._send(_SET_BASE, _STATE.pack(index, base))
        self.set_addresses(index, parts, False, 0)
        self._send(_SET_KICK, _U64.pack(index), [kick])

    def set_addresses(
        self, index: int, parts: tuple[int, int, int], log: bool, used_in_guest: int
    ) -> None:
        """Set where a ring is. With ``log``, its used ring is logged as at that guest address."""
        self._send(_SET_ADDR, _ADDRESS.pack(index, int(log), *parts, used_in_guest))

    def set_call(self, index: int, fd: int) -> None:
        """Set the eventfd by which a ring interrupts the guest."""
        self._send(_SET_CALL, _U64.pack(index), [fd])

    def enable(self, indexes: Iterable[int]) -> None:
        """Have the back end serve the rings, and see what was sent before taken."""
        if self.features & F_PROTOCOL:
            for index in indexes:
                self._send(_SET_ENABLE, _STATE.pack(index, 1))
        self.settle()

    def settle(self) -> None:
        """Wait until the back end has done all that it was sent: requests are done in order."""
        self._get(_GET_FEATURES)

    def stop_ring(self, index: int) -> int:
        """Stop a ring, and return the position to go on from. Requests may still be in flight."""
        answer = self._ask(_GET_BASE, _STATE.pack(index, 0), _STATE.size)
        found, position = _STATE.unpack(answer)
        if found != index or position > 0xFFFF:
            raise HostError(f"the back end answered for ring {found} at {position}, not {index}")
        return int(position)

    # --- what the back end sends by itself --------------------------------------------------------
    def config_changed(self) -> bool:
        """Read one message of the back end's own, and return whether the configuration changed.

        Raises:
            HostError: what came is no message.
        """
        assert self._own is not None
        try:
            data, fds, _, _ = socket.recv_fds(self._own, _LONGEST, _MOST_FDS)
        except BlockingIOError:
            return False
        except OSError as error:
            raise HostError(f"the back end's own requests: {error.strerror}") from error
        _close(list(fds))
        if not data:
            raise HostError("the back end closed its own requests")
        if len(data) < _HEADER.size:
            raise HostError("the back end sent half a message")
        request, flags, size = _HEADER.unpack_from(data)
        if flags & 3 != _VERSION or _HEADER.size + size > len(data):
            raise HostError(f"the back end sent request {request} of {size} bytes, not whole")
        if flags & _NEED_REPLY:
            known = request == _CONFIG_CHANGE
            answer = _HEADER.pack(request, _FLAGS, _U64.size) + _U64.pack(0 if known else 1)
            with suppress(OSError):  # who does not read gets no answers
                self._own.send(answer)
        return bool(request == _CONFIG_CHANGE)

    def close(self) -> None:
        """Close the connection, unless closed already."""
        self._socket.close()
        if self._own is not None:
            self._own.close()

    # --- messages ---------------------------------------------------------------------------------
    def _get(self, request: int) -> int:
        return int(_U64.unpack(self._ask(request, b"", _U64.size))[0])

    def _ask(self, request: int, body: bytes, size: int) -> bytes:
        self._send(request, body)
        return self._answer(request, size)

    def _send(self, request: int, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        data = _HEADER.pack(request, _VERSION, len(body)) + body
        self._wait_at_most()
        try:
            sent = socket.send_fds(self._socket, [data], fds) if fds else 0
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise HostError(f"the back end takes no request: {error.strerror or error}") from error

    def _wait_at_most(self) -> None:
        self._socket.settimeout(max(0.001, self._until - time.monotonic()))

    def _answer(self, request: int, size: int | None) -> bytes:
        answer, fds = self._receive(request, size)
        _close(fds)
        return answer

    def _receive(self, request: int, size: int | None) -> tuple[bytes, list[int]]:
        """Return an answer of ``size`` bytes (None: of any, up to 64) and its descriptors."""
        fds: list[int] = []
        try:
            found, flags, length = _HEADER.unpack(self._read(_HEADER.size, fds))
            if found != request or flags & 7 != _FLAGS:
                raise HostError(f"the back end answered {found} (flags {flags:#x}) to {request}")
            if length > 64 if size is None else length != size:
                raise HostError(f"the back end answered request {request} with {length} bytes")
            return self._read(length, fds), fds
        except BaseException:
            _close(fds)
            raise

    def _read(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            self._wait_at_most()
            try:
                part, more, _, _ = socket.recv_fds(self._socket, size - len(data), _MOST_FDS)
            except TimeoutError as error:
                raise HostError(
                    f"the back end did not answer within {self._reply_s:g} s"
                ) from error
            except OSError as error:
                raise HostError(f"the back end is gone: {error.strerror}") from error
            fds += more
            if not part or len(fds) > _MOST_FDS:
                raise HostError("the back end closed the connection")
            data += part
        return data


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
