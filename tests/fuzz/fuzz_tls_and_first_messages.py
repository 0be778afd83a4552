"""Strangers at the door: bytes of any kind on several connections at once, with secret and TLS.

A first byte of an input is the door: plain, with a secret, with TLS, or with both. Then come steps:
a connection is opened, closed, or sends bytes, whole first messages, or a proof that is right or
nearly so.

Findings: an exception; somebody who is let in without the secret or a certificate; a first message
that is not the one that was sent; more newcomers kept than may be; a source that is kept out, or
for long, by the strangers.
"""

from __future__ import annotations

import atexit
import io
import shutil
import socket
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from godwit.errors import GodwitError
from godwit.migration.times import Times
from godwit.migration.wire import messages
from godwit.migration.wire import secret as secrets
from godwit.migration.wire.acceptor import MAX_NEWCOMERS, Acceptor
from godwit.migration.wire.address import Address, Credentials
from godwit.migration.wire.messages import Kind
from godwit.spec import saved

from .target import Choices, Target, piece, require

PLAIN, SECRET, TLS, BOTH = range(4)
OPEN, CLOSE, SEND, MESSAGE, PROVE, TIME, ENOUGH = range(7)
_SECRET = b"0123456789abcdef" * 2
_SLOTS = 24
_TOKEN = bytes(range(16))
_QUERY = messages.Commit(_TOKEN, True)
#: A source gets in within so long, whatever strangers do, seconds.
_LONGEST_S = 5.0


class _Clock:
    """A clock that a step of the input advances."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return time.monotonic() + self.ahead


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="godwit-fuzz-"))
    atexit.register(shutil.rmtree, folder, True)
    return folder


@cache
def _certificates() -> Path:
    """Return the folder with a host's certificates."""
    from godwit.cli.pki import pki

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        pki(str(_folder() / "pki"), ["127.0.0.1"])
    return _folder() / "pki" / "127.0.0.1"


class Door:
    """An acceptor, and the strangers before it."""

    def __init__(self, how: int) -> None:
        from godwit.migration.wire.tls import Tls

        self.clock = _Clock()
        self.times = Times(now=self.clock.now, silence=_LONGEST_S, introduction=2.0)
        self.secret = _SECRET if how & SECRET else None
        self.tls = Tls(str(_certificates())) if how & TLS else None
        credentials = Credentials(self.tls, self.secret)
        if how & TLS:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.end: object = free.getsockname()[:2]
            uri = f"tls:127.0.0.1:{self.end[1]}"
        else:
            self.end = str(_folder() / "far")
            uri = f"unix:{self.end}"
        self.address = Address(uri, False, self.times, credentials)
        self.refused: list[GodwitError] = []
        self.acceptor = Acceptor(
            self.address, self.times, lambda connection, error: self.refused.append(error)
        )
        self.strangers: dict[int, socket.socket] = {}
        #: What each has sent, and whether the proof that it sent was right.
        self.sent: dict[int, bytes] = {}
        self.proved: set[int] = set()

    # --- strangers --------------------------------------------------------------------------------
    def open(self, slot: int) -> None:
        """Connect, in the place of whoever had the slot."""
        self.leave(slot)
        sock = socket.socket(socket.AF_INET if self.tls else socket.AF_UNIX)
        sock.settimeout(1.0)
        sock.connect(self.end)
        self.strangers[slot] = sock
        self.sent[slot] = b""
        self.look()

    def leave(self, slot: int) -> None:
        """Close a stranger's connection."""
        if slot in self.strangers:
            self.strangers.pop(slot).close()
            self.proved.discard(slot)

    def send(self, slot: int, data: bytes) -> None:
        """Send a stranger's bytes, as far as they are taken."""
        if slot not in self.strangers:
            self.open(slot)
        sock = self.strangers[slot]
        sock.settimeout(0.2)
        with suppress(OSError):
            sock.sendall(data)
            self.sent[slot] += data
        self.look()

    def prove(self, slot: int, wrong: int) -> None:
        """Answer the challenge: rightly, or with one bit that is wrong."""
        if slot not in self.strangers:
            self.open(slot)
        sock = self.strangers[slot]
        sock.settimeout(0.2)
        try:
            data = sock.recv(4096)
            length = messages.parse_header(data[: messages.HEADER.size])[1]
            nonce = saved.decode(data[messages.HEADER.size :][:length], messages.Challenge).nonce
        except (OSError, GodwitError):
            return
        ours = bytes(32)
        proof = bytearray(secrets._proof(_SECRET, b"source", nonce, ours))
        if wrong:
            proof[wrong % 32] ^= 1 << (wrong >> 5) % 8
        first = not self.sent[slot]
        self.send(
            slot, messages.message(Kind.AUTH, saved.encode(messages.Auth(bytes(proof), ours)))
        )
        if first and not wrong:
            self.proved.add(slot)

    def look(self) -> None:
        """Have the acceptor do what is due, and check whom it lets in."""
        for _ in range(3):
            introduced = self.acceptor.next(0.0)
            require(len(self.acceptor._newcomers) <= MAX_NEWCOMERS, "more newcomers than may be")
            if introduced is None:
                return
            connection, kind, payload = introduced
            connection.close()
            require(kind in (Kind.HELLO, Kind.QUERY), f"{kind.name} as a first message")
            require(self.tls is None, "a stranger is let in without a certificate")
            if self.secret is not None:
                require(self.proved, "a stranger is let in without the secret")
            whole = messages.message(kind, payload)
            require(any(whole in sent for sent in self.sent.values()), "nobody has sent that")

    # --- the source -------------------------------------------------------------------------------
    def source_gets_in(self) -> None:
        """Connect as a source does, and have the acceptor let the source in."""
        errors: list[BaseException] = []
        thread = threading.Thread(target=lambda: self._source(errors), daemon=True)
        thread.start()
        until = time.monotonic() + 2 * _LONGEST_S
        while time.monotonic() < until:
            introduced = self.acceptor.next(0.05)
            if introduced is None:
                require(thread.is_alive() or not errors, f"the source is kept out: {errors}")
                continue
            connection, kind, payload = introduced
            connection.close()
            if kind is Kind.QUERY and saved.decode(payload, messages.Commit) == _QUERY:
                thread.join(_LONGEST_S)
                return
        require(False, f"the source is kept out: {errors}")

    def _source(self, errors: list[BaseException]) -> None:
        try:
            connection = self.address.connect()
            connection.send(Kind.QUERY, _QUERY)
            with suppress(GodwitError):
                connection.expect(Kind.ACK)
            connection.close()
        except BaseException as error:
            errors.append(error)

    def close(self) -> None:
        """Close all connections and the acceptor."""
        for slot in tuple(self.strangers):
            self.leave(slot)
        self.acceptor.close()


def run(data: bytes) -> None:
    """Have strangers do what the input has, and then a source connect."""
    choices = Choices(data)
    door = Door(choices.number() % 4)
    try:
        for _ in range(64):
            if not choices:
                break
            _step(door, choices)
        door.source_gets_in()
    finally:
        door.close()


def _step(door: Door, choices: Choices) -> None:
    what, slot = choices.number() % ENOUGH, choices.number() % _SLOTS
    if what == OPEN:
        door.open(slot)
    elif what == CLOSE:
        door.leave(slot)
        door.look()
    elif what == SEND:
        door.send(slot, choices.piece(2048))
    elif what == MESSAGE:
        kind = Kind(1 + choices.number() % len(Kind))
        door.send(slot, messages.message(kind, choices.piece(2048)))
    elif what == PROVE:
        door.prove(slot, choices.number())
    else:
        door.clock.ahead += choices.number() / 64
        door.look()


def steps(door: int, *taken: bytes) -> bytes:
    """Return an input of steps."""
    return bytes([door]) + b"".join(taken)


def send(slot: int, data: bytes) -> bytes:
    """Return a step that sends bytes."""
    return bytes([SEND, slot]) + piece(data)


def message(slot: int, kind: Kind, payload: bytes) -> bytes:
    """Return a step that sends a message."""
    return bytes([MESSAGE, slot, kind - 1]) + piece(payload)


def prove(slot: int, wrong: int = 0) -> bytes:
    """Return a step that answers the challenge."""
    return bytes([PROVE, slot, wrong])


def query() -> bytes:
    """Return a whole QUERY that is not the source's."""
    return messages.message(Kind.QUERY, saved.encode(messages.Commit(bytes(16), True)))


#: The start of a TLS 1.3 handshake: a record with a ClientHello that has no extensions.
CLIENT_HELLO = bytes.fromhex("1603010031") + bytes.fromhex("0100002d0303") + bytes(32)
CLIENT_HELLO += bytes.fromhex("00000213010100") + bytes.fromhex("0000")

_slot = st.integers(0, _SLOTS - 1)
_bytes = st.one_of(
    st.sampled_from([query(), query()[:9], CLIENT_HELLO, b"GET / HTTP/1.1\r\n\r\n", bytes(8)]),
    st.binary(max_size=40),
)
_steps = st.one_of(
    _slot.map(lambda slot: bytes([OPEN, slot])),
    _slot.map(lambda slot: bytes([CLOSE, slot])),
    st.builds(send, _slot, _bytes),
    st.builds(message, _slot, st.sampled_from(list(Kind)), st.binary(max_size=40)),
    st.builds(prove, _slot, st.sampled_from([0, 0, 1, 31, 255])),
    st.builds(lambda time: bytes([TIME, 0, time]), st.integers(0, 255)),
)


def _joined(door: int, found: list[bytes]) -> bytes:
    return steps(door, *found)


# Most without TLS, whose keys take a hundred times as long.
_doors = st.sampled_from([PLAIN, PLAIN, SECRET, SECRET, SECRET, TLS, BOTH])
TARGET = Target(
    "tls_and_first_messages",
    run,
    ("/godwit/migration/wire/", "/godwit/spec/saved"),
    st.builds(_joined, _doors, st.lists(_steps, max_size=30)),
    (query(), query()[8:], messages.header(Kind.HELLO, 65_536), CLIENT_HELLO, b"\x16\x03\x01"),
    limit=30.0,
    quick=30,
)
