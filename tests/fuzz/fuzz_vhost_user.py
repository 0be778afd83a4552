"""All that a vhost-user back end sends: answers to requests, and messages of its own.

Findings: an exception other than HostError; an answer that is taken and is out of its range.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from hypothesis import strategies as st

from godwit.errors import HostError
from godwit.host.vhost_user import BackEnd
from tests.fakes import vhost_user as fake

from .target import Choices, Target, allowed, piece, require


def run(data: bytes) -> None:
    """Introduce ourselves to a back end that has sent everything already, and ask for all."""
    choices = Choices(data)
    fds, at, own = choices.number() % 4, choices.number(2), choices.piece()
    stream = choices.rest()
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "rb") as file:
        theirs.sendall(stream[:at])
        if stream[at:]:
            socket.send_fds(theirs, [stream[at:]], [file.fileno()] * fds)
        theirs.shutdown(socket.SHUT_WR)
        with allowed(HostError):
            back_end = BackEnd(ours, 1.0)
            try:
                _ask(back_end)
            finally:
                with allowed(HostError):
                    _own_messages(back_end, theirs, own)
                back_end.close()


def _ask(back_end: BackEnd) -> None:
    queues = back_end.queues()
    require(queues is None or queues >= 0, f"{queues} queues")
    require(len(back_end.config(60)) == 60, "a configuration of another length")
    inflight = back_end.make_inflight(2, 128)
    if inflight is not None:
        os.close(inflight.fd)
        require(0 < inflight.size <= 4 << 20, f"a record of {inflight.size} bytes")
    back_end.set_log(2, 4096)
    require(0 <= back_end.stop_ring(0) <= 0xFFFF, "a position beyond 16 bits")
    back_end.enable([0])


def _own_messages(back_end: BackEnd, theirs: socket.socket, own: bytes) -> None:
    """Send bytes where the back end's own messages are expected, and have them looked at."""
    if back_end.requests < 0:
        return
    _, found, _, _ = socket.recv_fds(theirs, 1 << 16, 16)
    try:
        if found and own:
            os.write(found[0], own)
    finally:
        for fd in found:
            os.close(fd)
    for _ in range(4):
        back_end.config_changed()


def conversation(answers: Sequence[bytes], own: bytes = b"", fds: int = 1) -> bytes:
    """Return answers as the target reads them, with descriptors at that of GET_INFLIGHT."""
    before = sum(map(len, answers[:4]))
    return bytes([fds]) + before.to_bytes(2, "little") + piece(own) + b"".join(answers)


def answer(request: int, body: bytes) -> bytes:
    """Return one answer."""
    return b"".join(part.to_bytes(4, "little") for part in (request, 5, len(body))) + body


def number(value: int) -> bytes:
    """Return a number as answers have it."""
    return value.to_bytes(8, "little")


HONEST = (
    answer(fake.GET_FEATURES, number(fake.FEATURES)),
    answer(fake.GET_PROTOCOL, number(fake.PROTOCOL)),
    answer(fake.GET_QUEUE_NUM, number(4)),
    answer(fake.GET_CONFIG, bytes(4) + b"\x3c" + bytes(7 + 60)),
    answer(fake.GET_INFLIGHT, number(8192) + number(0) + b"\2\0\x80\0" + bytes(4)),
    answer(fake.SET_LOG_BASE, number(0)),
    answer(fake.GET_BASE, bytes(4) + b"\x07\0\0\0"),
    answer(fake.GET_FEATURES, number(fake.FEATURES)),
)
_bodies = st.one_of(st.binary(max_size=80), st.builds(number, st.integers(0, (1 << 64) - 1)))
_answers = st.one_of(
    st.sampled_from(HONEST), st.builds(answer, st.integers(0, 40), _bodies), st.binary(max_size=20)
)
TARGET = Target(
    "vhost_user",
    run,
    ("/godwit/host/vhost_user",),
    st.builds(
        conversation,
        st.one_of(st.just(HONEST), st.lists(_answers, max_size=9)),
        st.binary(max_size=40),
        st.integers(0, 3),
    ),
    HONEST,
)
