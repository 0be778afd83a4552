"""A snapshot's file with other bytes and values, restored into a machine that then runs.

Values are changed with checksums that agree, so that what is behind them is reached. Findings: an
exception but GodwitError; a guest that was taken over though its file was refused, or whose bytes
were altered and the checksums not; a machine that does not run, or cannot be saved, after it took a
state.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from functools import cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from hypothesis import strategies as st
from msgspec import structs

from godwit.announce.uplink import Uplink
from godwit.errors import GodwitError
from godwit.host import pagemap
from godwit.hw.memory import PAGE
from godwit.migration.guest import Guest
from godwit.migration.incoming import Incoming
from godwit.migration.snapshot import format
from godwit.migration.snapshot import image as image_of
from godwit.migration.snapshot.compression import compressor
from godwit.migration.snapshot.format import RAM_AT, Header, Index
from godwit.migration.snapshot.image import Image
from godwit.migration.snapshot.restorer import Restorer
from godwit.migration.wire.compatibility import describe
from godwit.spec import saved
from tests.fakes.host import NIC, Host, config

from . import conversation
from .target import Choices, Target, require

#: What is changed: values with checksums that agree, or bytes without.
INDEX, BYTES, TABLE, HEADER, STORED = range(5)
_NUMBERS = ("memory", "index_at", "index_length", "index_crc")
_ENTRY = Struct("<II")
_ZSTD = importlib.util.find_spec("zstandard") is not None

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


class _File(NamedTuple):
    """A whole snapshot: its size, its parts that are no holes, and what it was made of."""

    size: int
    parts: dict[int, bytes]
    header: Header
    index: Index


@cache
def base(which: int, compression: str) -> _File:
    """Return a snapshot of such a machine."""
    place = _Place(which)
    file, packed = os.memfd_create("image"), os.memfd_create("packed")
    try:
        memory = place.machine.memory
        for number in (0, 5, 6, 300):
            memory.view(number * PAGE, PAGE)[:] = bytes([number % 255 + 1]) * PAGE
        image = Image(file, "image", memory)
        image.put([(0, 1), (5 * PAGE, 2), (300 * PAGE, 1)])
        hello, state = describe(place.machine, conversation.TOKEN), place.guest.save()
        name = place.machine.config.machine.name
        guest = image_of.Guest(name, saved.encode(hello), saved.encode(state), True)
        if compression:
            image.compress(packed, guest, compressor(), lambda: None)
        else:
            image.finish(guest, lambda: None)
        return _read(packed if compression else file)
    finally:
        os.close(file)
        os.close(packed)
        place.host.close()


def _read(fd: int) -> _File:
    size = os.fstat(fd).st_size
    parts = {
        at: os.pread(fd, min(pages * PAGE, size - at), at)
        for at, pages in pagemap.populated_file(fd, 0, size)
    }
    header = format.decode_header(os.pread(fd, PAGE, 0))
    payload = os.pread(fd, header.index_length, header.index_at)
    return _File(size, parts, header, format.decode_index(payload, header)[0])


def run(data: bytes) -> None:
    """Restore what an input names, in this thread, and have the guest run."""
    choices = Choices(data)
    which = choices.number() % len(_DEVICES)
    compression = ("", "zstd")[choices.number() % 2] if _ZSTD else ""
    whole = base(which, compression)
    fd = os.memfd_create("snapshot")
    try:
        os.truncate(fd, whole.size)
        for at, part in whole.parts.items():
            os.pwrite(fd, part, at)
        altered = _change(fd, choices, whole)
        _restore(which, Path(f"/proc/self/fd/{fd}"), altered)
    finally:
        os.close(fd)


def _change(fd: int, choices: Choices, whole: _File) -> bool:
    """Change a file, and return whether its checksums show that."""
    what = choices.number() % 5
    if what == BYTES:
        return _change_bytes(fd, choices, whole)
    if what == INDEX:
        hello = conversation.changed(choices, whole.index.hello)
        state = conversation.changed(choices, whole.index.state)
        _put_index(fd, whole, hello=hello, state=state)
    elif what == TABLE:
        table = bytearray(whole.index.chunks)
        for _ in range(choices.number() % 8):
            at = choices.number(2) % len(table)
            table[at] = choices.number()
        _put_index(fd, whole, chunks=bytes(table))
    elif what == HEADER:
        fields = dict(zip(_NUMBERS, (choices.number(8) for _ in _NUMBERS), strict=True))
        field = str(choices.pick(_NUMBERS))
        number = fields[field] % (1 << (64 if field in _NUMBERS[:2] else 32))
        os.pwrite(fd, format.encode_header(whole.header._replace(**{field: number})), 0)
    elif what == STORED:
        _put_stored(fd, choices, whole)
    return False


def _change_bytes(fd: int, choices: Choices, whole: _File) -> bool:
    """Write other bytes somewhere, cut the file off or make it longer."""
    changes: dict[int, int] = {}
    for _ in range(1 + choices.number() % 3):
        at, byte = choices.number(4) % whole.size, choices.number() or 1
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ byte]), at)
        changes[at] = changes.get(at, 0) ^ byte  # two changes of one place may be none
    if choices.number() % 4 == 3:
        os.truncate(fd, choices.number(4) % (2 * whole.size))
    return any(changes.values()) or os.fstat(fd).st_size != whole.size


def _put_index(fd: int, whole: _File, **change: bytes) -> None:
    payload = format.encode_index(structs.replace(whole.index, **change))
    at = whole.header.index_at
    os.truncate(fd, at + len(payload))
    os.pwrite(fd, payload, at)
    header = whole.header._replace(index_length=len(payload), index_crc=zlib.crc32(payload))
    os.pwrite(fd, format.encode_header(header), 0)


def _put_stored(fd: int, choices: Choices, whole: _File) -> None:
    """Replace bytes of the first chunk, and its checksum by the right one."""
    table = bytearray(whole.index.chunks)
    length, _ = _ENTRY.unpack_from(table)
    at = PAGE if whole.header.compression else RAM_AT
    data = bytearray(os.pread(fd, length, at))
    for _ in range(1 + choices.number() % 6):
        data[choices.number(3) % len(data)] = choices.number()
    os.pwrite(fd, data, at)
    _ENTRY.pack_into(table, 0, length, zlib.crc32(data))
    _put_index(fd, whole, chunks=bytes(table))


def _restore(which: int, path: Path, altered: bool) -> None:
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
            require(not altered, "a guest was taken over from a file that was altered")
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


_head = st.builds(
    lambda which, packed, what: bytes([which, packed, what]),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 4),
)
_patches = st.lists(
    st.builds(
        conversation.patch,
        st.integers(0, 0xFFFF),
        st.integers(0, 255),
        st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=5,
).map(lambda patches: bytes([len(patches)]) + b"".join(patches))
#: Other values in HELLO, in STATE, or both: where most of the code is.
_deep = st.builds(
    lambda which, hello, state: bytes([which, 0, INDEX]) + hello + state,
    st.integers(0, 1),
    st.one_of(st.just(b"\0"), _patches),
    _patches,
)
TARGET = Target(
    "snapshot",
    run,
    (
        *("/godwit/migration/", "/godwit/machine/", "/godwit/hw/", "/godwit/announce/"),
        *("/godwit/host/kvm/", "/godwit/spec/saved"),
    ),
    st.one_of(
        _deep, _deep, st.builds(lambda head, rest: head + rest, _head, st.binary(max_size=60))
    ),
    limit=10.0,
    quick=30,
)
