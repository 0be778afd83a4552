"""A QMP client's bytes, split anywhere.

Findings: an exception; a reply that is no JSON, or that depends on how the bytes were split; more
kept than one value may have; an error that the session calls unforeseen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace

from hypothesis import strategies as st

from godwit.errors import StateError
from godwit.qmp import commands
from godwit.qmp.commands import registry
from godwit.qmp.protocol import Session
from godwit.qmp.stream import MAX_VALUE
from godwit.spec.parameters import MigrationParameters
from godwit.spec.runstate import RunState

from .target import Target, require

TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b" ", b"\xff", b"\0", b"\x1b", b":", b","),
    *(b"1", b"-", b"1e9", b"true", b"null", b"9" * 40, b'\\"', b"[" * 101, b"{" * 101, b"\r\n"),
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


def run(data: bytes) -> None:
    """Feed a session the input whole, in pieces, and byte by byte."""
    size, data = data[:1], data[1:]
    replies = {_feed(data, step) for step in (len(data) or 1, 1 + (size or b"\0")[0] % 60, 1)}
    require(len(replies) == 1, "the replies depend on how the bytes were split")


def _feed(data: bytes, step: int) -> bytes:
    vm, unforeseen = _Vm(), []

    def execute(name: str, arguments: Mapping[str, object]) -> object:
        return registry.execute(vm, name, arguments)  # type: ignore[arg-type]

    session = Session(execute, unforeseen.append)
    replies = bytearray()
    for at in range(0, len(data), step):
        replies += session.feed(data[at : at + step])
        require(len(session._stream._buffer) <= MAX_VALUE + step, "more kept than a value's bytes")
    if unforeseen:
        raise unforeseen[0]
    for reply in bytes(replies).split(b"\r\n"):
        if reply:
            json.loads(reply)
    return bytes(replies)


_words = st.lists(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6)), max_size=40)
_negotiated = st.sampled_from([b"", b'{"execute":"qmp_capabilities"}'])
TARGET = Target(
    "qmp",
    run,
    ("/godwit/qmp/",),
    st.builds(
        lambda size, first, words: size + first + b"".join(words),
        st.binary(min_size=1, max_size=1),
        _negotiated,
        _words,
    ),
    TOKENS,
)
