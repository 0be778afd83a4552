"""Whole migrations through a middleman who changes, drops, repeats, cuts and injects messages.

The machines are real ones on a fake KVM, the connections real sockets, the waits short. Only the
first connection is tampered with: later ones, by which a source asks what became of its guest, are
a line that is up again.

Findings: both sides run; no side has the guest; a side that hangs; an exception in a thread.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from godwit.errors import GodwitError
from godwit.migration.times import Times
from godwit.migration.wire import messages
from godwit.migration.wire.address import Address
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec import saved
from godwit.spec.runstate import RunState
from tests.fakes.connection_cutter import ConnectionCutter

from .target import Choices, Finding, Target, piece, require

#: Silence and patience end soon: what comes at all comes sooner.
TIMES = Times(
    silence=0.4,
    introduction=0.4,
    stop=1.0,
    hurry=0.1,
    query_again=0.03,
    query_connect=0.4,
    last_messages=0.2,
    look=0.01,
    patience=1.5,
    marker=0.02,
    old_path=0.1,
    late=0.02,
    hold=0.05,
    hold_longest=0.2,
    settle=0.05,
    start=0.5,
    listen=0.5,
)
#: How long both sides may take until one has the guest, and nothing moves any more, seconds.
LONGEST_S = 12.0
#: What is done to a message.
PASS, FLIP, HEADER, CUT_SHORT, TWICE, DROP, INJECT, INSTEAD, CLOSE, KEEP, SPLIT, AWAY = range(12)
#: The states of a destination that has the guest, though it does not run: it was paused before.
_HERE = (RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH_MIGRATE)

Step = tuple[bool, int, int, int, bytes]


class Middleman(ConnectionCutter):
    """A relay that does to some messages of the first connection what the steps are.

    ``steps``: (from the source, number of the message in that direction, what, how, payload).
    """

    def __init__(self, near: Path, far: Path, steps: list[Step]) -> None:
        super().__init__(near, far, None, True)
        self._near = near
        self._steps = {(step[0], step[1]): step[2:] for step in steps}

    def _accept(self) -> None:
        while True:
            try:
                source = SocketConnection(self._listener.accept()[0])
            except OSError:
                return
            try:
                target = Address(f"unix:{self._far}", False).connect()
            except GodwitError:
                # Nobody listens there any more, so nobody does here: as the other host's kernel.
                self._stop_listening()
                source.close()
                return
            self.lines += 1
            self._connections += [source, target]
            for one, other in ((source, target), (target, source)):
                one.set_silence(120)
                arguments = (one, other, self.lines == 1, one is target)
                thread = threading.Thread(target=self._pass, args=arguments, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(
        self, one: SocketConnection, other: SocketConnection, first: bool, from_target: bool
    ) -> None:
        number = 0
        kept = b""
        try:
            while True:
                kind, length = one.receive()
                payload = one.read(length)
                if kind is Kind.WELCOME:
                    payload = self._as_ours(payload)
                raw = messages.message(kind, bytes(payload))
                step = self._steps.get((not from_target, number)) if first else None
                number += 1
                if step is None:
                    self._send(other, kept + raw)
                    kept = b""
                elif step[0] == KEEP:
                    kept += raw  # with the next one
                elif step[0] in (CLOSE, AWAY):
                    if step[0] == AWAY:
                        self._go_away(step[1] % 300 / 1000)
                    break
                else:
                    for part in tampered(raw, *step):
                        self._send(other, part)
        except (GodwitError, OSError, ValueError):
            pass
        one.interrupt()
        other.interrupt()

    def _go_away(self, seconds: float) -> None:
        """Be out of reach for some time, which proves nothing to a source that asks."""
        away = self._near.with_suffix(".away")
        with suppress(OSError):
            self._near.rename(away)
            timer = threading.Timer(seconds, lambda: _back(away, self._near))
            self._threads.append(timer)
            timer.start()

    @staticmethod
    def _send(other: SocketConnection, data: bytes) -> None:
        if data:
            other.send_parts([data])


def _back(away: Path, near: Path) -> None:
    with suppress(OSError):
        away.rename(near)


def tampered(raw: bytes, what: int, how: int, payload: bytes) -> list[bytes]:
    """Return what is sent instead of a message."""
    injected = messages.message(Kind(1 + how % len(Kind)), payload)
    changed = bytearray(raw)
    if what == FLIP:
        changed[how % len(raw)] ^= 1 << (how >> 16 & 7)
    elif what == HEADER:
        changed[how % messages.HEADER.size] = how >> 16 & 0xFF
    return {
        CUT_SHORT: [raw[: how % len(raw)]],
        TWICE: [raw, raw],
        DROP: [],
        INJECT: [injected, raw],
        INSTEAD: [injected],
        SPLIT: [raw[: how % len(raw)], raw[how % len(raw) :]],
    }.get(what, [bytes(changed)])


def run(data: bytes) -> None:
    """Migrate once, with the steps of the input, and find out who has the guest."""
    from migration_bench import Migration

    errors: list[BaseException] = []
    before, threading.excepthook = threading.excepthook, lambda call: errors.append(call.exc_value)
    folder = Path(tempfile.mkdtemp(prefix="godwit-fuzz-"))
    migration = Migration(folder, folder / "near", TIMES)
    try:
        with Middleman(folder / "near", migration.far, steps_of(data)):
            migration.begin()
            _judge(migration, lambda: not migration.source.active)
        if errors:
            raise errors[0]
    finally:
        migration.close()
        shutil.rmtree(folder, ignore_errors=True)
        threading.excepthook = before


def _judge(migration: object, ended: Callable[[], bool]) -> None:
    """Wait until the source has decided, and one side alone has the guest."""
    until = time.monotonic() + LONGEST_S
    while True:
        source, destination = migration.running
        if source and destination:
            raise Finding(f"both run: {_shown(migration)}")
        here = destination or (
            migration.there.migrations._incoming.owned and migration.there.states.current in _HERE
        )
        if ended() and (source or here):
            break
        if time.monotonic() > until:
            what = "nobody has the guest" if ended() else "the source hangs"
            raise Finding(f"{what}: {_shown(migration)}")
        time.sleep(0.005)
    time.sleep(0.03)  # a late start of the other side
    require(migration.running != (True, True), f"both run: {_shown(migration)}")


def _shown(migration: object) -> str:
    return (
        f"{migration.here.statuses} {migration.here.states.current} "
        f"{migration.source.report.error}; {migration.there.states.current} "
        f"{migration.there.failures}"
    )


def steps_of(data: bytes) -> list[Step]:
    """Return the steps of an input, four at the most."""
    choices, steps = Choices(data), list[Step]()
    while choices and len(steps) < 4:
        where, number, what = choices.number(), choices.number(), choices.number()
        how, payload = choices.number(4), choices.piece(256)
        steps.append((bool(where & 1), number % 24, what % 12, how, payload))
    return steps


def step(from_source: bool, number: int, what: int, how: int = 0, payload: bytes = b"") -> bytes:
    """Return a step as :func:`steps_of` reads it."""
    return bytes([from_source, number, what]) + how.to_bytes(4, "little") + piece(payload)


@cache
def payloads() -> tuple[bytes, ...]:
    """Return payloads that mean something in the conversation."""
    values = (
        messages.Reason("no"),
        messages.Commit(bytes(16), True),
        messages.Started({}, ["running"]),
        messages.Switched([1]),
        messages.Packets(0, [bytes(80)]),
        messages.PathDrained(0),
    )
    return (b"", b"\x80", *(saved.encode(value) for value in values))


_steps = st.builds(
    step,
    st.booleans(),
    st.integers(0, 14),
    st.integers(0, 11),
    st.integers(0, (1 << 24) - 1),
    st.one_of(st.just(b""), st.sampled_from(payloads()), st.binary(max_size=20)),
)
TARGET = Target(
    "migrations",
    run,
    (),
    st.lists(_steps, min_size=1, max_size=3).map(b"".join),
    payloads()[1:],
    limit=30.0,
    quick=12,
)
