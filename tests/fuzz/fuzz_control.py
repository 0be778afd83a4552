"""A driver's requests on virtio-net's control queue, of any class, length and form.

Findings: an exception; an answer that is neither OK nor ERR; a filter that grows without bound; a
filter that is saved and is not the same when loaded; a verdict on a frame, or a view, that raises.
"""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from godwit.hw.virtio.net.control import ERR, OK
from godwit.hw.virtio.net.device import NetState
from godwit.hw.virtio.net.rxfilter import TABLE_LIMIT
from godwit.spec.saved import decode, encode
from tests.fakes.driver import Part

from .fuzz_virtio import CLASSES, Bench
from .guests import logged_memory
from .target import Choices, Target, piece, require

_OWN = sum(1 << bit for bit in (16, 17, 18, 19, 20, 21, 23, 28, 29))


def run(data: bytes) -> None:
    """Probe with some features, and send requests one after the other, or several at once."""
    choices = Choices(data)
    features = choices.number(4) & _OWN | 1 << 17 | 1 << 32
    with logged_memory() as memory:
        bench = Bench(memory, vhost=False)
        try:
            bench.guest.probe(features)
            while choices:
                _request(bench, choices)
                _check(bench)
        finally:
            bench.close()


def _request(bench: Bench, choices: Choices) -> None:
    """Send one request in up to four pieces, with an answer of some length."""
    how = choices.number()
    head, body = choices.take(2), choices.piece(8192)
    if how & 0x80:
        bench.net.announce()
    if len(bench.guest.queues) < 3 or not bench.net.started:
        bench.guest.probe()
    driver = bench.guest.queues[2]
    pieces = _split(head + body, 1 + (how & 3))
    parts = [Part(driver.place(one), len(one)) for one in pieces]
    parts.append(Part(answer := driver.place(b"\xee"), 1 if how & 4 or not how & 8 else 0, True))
    chain = driver.add(parts, indirect=bool(how & 0x10) and driver.size > 2 and _indirect(bench))
    if how & 0x20:
        return  # with the next one
    bench.guest.kick(2)
    bench.serve()
    used = [found for found, _ in driver.take_all()]
    if chain in used:
        value = bench.memory.read(answer, 1)[0]
        require(value in (OK, ERR), f"answer {value} to {head.hex()}")
    elif bench.guest.status & 0x40:
        bench.guest.probe()  # the request broke a rule


def _indirect(bench: Bench) -> bool:
    return bool(bench.net.negotiated >> 28 & 1)


def _split(data: bytes, count: int) -> list[bytes]:
    size = -(-len(data) // count) or 1
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]


def _check(bench: Bench) -> None:
    control = bench.net.control
    found = control.filter
    require(len(found.unicast) <= TABLE_LIMIT, "more unicast addresses than may be")
    require(len(found.multicast) <= TABLE_LIMIT, "more multicast addresses than may be")
    require(len(found.vlans) == len(set(found.vlans)) <= 4096, "more VLANs than may be")
    require(len(control.mac) == 6 and not control.mac[0] & 1, f"MAC {control.mac.hex()}")
    msgspec.json.encode(bench.net.rx_filter())
    for frame in (b"", b"\xff" * 60, control.mac + bytes(54), b"\1\0\x5e" + bytes(57)):
        bench.net.accepts(memoryview(frame))
    state = bench.net.save()
    require(decode(encode(state), NetState) == state, "the saved filter is decoded differently")


def request(kind: int, command: int, body: bytes = b"", how: int = 0) -> bytes:
    """Return a request as the target reads it."""
    return bytes([how, kind, command]) + piece(body)


def table(*macs: bytes) -> bytes:
    """Return a table of addresses as MAC_TABLE_SET has two."""
    return len(macs).to_bytes(4, "little") + b"".join(macs)


_mac = st.binary(min_size=6, max_size=6)
_tables = st.builds(
    lambda one, two: table(*one) + table(*two),
    st.lists(_mac, max_size=70),
    st.lists(_mac, max_size=70),
)
_bodies = st.one_of(st.binary(max_size=8), _tables, st.binary(max_size=40), _mac)
_requests = st.builds(
    request, st.integers(0, CLASSES), st.integers(0, 6), _bodies, st.integers(0, 255)
)
TARGET = Target(
    "control",
    run,
    ("/godwit/hw/virtio/net/", "/godwit/hw/virtio/queue"),
    st.builds(
        lambda features, requests: features + b"".join(requests),
        st.one_of(st.just(b"\xff" * 4), st.binary(min_size=4, max_size=4)),
        st.lists(_requests, max_size=20),
    ),
    (request(0, 0, b"\1"), request(3, 0), request(1, 0, table() + table()), request(2, 0, b"\1\0")),
)
