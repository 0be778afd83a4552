"""A guest at an e1000's registers, ports and rings.

Findings: an exception; a register that reads as more than its width; a write to RAM that no dirty
log has; frames kept without bound; a state that is saved and is not the same when loaded; a
controller that does not come back after all that by a reset.
"""

from __future__ import annotations

from hypothesis import strategies as st

from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.state import E1000State
from godwit.hw.nic.rx_backlog import MAX_BYTES, MAX_FRAMES
from godwit.spec.saved import decode, encode

from . import records
from .guests import logged_memory
from .records import Record
from .target import Target, allowed, require

#: Registers where something happens; the others are the operands' own.
REGISTERS = (
    *(regs.CTRL, regs.CTRL_DUP, regs.STATUS, regs.EECD, regs.EERD, regs.MDIC, regs.ICR, regs.ICS),
    *(regs.IMS, regs.IMC, regs.RCTL, regs.TCTL, regs.RDT, regs.TDT),
    *(regs.RDBAL, regs.TDBAL, regs.RDBAL + regs.BAH, regs.TDBAL + regs.BAH),
    *(regs.RDBAL + regs.HEAD, regs.TDBAL + regs.HEAD, regs.RDBAL + regs.LEN, regs.TDBAL + regs.LEN),
    *(regs.RA, regs.RA + 4, regs.MTA, regs.VFTA),
)
#: The first byte of an input: not set up, promiscuous, and the ring's size.
RAW, PROMISCUOUS, SIZES = 1, 2, (8, 16, 64, 256)
CTRL_RST = 1 << 26


def run(data: bytes) -> None:
    """Play the accesses of an input, and have the driver begin anew."""
    from e1000_bench import Bench

    how = data[0] if data else 0
    with logged_memory() as memory:
        bench = Bench(memory, size=SIZES[how >> 2 & 3])
        try:
            if not how & RAW:
                more = regs.RCTL_UPE | regs.RCTL_MPE if how & PROMISCUOUS else 0
                bench.driver.start(regs.RCTL_BAM | more)
                bench.driver.offer(bench.driver.size - 1)
            for record in records.read(data[1:]):
                play(bench, record)
                _settle(bench)
            _begin_anew(bench)
        finally:
            bench.close()


def _settle(bench: object) -> None:
    bench.loop.run_once(0)
    bench.sent()
    backlog = bench.nic.rx_backlog
    require(len(backlog) <= MAX_FRAMES + 1, "more frames kept than may be")
    require(backlog._bytes <= MAX_BYTES + (1 << 17), "more bytes of frames kept than may be")


def _begin_anew(bench: object) -> None:
    from e1000_bench import BAR, IO, MASTER, MEMORY

    bench.nic.rx_backlog.release()
    bench.write_config(0x10, 4, BAR)
    bench.write_config(4, 2, IO | MEMORY | MASTER)
    bench.write(regs.CTRL, CTRL_RST)
    while bench.tap.drain():
        pass
    bench.nic.rx_backlog.clear()
    bench.driver.start()
    bench.driver.offer(4)
    bench.driver.send(b"\xff" * 60)
    bench.serve()
    require(bench.driver.tx_done(0), "a controller that was reset does not send")


# --- operations -----------------------------------------------------------------------------------
def play(bench: object, record: Record) -> None:
    """Do what one record names."""
    _OPS[record.op % len(_OPS)](bench, record)


def _at(r: Record) -> int:
    from e1000_bench import BAR

    return BAR + (REGISTERS[r.a % len(REGISTERS)] if r.a < 0x100 else r.b % 0x2_0000)


def _write(bench: object, r: Record) -> None:
    bench.mmio.write(_at(r), 4, r.limited(4))


def _odd_write(bench: object, r: Record) -> None:
    bench.mmio.write(_at(r) + (r.a >> 8 & 3), r.width, r.limited(r.width))


def _read(bench: object, r: Record) -> None:
    value = bench.mmio.read(_at(r), r.width)
    require(0 <= value < 1 << 8 * r.width, f"register {_at(r):#x} reads as {value:#x}")


def _port(bench: object, r: Record) -> None:
    from e1000_bench import PORT

    port = PORT + r.a % 64
    bench.ports.write(port, r.port_width, r.limited(r.port_width))
    value = bench.ports.read(port, r.port_width)
    require(0 <= value < 1 << 8 * r.port_width, f"port {port:#x} reads as {value:#x}")


def _config(bench: object, r: Record) -> None:
    bench.write_config(r.a % 256, r.port_width, r.limited(r.port_width))
    value = bench.read_config(r.a % 256, r.port_width)
    require(0 <= value < 1 << 8 * r.port_width, f"configuration {r.a:#x} reads as {value:#x}")


def _decode_again(bench: object, r: Record) -> None:
    """Give the controller its BARs back, which another record may have taken."""
    from e1000_bench import BAR, IO, MASTER, MEMORY

    bench.write_config(0x10, 4, BAR)
    bench.write_config(4, 2, IO | MEMORY | MASTER)


def _descriptor(bench: object, r: Record) -> None:
    """Store a descriptor: the value is its upper half, and b the address near the ring, or far."""
    driver = bench.driver
    base = driver.tx if r.size & 1 else driver.rx
    address = driver.tx_room + r.b if r.b < 0x10_0000 else r.b << (32 if r.size & 2 else 0)
    fields = address.to_bytes(8, "little") + r.value.to_bytes(8, "little")
    bench.memory.write(base + 16 * (r.a % driver.size), fields)


def _transmit(bench: object, r: Record) -> None:
    """Store the next transmit descriptor, whose bits come from the operands, and notify."""
    upper = r.value & ~0xF_FFFF & (1 << 64) - 1 | r.b % 0x1_0000
    if r.size & 1:
        upper |= 1 << 24  # EOP
    bench.driver.put(bench.driver.tx_room + r.a, upper)
    bench.driver.kick()


def _send(bench: object, r: Record) -> None:
    """Send a frame in pieces, perhaps with a context before."""
    from tests.fakes.e1000 import EOP, RS

    driver = bench.driver
    if r.size & 2:
        low = r.value.to_bytes(8, "little")
        driver.context(
            (low[0], low[1], 0), (low[2], low[3], 0), low[4], header_length=low[5], mss=r.b >> 16
        )
        driver.data(bytes(r.b % 0x1_0000), EOP | RS | 4 & low[6], popts=low[7] & 3)
    else:
        driver.legacy(bytes(r.a % 0x4000), EOP | RS | low_byte(r) & 0x40)
    driver.kick()


def low_byte(r: Record) -> int:
    """Return the lowest byte of a record's value."""
    return r.value & 0xFF


def _offer(bench: object, r: Record) -> None:
    bench.driver.offer(r.a % (bench.driver.size + 2))


def _frame(bench: object, r: Record) -> None:
    from e1000_bench import MAC

    to = (b"\xff" * 6, MAC, r.value.to_bytes(8, "little")[:6])[r.b % 3]
    with allowed(OSError):
        bench.tap.put(to + r.value.to_bytes(8, "big") + bytes(r.a % 17_000))


def _pause(bench: object, r: Record) -> None:
    bench.nic.pause()
    if r.a & 1:
        bench.nic.reset()
    bench.nic.resume()


def _backlog(bench: object, r: Record) -> None:
    backlog = bench.nic.rx_backlog
    kind = r.a % 4
    if kind == 0:
        backlog.hold()
    elif kind == 1:
        backlog.inject(
            [r.value.to_bytes(8, "little") + bytes(r.b % 66_000)] * (1 + (r.size & 3) * 30)
        )
    elif kind == 2:
        backlog.release()
    else:
        bench.nic.pause()
        backlog.take(r.b % 64)
        backlog.drain()
        bench.nic.resume()


def _views(bench: object, r: Record) -> None:
    bench.nic.rx_filter()
    bench.nic.counters()
    require(len(bench.nic.mac) == 6, "the MAC address has not six bytes")


def _migrate(bench: object, r: Record) -> None:
    from e1000_bench import Bench

    bench.nic.pause()
    state = bench.nic.save()
    other = Bench(bench.memory, enable=False)
    try:
        other.nic.load(decode(encode(state), E1000State))
        require(other.nic.save() == state, "the state that was loaded differs from the saved one")
    finally:
        other.close()
        bench.nic.resume()


def _start(bench: object, r: Record) -> None:
    _decode_again(bench, r)
    bench.driver.start(r.limited(4) if r.a & 1 else regs.RCTL_BAM)
    bench.driver.offer(r.b % bench.driver.size)


_OPS = (
    *(_write, _write, _write, _odd_write, _read, _port, _config, _decode_again, _descriptor),
    *(_descriptor, _transmit, _transmit, _send, _send, _offer, _frame, _frame, _pause, _backlog),
    *(_views, _migrate, _start),
)
OPS = {operation.__name__.strip("_"): index for index, operation in enumerate(_OPS)}

TARGET = Target(
    "e1000",
    run,
    ("/godwit/hw/nic/", "/godwit/hw/pci", "/godwit/hw/irq"),
    records.strategy(len(_OPS), st.binary(min_size=1, max_size=1)),
    record=records.SIZE,
    head=1,
)
