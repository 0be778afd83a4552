"""A QMP client's bytes, split anywhere; and what waits for a client that reads as it likes.

Findings: an exception; a reply that is no JSON, or that depends on how the bytes were split; more
kept than one value may have; an error that the session calls unforeseen; more events kept for a
client than may be, or counts that differ from what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace

from hypothesis import strategies as st

from godwit.errors import StateError
from godwit.qmp import commands
from godwit.qmp.commands import registry
from godwit.qmp.outbox import MAX_EVENTS, RESERVED, Outbox
from godwit.qmp.protocol import Session
from godwit.qmp.stream import MAX_NESTING, MAX_VALUE
from godwit.spec.events import Event
from godwit.spec.parameters import MigrationParameters
from godwit.spec.runstate import RunState

from .target import Choices, Target, require

TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b" ", b"\xff", b"\0", b"\x1b", b":", b","),
    *(
        b"1",
        b"-",
        b"1e9",
        b"true",
        b"null",
        b"9" * 40,
        b'\\"',
        b"'",
        b"\\'",
        b"[" * 101,
        b"{" * 101,
        b"\r\n",
    ),
    *(b'"\\ud800"', b"\xc3\xa9", b"\xe2\x82", b'"exec-oob"', b'"id":', b'"arguments":{}', b"1e999"),
    b'{"execute":"qmp_capabilities"}',
    *(b'{"execute":"%s"}' % name.encode() for name in sorted(commands.COMMANDS)),
    *(b'{"execute":"%s","arguments":{' % name.encode() for name in sorted(commands.COMMANDS)),
    *(
        b'"%s":' % field.encode_name.encode()
        for name in sorted(commands.COMMANDS)
        for field in registry.msgspec.structs.fields(commands.COMMANDS[name].arguments)
    ),
)


class _Vm:
    """A VM that understands every command, and can do none."""

    def __init__(self) -> None:
        self.states = SimpleNamespace(current=RunState.RUNNING)
        self.parameters = MigrationParameters()

    def __getattr__(self, name: str) -> object:
        raise StateError(f"{name}: not in a fuzzer")


#: The bit of the first byte with which the rest is for an outbox.
OUTBOX = 0x80
#: The first byte with which the rest is repeated until it is longer than a value may be.
ENDLESS = 0x40
_KINDS = [str(event) for event in list(Event)[:3]]


def run(data: bytes) -> None:
    """Feed a session the input whole, in pieces, and byte by byte."""
    size, data = data[:1], data[1:]
    if size and size[0] & OUTBOX:
        _outbox(data)
        return
    if size and size[0] == ENDLESS:
        _feed(b'{"id":"' + data * (2 + MAX_VALUE // (len(data) or 1)), 1 << 16)
        return
    replies = {_feed(data, step) for step in (len(data) or 1, 1 + (size or b"\0")[0] % 60, 1)}
    require(len(replies) == 1, "the replies depend on how the bytes were split")


def _feed(data: bytes, step: int) -> bytes:
    vm, unforeseen = _Vm(), []

    def execute(name: str, arguments: Mapping[str, object]) -> object:
        return registry.execute(vm, name, arguments)  # type: ignore[arg-type]

    session = Session(execute, unforeseen.append)
    replies = bytearray()
    for at in range(0, len(data), step):
        session.feed(data[at : at + step])
        while (reply := session.step()) is not None:
            replies += reply
        if session.broken:
            break  # the server closes the connection
        kept = session._stream
        require(len(kept._input) <= step, "bytes kept that were scanned")
        # A quote in single quotes becomes two bytes.
        require(len(kept._value) <= 2 * (MAX_VALUE + step), "more kept than a value's bytes")
        require(len(kept._closers) <= MAX_NESTING, "a deeper nesting than may be")
    if unforeseen:
        raise unforeseen[0]
    for reply in bytes(replies).split(b"\r\n"):
        if reply:
            json.loads(reply)
    return bytes(replies)


def _outbox(data: bytes) -> None:
    """Add replies and events of some kinds and lengths, and have the client take some bytes."""
    outbox, choices = Outbox(), Choices(data)
    most = MAX_EVENTS + len(_KINDS) * RESERVED
    while choices:
        what, length = choices.number(), choices.number(2)
        message = bytes(length * (1 + (what >> 4)))
        if what & 3 == 3:
            outbox.sent(min(len(message), len(outbox)))
        elif what & 3 == 2 and outbox.replies < 1 << 20:
            outbox.reply(message)
        else:
            outbox.event(_KINDS[(what >> 2) % len(_KINDS)], message)
        # A message counts until the last of its bytes was sent.
        waiting = outbox.replies + outbox._all_waiting
        require(len(outbox) <= waiting <= len(outbox) + (1 << 20), "another count than is kept")
        # One of each kind is always taken, however long.
        events = outbox._all_waiting
        require(events <= most + len(_KINDS) * (1 << 20), "more events kept than may be")
    outbox.sent(len(outbox))
    while len(outbox):  # what was lost is reported now
        outbox.sent(len(outbox))
    require(not outbox.replies and not outbox._all_waiting, "counts that are left")
    require(not outbox._messages and not outbox._lost, "messages that are left")


_words = st.lists(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6)), max_size=40)
_negotiated = st.sampled_from([b"", b'{"execute":"qmp_capabilities"}'])
TARGET = Target(
    "qmp",
    run,
    ("/godwit/qmp/",),
    st.builds(
        lambda size, first, words: bytes([size]) + first + b"".join(words),
        st.integers(0, 255),
        _negotiated,
        _words,
    ),
    TOKENS,
    limit=20.0,
)
