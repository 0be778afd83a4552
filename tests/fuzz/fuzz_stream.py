"""What a peer sends: structs, HELLO, recorded states, packets, and a destination's answers.

Findings: an exception but those of a bad stream; a struct that is encoded and decoded differently;
a device that took a state and then raises, writes where no dirty log sees, or cannot be saved;
packets kept without bound.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import msgspec
from hypothesis import strategies as st

from godwit.announce.observer import Observer
from godwit.announce.saved import AddressBookState
from godwit.errors import GodwitError, StreamError
from godwit.hw.memory import PAGE, GuestMemory
from godwit.hw.nic.e1000.state import E1000State
from godwit.hw.nic.rx_backlog import MAX_BYTES, MAX_FRAMES
from godwit.hw.power import Pm1, PowerState
from godwit.hw.serial import Serial, SerialState
from godwit.hw.virtio.net.device import NetState
from godwit.hw.virtio.pci import VirtioState
from godwit.machine.state import MachineState
from godwit.migration.guest import ADDRESSES
from godwit.migration.receiver import Receiver
from godwit.migration.wire import compatibility, messages
from godwit.migration.wire.messages import Kind
from godwit.spec import saved
from recorded import STREAMS, Stream
from tests.fakes.cpus import HASWELL, SKYLAKE
from tests.fakes.host import NIC, Host, config

from . import conversation, fuzz_virtio, records
from .conversation import Received
from .guests import logged_memory
from .target import Choices, Target, allowed, piece, require

#: The first byte of an input.
STRUCT, STATE, HELLO, RECEIVE, PACKETS, PEER, TABLE = range(7)
_STRUCTS: dict[Kind, Any] = {
    Kind.HELLO: messages.Hello,
    Kind.WELCOME: messages.Welcome,
    Kind.REFUSED: messages.Reason,
    Kind.STATE: MachineState,
    Kind.COMMIT: messages.Commit,
    Kind.STARTED: messages.Started,
    Kind.SWITCHED: messages.Switched,
    Kind.PACKETS: messages.Packets,
    Kind.PATH_DRAINED: messages.PathDrained,
    Kind.CHALLENGE: messages.Challenge,
    Kind.AUTH: messages.Auth,
}
#: Honest values of them.
_VALUES: dict[Kind, msgspec.Struct] = {
    Kind.WELCOME: messages.Welcome(1, "127.0.0.1 4444", "127.0.0.1 5555", True),
    Kind.REFUSED: messages.Reason("no"),
    Kind.COMMIT: messages.Commit(conversation.TOKEN, True),
    Kind.STARTED: messages.Started({"loaded": 1.5}, ["inmigrate", "running"]),
    Kind.SWITCHED: messages.Switched([2]),
    Kind.PACKETS: messages.Packets(0, [bytes(12) + b"\xff" * 6 + bytes(60)]),
    Kind.PATH_DRAINED: messages.PathDrained(0),
    Kind.CHALLENGE: messages.Challenge(bytes(32)),
    Kind.AUTH: messages.Auth(bytes(32), bytes(32)),
}


def run(data: bytes) -> None:
    """Try what the first byte names."""
    choices = Choices(data)
    (_struct, _state, _hello, _receive, _packets, _peer, _table)[choices.number() % 7](choices)


# --- structs --------------------------------------------------------------------------------------
def _struct(choices: Choices) -> None:
    """Decode a header, and a payload that is the input's or an honest one with other values."""
    with allowed(StreamError):
        messages.parse_header(choices.take(8))
    number = choices.number()
    kind = list(_STRUCTS)[number % len(_STRUCTS)]
    if number & 0x80 and kind in _VALUES:
        payload = conversation.changed(choices, saved.encode(_VALUES[kind]))
    else:
        payload = choices.rest()
    with allowed(StreamError):
        value = saved.decode(payload, _STRUCTS[kind])
        again = saved.encode(value)
        require(saved.encode(saved.decode(again, _STRUCTS[kind])) == again, "encoded differently")


def _table(choices: Choices) -> None:
    """Decode a table of runs."""
    payload = choices.rest()
    with allowed(StreamError):
        count = messages.decode_count(payload, len(payload))
        runs = messages.decode_runs(memoryview(payload)[4:], count)
        require(len(runs) == count, "another number of runs than counted")
        require(messages.encode_runs(runs) == payload[: messages.table_size(count)], "other runs")


# --- HELLO ----------------------------------------------------------------------------------------
@cache
def _hello_of(which: int) -> bytes:
    host = Host(config(NIC), cpu=(SKYLAKE, HASWELL)[which])
    try:
        return saved.encode(compatibility.describe(host.machine, conversation.TOKEN))
    finally:
        host.close()


def _hello(choices: Choices) -> None:
    """Compare a machine with a HELLO that has other values, and adopt what is taken."""
    which = choices.number()
    payload = conversation.changed(choices, _hello_of(which & 1))
    host = Host(config(NIC), cpu=(SKYLAKE, HASWELL)[which >> 1 & 1])
    try:
        with allowed(GodwitError):
            hello = saved.decode(payload, messages.Hello)
            compatibility.check(hello, host.machine)
            compatibility.adopt(hello, host.machine)
            host.machine.prepare(
                {device.id: device.hints for device in hello.devices if device.hints}
            )
    finally:
        host.close()


# --- RAM and state --------------------------------------------------------------------------------
@cache
def _ram_messages() -> list[conversation.Message]:
    return [
        (Kind.PREFAULT, messages.encode_runs([(0, 8), (PAGE * 100, 1)])),
        (Kind.RAM, messages.encode_runs([(0, 1), (5 * PAGE, 1)]) + b"\1" * 2 * PAGE),
        (Kind.ZERO, messages.encode_runs([(9 * PAGE, 3)])),
        (Kind.ROUND, b""),
        (Kind.STATE, STREAMS[1].read()[1]),
        (Kind.RAM, messages.encode_runs([((32 << 20) - PAGE, 1)]) + b"\2" * PAGE),
        (Kind.FAILED, saved.encode(messages.Reason("no"))),
    ]


def _receive(choices: Choices) -> None:
    """Receive what comes before READY, into RAM that is there and a machine that takes all."""
    data = conversation.compose(choices, _ram_messages())
    with logged_memory() as memory:
        memory.stop_log()  # a destination logs nothing: its guest does not run
        guest: Any = SimpleNamespace(
            machine=SimpleNamespace(memory=memory),
            nics=[],
            prepare=lambda: None,
            load=lambda *_, **__: None,
        )
        receiver = Receiver(guest)
        receiver.start()
        try:
            with allowed(GodwitError):
                receiver.receive(Received(data))
        finally:
            receiver.realtime.end()
            receiver.close()
        memory.clear()


@cache
def _recorded(which: int) -> tuple[Stream, bytes]:
    return STREAMS[which], STREAMS[which].read()[1]


def _state(choices: Choices) -> None:
    """Load a recorded state with other values into devices, which then serve a guest."""
    stream, payload = _recorded(choices.number() % len(STREAMS))
    payload = conversation.changed(choices, payload)
    with allowed(StreamError):
        state = saved.decode(payload, MachineState)
        for device in state.devices:
            if device.kind == "serial":
                _serial(saved.decode(device.state, SerialState))
            elif device.kind == "power":
                pm1 = Pm1(lambda level: None, lambda: None)
                pm1.load(saved.decode(device.state, PowerState))
        books = saved.decode(state.sections.get(ADDRESSES, b"\x80"), dict[str, AddressBookState])
        for book in books.values():
            observer = Observer(fuzz_virtio.MAC, 0.0)
            with observer.book(5000.0) as loaded:
                loaded.load(book, 5000.0)
                loaded.entries(), loaded.peers(), loaded.save(5000.0)
    with allowed(StreamError):
        for device in saved.decode(payload, MachineState).devices:
            if device.id == "nic0":
                _nic(stream, device.state, choices.rest())


def _serial(state: SerialState) -> None:
    serial = Serial(SimpleNamespace(has_space=lambda: True, write=len), lambda level: None)
    serial.load(state)
    for offset in range(8):
        serial.read(offset, 1)
        serial.write(offset, 1, 0xFF)


def _nic(stream: Stream, state: msgspec.Raw, accesses: bytes) -> None:
    with logged_memory() as memory:
        if stream.model == "e1000":
            _e1000(memory, saved.decode(state, E1000State), accesses)
        else:
            _virtio(memory, saved.decode(state, VirtioState[NetState]), accesses)


def _e1000(memory: GuestMemory, state: E1000State, accesses: bytes) -> None:
    import e1000_bench

    from . import fuzz_e1000

    bench = e1000_bench.Bench(memory, enable=False)
    try:
        bench.nic.load(state)
        bench.nic.resume()
        bench.tap.put(b"\xff" * 6 + bytes(54))
        bench.serve()
        for record in records.read(accesses):
            fuzz_e1000.play(bench, record)
            bench.serve()
        bench.nic.pause()
        saved.encode(bench.nic.save())
    finally:
        bench.close()


def _virtio(memory: GuestMemory, state: VirtioState[NetState], accesses: bytes) -> None:
    bench = fuzz_virtio.Bench(memory, vhost=False, resume=False)
    transport = state.transport
    # The recorded rings are where this RAM ends long before; what is offered here is less.
    queues = [
        msgspec.structs.replace(
            queue,
            **{
                name: getattr(queue, name) % memory.size if getattr(queue, name) < 1 << 31 else at
                for name, at in (("desc", queue.desc), ("avail", queue.avail), ("used", queue.used))
            },
        )
        for queue in transport.queues
    ]
    transport = msgspec.structs.replace(
        transport, negotiated=transport.negotiated & bench.net.offered, queues=queues
    )
    try:
        bench.pci.load(VirtioState(transport, state.device))
        bench.pci.resume()
        bench.tap.put(b"\xff" * 6 + bytes(54))
        bench.net.announce()
        bench.serve()
        for record in records.read(accesses):
            bench.guest.base = bench.pci.bar or bench.guest.base
            if fuzz_virtio.operation(record) not in ("migrate", "probe"):
                fuzz_virtio.play(bench, record)
            bench.serve()
        saved.encode(bench.save())
    finally:
        bench.close()


# --- after the commit -----------------------------------------------------------------------------
def _packets(choices: Choices) -> None:
    """Hand packets over to two NICs, and give up."""
    from packet_handover_bench import Handover

    handover = Handover(2)
    try:
        receiver = handover.receiver
        receiver.switch_over(lambda phase: None)
        base = [(kind, saved.encode(_VALUES[kind])) for kind in (Kind.PACKETS, Kind.PATH_DRAINED)]
        base.append((Kind.ACK, b""))
        receiver._received += conversation.compose(choices, base)
        with allowed(StreamError):
            while receiver._handle():
                pass
        for nic in handover.target.nics:
            require(len(nic.rx_backlog) <= MAX_FRAMES, "more packets kept than may be")
            require(nic.rx_backlog._bytes <= MAX_BYTES, "more bytes of packets kept than may be")
            nic.given()
        receiver.abandon()
        require(not receiver.holding, "a tap is held for ever")
    finally:
        handover.close()


def _peer(choices: Choices) -> None:
    """Expect each of a destination's messages from what a destination has sent."""
    base = [(kind, saved.encode(value)) for kind, value in _VALUES.items()]
    base += [(Kind.READY, b""), (Kind.ROUND, b"")]
    connection = Received(conversation.compose(choices, base))
    with allowed(GodwitError):
        for kind in (Kind.WELCOME, Kind.READY, Kind.SWITCHED, Kind.STARTED):
            if kind is Kind.READY:
                connection.expect(kind)
            else:
                connection.expect_struct(kind, _STRUCTS[kind])


# --- inputs ---------------------------------------------------------------------------------------
_patches = st.lists(
    st.builds(
        conversation.patch,
        st.integers(0, 0xFFFF),
        st.integers(0, 255),
        st.one_of(st.integers(0, 4), st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=5,
).map(lambda found: bytes([len(found)]) + b"".join(found))
_accesses = records.strategy(fuzz_virtio.COUNT, st.just(b""))
_items = st.lists(
    st.one_of(
        st.integers(0, 11).map(lambda number: bytes([conversation.WHOLE, number])),
        st.builds(
            lambda number, change: bytes([conversation.VALUES, number]) + change,
            st.integers(0, 11),
            _patches,
        ),
        st.builds(
            lambda kind, payload: bytes([conversation.OTHER, kind]) + piece(payload),
            st.integers(0, 18),
            st.binary(max_size=80),
        ),
        st.binary(max_size=12).map(lambda raw: bytes([conversation.RAW, 0]) + piece(raw)),
    ),
    max_size=10,
).map(b"".join)


def _of(kind: int, *parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(st.just(bytes([kind])), *parts).map(b"".join)


_byte = st.binary(min_size=1, max_size=1)
TARGET = Target(
    "stream",
    run,
    ("/godwit/migration/", "/godwit/hw/", "/godwit/announce/", "/godwit/spec/saved"),
    st.one_of(
        _of(STRUCT, st.binary(min_size=8, max_size=8), _byte, _patches),
        _of(STATE, _byte, _patches, _accesses),
        _of(HELLO, _byte, _patches),
        _of(RECEIVE, _items),
        _of(PACKETS, _items),
        _of(PEER, _items),
        _of(TABLE, st.binary(max_size=60)),
    ),
    (
        *(
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\x7f\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\x91" * 2000,
        ),
        *(b"\xcf" + b"\xff" * 8, b"\xcb\x7f\xf8" + bytes(6), b"\x81\xa1x"),
    ),
)
