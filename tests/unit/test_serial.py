"""The 16550A: registers, loopback, interrupts, a sink that is full, saved state."""

from collections.abc import Callable

import pytest

from godwit.hw.serial import Serial, SerialState
from godwit.spec.saved import decode, encode

RX_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
DLAB, LOOP = 0x80, 0x10
DATA, THRE, IDLE = 1, 0x20, 0x40
NONE, THR, RX = 1, 2, 4


class Sink:
    """Takes ``limit`` bytes, and more if it must."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self.data = b""

    def has_space(self) -> bool:
        return len(self.data) < self.limit

    def write(self, data: bytes) -> None:
        self.data += data


class Port:
    """A UART, its sink and its line."""

    def __init__(self, limit: int = 1000) -> None:
        self.sink = Sink(limit)
        self.edges: list[bool] = []
        self.uart = Serial(self.sink, self.edges.append)

    def read(self, register: int) -> int:
        return self.uart.read(register, 1)

    def write(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    @property
    def line(self) -> bool:
        return bool(self.edges) and self.edges[-1]


@pytest.fixture
def port() -> Port:
    return Port()


def test_registers_read_back(port: Port) -> None:
    for register, value, shown in (
        (IER, 0xFF, 0x0F),
        (LCR, 0x1B, 0x1B),
        (MCR, 0xFF, 0x1F),
        (SCR, 0xA5, 0xA5),
    ):
        port.write(register, value)
        assert port.read(register) == shown
    port.write(LSR, 0)
    port.write(MSR, 0)
    assert port.read(LSR) == THRE | IDLE


def test_the_divisor_hides_behind_dlab(port: Port) -> None:
    port.write(LCR, DLAB | 3)
    port.write(RX_THR, 0x34)
    port.write(IER, 0x12)
    assert (port.read(RX_THR), port.read(IER)) == (0x34, 0x12)
    port.write(LCR, 3)
    assert (port.read(RX_THR), port.read(IER)) == (0, 0)
    assert port.sink.data == b""


def test_the_fifo_makes_it_a_16550a(port: Port) -> None:
    assert port.read(IIR_FCR) == NONE
    port.write(IIR_FCR, 1)
    assert port.read(IIR_FCR) == 0xC0 | NONE
    port.write(IIR_FCR, 0)
    assert port.read(IIR_FCR) == NONE


def test_bytes_go_out_and_come_in(port: Port) -> None:
    for byte in b"hello":
        port.write(RX_THR, byte)
    assert port.sink.data == b"hello"
    assert not port.read(LSR) & DATA
    assert port.uart.receive(b"yes") == 3
    seen = b""
    while port.read(LSR) & DATA:
        seen += bytes((port.read(RX_THR),))
    assert seen == b"yes"
    assert port.read(RX_THR) == 0


def test_input_is_bounded_and_says_so(port: Port) -> None:
    assert port.uart.receive(bytes(70_000)) == 65_536
    assert port.uart.receive(b"x") == 0
    port.read(RX_THR)
    assert port.uart.receive(b"xy") == 1
    assert port.uart.receive(b"z") == 0


def typed(port: Port) -> bytes:
    """All that a driver reads while there is something."""
    seen = bytearray()
    while port.read(LSR) & DATA:
        seen.append(port.read(RX_THR))
    return bytes(seen)


def test_what_was_typed_before_the_driver_came_is_not_lost(port: Port) -> None:
    port.uart.receive(b"typed early, more than sixteen bytes")
    assert port.read(LSR) & DATA  # a driver that polls would read it
    # Linux's autoconfig and startup (drivers/tty/serial/8250/8250_port.c).
    port.write(IER, 0x0F)
    port.write(IER, 0)
    for fcr in (1, 7, 0):
        port.write(IIR_FCR, fcr)
    assert not port.read(LSR) & DATA
    assert port.read(RX_THR) == 0
    port.uart.receive(b", and late")
    assert port.read(RX_THR) == 0
    port.write(IER, 5)
    assert port.line
    assert typed(port) == b"typed early, more than sixteen bytes, and late"
    assert not port.line
    # A driver with interrupts on that clears the FIFO means what has arrived.
    port.uart.receive(bytes(20))
    port.write(IIR_FCR, 3)
    assert len(typed(port)) == 4


def test_rts_holds_the_line(port: Port) -> None:
    port.write(IER, 1)
    port.uart.receive(b"no driver has raised it")
    assert typed(port) == b"no driver has raised it"
    port.write(MCR, 0x0B)
    port.uart.receive(b"up")
    assert typed(port) == b"up"
    port.write(MCR, 0x09)
    port.uart.receive(b"down, so it waits")
    assert not port.line
    assert typed(port) == b""
    port.write(MCR, 0x0B)
    assert port.line
    assert typed(port) == b"down, so it waits"


def test_a_pasted_text_comes_in_pieces_and_whole() -> None:
    later: list[Callable[[], None]] = []
    rooms: list[int] = []
    edges: list[bool] = []
    uart = Serial(Sink(), edges.append, later=later.append)
    uart.on_room = lambda: rooms.append(1)
    text = bytes(range(256)) * 800
    waiting, seen = bytearray(text), bytearray()
    uart.write(IER, 1, 1)
    del waiting[: uart.receive(bytes(waiting))]
    while len(seen) < len(text):
        if rooms:
            rooms.clear()
            del waiting[: uart.receive(bytes(waiting))]
        before = len(seen)
        while uart.read(LSR, 1) & DATA:
            seen.append(uart.read(RX_THR, 1))
        assert len(seen) - before <= 16
        assert len(later) <= 1
        while later:
            later.pop()()
    assert seen == text


def test_waiting_input_moves_and_interrupts_there(port: Port) -> None:
    later: list[Callable[[], None]] = []
    edges: list[bool] = []
    uart = Serial(Sink(), edges.append, later=later.append)
    uart.write(IER, 1, 1)
    uart.receive(bytes(range(40)))
    assert bytes(uart.read(RX_THR, 1) for _ in range(16)) == bytes(range(16))
    assert edges == [True, False]  # the next come later
    port.uart.load(decode(encode(uart.save()), SerialState))
    port.uart.resume()
    assert port.line
    assert typed(port) == bytes(range(16, 40))
    uart.pause()
    assert edges[-1]  # before the interrupt controllers are saved
    uart.reset()
    assert uart.save().received == bytes(range(32, 40)), "nobody took it"


def test_loopback(port: Port) -> None:
    port.write(MCR, LOOP)
    port.write(RX_THR, 0x55)
    assert port.sink.data == b""
    assert port.read(RX_THR) == 0x55
    # Linux's autoconfig: with MCR = LOOP | OUT2 | RTS, the modem status shows DCD and CTS.
    port.write(MCR, LOOP | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    for mcr, msr in ((1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80)):
        port.write(MCR, LOOP | mcr)
        assert port.read(MSR) == msr
    port.write(MCR, 0)
    assert port.read(MSR) == 0xB0


def test_input_interrupts_until_it_is_read(port: Port) -> None:
    port.uart.receive(b"ab")
    assert not port.line
    port.write(IER, 1)
    assert port.line
    assert port.read(IIR_FCR) == RX
    port.read(RX_THR)
    assert port.line
    port.read(RX_THR)
    assert not port.line
    assert port.read(IIR_FCR) == NONE
    assert port.edges == [True, False]


def test_the_empty_transmitter_interrupts_once_a_byte(port: Port) -> None:
    port.write(IER, 2)
    assert port.line
    assert port.read(IIR_FCR) == THR
    assert not port.line  # reading IIR took the cause away
    port.write(RX_THR, 65)
    assert port.line
    port.write(IER, 0)
    assert not port.line
    port.write(IER, 2)
    assert port.line


def test_input_comes_before_the_transmitter(port: Port) -> None:
    port.write(IER, 3)
    port.uart.receive(b"x")
    assert port.read(IIR_FCR) == RX
    port.read(RX_THR)
    assert port.read(IIR_FCR) == THR
    assert port.read(IIR_FCR) == NONE
    assert not port.line


def test_a_full_sink_is_not_ready_and_loses_nothing() -> None:
    port = Port(limit=3)
    port.write(IER, 2)
    for byte in b"abc":
        assert port.read(LSR) & THRE
        port.write(RX_THR, byte)
    assert not port.read(LSR) & (THRE | IDLE)
    assert not port.line
    # A driver that does not look (Linux's console gives up waiting after a while) loses nothing.
    port.write(RX_THR, ord("d"))
    assert port.sink.data == b"abcd"
    assert port.read(IIR_FCR) == NONE
    port.sink.limit = 100
    port.uart.space_again()
    assert port.line
    assert port.read(IIR_FCR) == THR
    assert port.read(LSR) & THRE


def test_space_again_interrupts_only_who_asked() -> None:
    port = Port(limit=0)
    port.uart.space_again()
    assert port.edges == []


def test_wider_accesses_are_bytes(port: Port) -> None:
    port.uart.write(SCR, 4, 0x1234_56AB)
    assert port.uart.read(SCR, 4) == 0xAB


def test_state_moves(port: Port) -> None:
    for register, value in ((IIR_FCR, 1), (LCR, DLAB), (RX_THR, 7), (IER, 8), (LCR, 3)):
        port.write(register, value)
    port.write(IER, 3)
    port.write(MCR, 0x0B)
    port.write(SCR, 0x5A)
    port.uart.receive(b"waiting")
    state = decode(encode(port.uart.save()), SerialState)
    other = Port()
    other.uart.load(state)
    assert other.uart.save() == port.uart.save()
    assert other.edges == []  # the line's level lives in the interrupt controllers' state
    assert bytes(other.read(RX_THR) for _ in range(7)) == b"waiting"
    assert other.read(IIR_FCR) & 0x0F == THR
    assert other.edges == [False]


def test_reset(port: Port) -> None:
    port.write(IER, 3)
    port.uart.receive(b"x")
    port.uart.reset()
    assert port.uart.save() == Port().uart.save()


def test_a_driver_that_loops_fills_no_memory(port: Port) -> None:
    port.uart.receive(bytes(65_530))
    port.write(IER, 1)
    port.write(IER, 0)
    for _ in range(5000):
        port.write(MCR, LOOP)
        for _ in range(16):
            port.write(RX_THR, 0x55)
        port.write(MCR, 0)
        port.write(IIR_FCR, 3)
    for _ in range(20):
        port.write(MCR, LOOP)
        port.write(RX_THR, 0x55)
    state = decode(encode(port.uart.save()), SerialState)
    assert len(state.received) <= 65_536
    other = Port()
    other.uart.load(state)


def test_a_looped_receiver_does_not_hear_the_line(port: Port) -> None:
    port.write(IER, 1)
    port.write(MCR, LOOP)
    port.uart.receive(b"typed")
    assert typed(port) == b""
    port.write(RX_THR, 0x55)
    assert typed(port) == b"U"
    port.write(MCR, 0)
    assert typed(port) == b"typed"
