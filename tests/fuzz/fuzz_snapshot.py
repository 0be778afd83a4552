"""A snapshot's file with other messages, bytes and values, restored into a machine that then runs.

Findings: an exception but GodwitError; a guest that was taken over though its file was refused; a
machine that does not run, or cannot be saved, after it took a state.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from godwit.announce.uplink import Uplink
from godwit.errors import GodwitError
from godwit.migration.guest import Guest
from godwit.migration.incoming import Incoming
from godwit.migration.snapshot import Restorer
from godwit.spec import saved
from tests.fakes.host import NIC, Host, config

from . import conversation
from .conversation import Message
from .target import Choices, Target, piece, require

_DEVICES = (
    (NIC, ("--rng", "id=dice")),
    (("--nic", "tap=tap0,mac=52:54:00:12:34:56,model=e1000"),),
)


class _Place:
    """A machine, and the guest as migrations see one."""

    def __init__(self, which: int) -> None:
        self.host = Host(config(*_DEVICES[which % len(_DEVICES)]))
        self.machine = self.host.machine
        uplinks = [Uplink(nic, self.host.loop) for nic in self.machine.nics]
        self.guest = Guest(self.machine, uplinks, self.host.loop.now)


@cache
def base(which: int) -> list[Message]:
    """Return the messages of a snapshot of such a machine."""
    place = _Place(which)
    try:
        return conversation.of(place.guest)
    finally:
        place.host.close()


def run(data: bytes) -> None:
    """Restore what an input names, in this thread, and have the guest run."""
    choices = Choices(data)
    which = choices.number() % len(_DEVICES)
    file = os.memfd_create("snapshot")
    try:
        os.write(file, conversation.compose(choices, base(which)))
        _restore(which, Path(f"/proc/self/fd/{file}"))
    finally:
        os.close(file)


def _restore(which: int, path: Path) -> None:
    taken: list[bool] = []

    def take_over(incoming: Incoming, running: bool) -> None:
        taken.append(running)
        incoming.started([])

    place = _Place(which)
    restorer = Restorer(place.guest, path, take_over, lambda error: None)
    try:
        try:
            # Not its thread: that one reports an unforeseen error as one of the stream's.
            restorer._receiver.start()
            restorer._run()
        except GodwitError:
            require(not taken, "a guest was taken over from a file that was refused")
        else:
            require(len(taken) == 1, "no guest was taken over")
            _goes_on(place)
    finally:
        restorer._receiver.realtime.end()
        restorer._finish()
        restorer.close()
        place.host.close()


def _goes_on(place: _Place) -> None:
    """Resume the machine for a moment, then pause and save it."""
    machine = place.machine
    machine.resume()
    require(machine.running, "a machine that took a state does not run")
    for nic in machine.nics:
        place.host.taps["tap0"].put(b"\xff" * 6 + bytes(54))
        nic.rx_filter()
        nic.announce()
    for _ in range(4):
        place.host.loop.run_once(0)
    machine.pause()
    saved.encode(place.guest.save())


_whole = st.integers(0, 8).map(lambda number: bytes([conversation.WHOLE, number]))
_values = st.builds(
    lambda number, patches: bytes([conversation.VALUES, number, len(patches)]) + b"".join(patches),
    st.sampled_from([0, 5, 5, 5, 8]),
    st.lists(
        st.builds(
            conversation.patch,
            st.integers(0, 0xFFFF),
            st.integers(0, 255),
            st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
        ),
        min_size=1,
        max_size=5,
    ),
)
_other = st.builds(
    lambda kind, payload: bytes([conversation.OTHER, kind]) + piece(payload),
    st.integers(0, 18),
    st.binary(max_size=60),
)
#: All messages in order, some of them others.
_ordered = st.builds(
    lambda changes: b"".join(changes.get(n, bytes([conversation.WHOLE, n])) for n in range(9)),
    st.dictionaries(st.integers(0, 8), st.one_of(_values, _values, _other), max_size=2),
)


def _patches_in_order(changes: dict[int, bytes]) -> bytes:
    return b"".join(changes.get(n, bytes([conversation.WHOLE, n])) for n in range(9))


#: All in order, with other values in HELLO, in STATE, or both.
_deep = st.dictionaries(st.sampled_from([0, 5]), _values, min_size=1, max_size=2).map(
    lambda found: _patches_in_order(
        {n: bytes([part[0], n]) + part[2:] for n, part in found.items()}
    )
)
TARGET = Target(
    "snapshot",
    run,
    (
        *("/godwit/migration/", "/godwit/machine/", "/godwit/hw/", "/godwit/announce/"),
        *("/godwit/host/kvm/", "/godwit/spec/saved"),
    ),
    st.builds(
        lambda which, rest: which + rest,
        st.sampled_from([b"\0", b"\1"]),
        st.one_of(_deep, _deep, _ordered, st.lists(st.one_of(_whole, _other)).map(b"".join)),
    ),
    limit=10.0,
    quick=30,
)
