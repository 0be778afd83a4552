"""A guest at a virtio-net's registers and rings, with both backends.

Findings: an exception; a register that reads as more than its width; a write to RAM that no dirty
log has; a ring handed to vhost that is not in RAM; frames kept without bound; a state that is saved
and is not the same when loaded; a device that does not come back after all that by a reset.
"""

from __future__ import annotations

from hypothesis import strategies as st

from godwit.hw.memory import GuestMemory
from godwit.hw.nic.rx_backlog import MAX_BYTES, MAX_FRAMES
from godwit.hw.virtio.net.backend import Backend
from godwit.hw.virtio.net.device import NetState, VirtioNet
from godwit.hw.virtio.net.userspace import UserspaceBackend
from godwit.hw.virtio.net.vhost import VhostBackend
from godwit.hw.virtio.pci import VirtioPci, VirtioState
from godwit.spec.saved import decode, encode
from tests.fakes.slot import Board
from tests.fakes.tap import FakeTap

from . import records
from .guests import CheckedVhost, check_queue, logged_memory
from .records import Record
from .target import Target, allowed, require

BAR, SLOT = 0xE000_0000, 1
MAC = bytes.fromhex("525400123456")
_ALL = (1 << 64) - 1
_READY = 15
#: Classes of control requests: receive modes, MAC addresses, VLANs, announcement.
CLASSES = 4
#: The first byte of an input: with vhost, without a probe, without event index, small rings.
VHOST, UNPROBED, PLAIN, SMALL, UNMERGED = 1, 2, 4, 8, 16


class Bench:
    """A virtio-net on a real backend; :class:`virtio_bench.Guest` drives it."""

    def __init__(self, memory: GuestMemory, vhost: bool, resume: bool = True) -> None:
        from virtio_bench import Guest

        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio = board.ports, board.mmio
        self.tap = FakeTap()
        self.vhost = vhost
        self.net = VirtioNet("nic0", MAC, self.tap, memory, self.loop, self._backend, mtu=1500)
        self.pci = VirtioPci(self.net, board.slot(SLOT))
        self.guest = Guest(self)
        if resume:
            self.pci.resume()

    def _backend(self, net: VirtioNet) -> Backend:
        def report(message: str) -> None:
            net.on_guest_error(message)

        if self.vhost:
            device = CheckedVhost(self.memory)
            return VhostBackend(
                self.tap, net.rx_backlog, self.memory, self.loop, net.lock, report, lambda: device
            )
        return UserspaceBackend(self.tap, net.rx_backlog, self.loop, net.lock, net.accepts, report)

    def serve(self) -> None:
        """Let the event loop do what is due."""
        self.loop.run_once(0)

    def save(self) -> VirtioState[NetState]:
        """Return the state of the paused device."""
        self.pci.pause()
        return self.pci.save()

    def close(self) -> None:
        """Close the device, its tap and the loop."""
        self.pci.pause()
        self.pci.close()
        self.board.close()


def run(data: bytes) -> None:
    """Play the accesses of an input, and have the driver begin anew."""
    how = data[0] if data else 0
    with logged_memory() as memory:
        bench = Bench(memory, bool(how & VHOST))
        try:
            bench.guest.write_config(4, 2, 6)
            if not how & UNPROBED:
                features = _ALL & ~(1 << 29 if how & PLAIN else 0)
                features &= ~(1 << 15 if how & UNMERGED else 0)
                bench.guest.probe(features, 2 if how & SMALL else 64)
            for record in records.read(data[1:]):
                play(bench, record)
                _settle(bench)
            _begin_anew(bench)
        finally:
            bench.close()


def _settle(bench: Bench) -> None:
    bench.guest.base = bench.pci.bar or bench.guest.base
    bench.serve()
    if bench.tap.attached:
        while bench.tap.get() is not None:
            pass
    backlog = bench.net.rx_backlog
    require(len(backlog) <= MAX_FRAMES + 1, "more frames kept than may be")
    require(backlog._bytes <= MAX_BYTES + (1 << 17), "more bytes of frames kept than may be")
    for queue in bench.net.queues:
        check_queue(queue)


def _begin_anew(bench: Bench) -> None:
    """The driver of another kernel finds the device as after power-on."""
    bench.net.rx_backlog.release()
    guest = bench.guest
    guest.base = BAR
    guest.write_config(0x10, 4, BAR)
    guest.write_config(4, 2, 6)
    guest.probe()
    require(guest.status == _READY, f"status {guest.status:#x} after a reset and a probe")
    require(guest.command(0, 0, b"\1") == 0, "the control queue does not answer after a reset")


# --- operations -----------------------------------------------------------------------------------
def play(bench: Bench, record: Record) -> None:
    """Do what one record names."""
    _OPS[record.op % len(_OPS)](bench, record)


def _read(bench: Bench, r: Record) -> None:
    value = bench.mmio.read(bench.guest.base + r.a % 0x4400, r.width)
    require(0 <= value < 1 << 8 * r.width, f"register {r.a:#x} reads as {value:#x}")


def _write(bench: Bench, r: Record) -> None:
    bench.mmio.write(bench.guest.base + r.a % 0x4400, r.width, r.limited(r.width))


def _common(bench: Bench, r: Record) -> None:
    bench.mmio.write(bench.guest.base + r.a % 0x3C, r.width, r.limited(r.width))


def _queue_register(bench: Bench, r: Record) -> None:
    """Select a queue, which there may be or not, and access one of its registers."""
    base = bench.guest.base
    bench.mmio.write(base + 0x16, 2, r.size % 5)
    at, width = 0x18 + r.a % 0x20, (2, 4, 2, 8)[r.size >> 3 & 3]
    bench.mmio.write(base + at, width, r.limited(width))
    value = bench.mmio.read(base + at, width)
    require(0 <= value < 1 << 8 * width, f"queue register {at:#x} reads as {value:#x}")


def _config_read(bench: Bench, r: Record) -> None:
    value = bench.guest.read_config(r.a % 256, r.port_width)
    require(0 <= value < 1 << 8 * r.port_width, f"configuration {r.a:#x} reads as {value:#x}")


def _config_write(bench: Bench, r: Record) -> None:
    bench.guest.write_config(r.a % 256, r.port_width, r.limited(r.port_width))


def _queue(r: Record) -> int:
    return r.size % 3


def _ring(bench: Bench, r: Record) -> None:
    """Store eight bytes somewhere in a ring."""
    base = 0x10_0000 * (_queue(r) + 1)
    bench.memory.write(base + r.a % 0x2000, r.value.to_bytes(8, "little"))


def _descriptor(bench: Bench, r: Record) -> None:
    """Store a descriptor, by whose address a small value is one near the ring.

    What follows is the next descriptor, or with bit 11 of ``a`` one of the first 16.
    """
    base = 0x10_0000 * (_queue(r) + 1)
    address = r.value if r.value >> 20 else base + 0x2000 + r.value
    fields = address.to_bytes(8, "little") + r.b.to_bytes(4, "little")
    following = r.a >> 12 if r.a & 0x800 else r.a + 1 & 0x3F
    fields += (r.a >> 8 & 7).to_bytes(2, "little") + following.to_bytes(2, "little")
    bench.memory.write(base + 16 * (r.a & 0x3F), fields)


def _publish(bench: Bench, r: Record) -> None:
    """Make some head available, and notify as a rule."""
    queues = bench.guest.queues
    if queues:
        index = _queue(r) % len(queues)
        queues[index].publish(r.a % 66)
        if r.b % 4:
            bench.guest.kick(index)


def _kick(bench: Bench, r: Record) -> None:
    bench.guest.kick(r.a % 4, r.port_width)


def _buffer(bench: Bench, r: Record) -> None:
    """Offer a well-formed buffer of some length, with the value as its content, and notify."""
    index, queues = _queue(r), bench.guest.queues
    if index >= len(queues):
        return
    driver = queues[index]
    head, following = r.a % driver.size, (r.a + 1) % driver.size
    content = r.value.to_bytes(8, "little")
    length = r.b % 0x1_0200
    at = driver.space + 0x4000
    if index == 0:
        driver.set_descriptor(head, at, length, 2, 0)
    elif index == 1:
        bench.memory.write(at, bytes(12) + content * 2)
        driver.set_descriptor(head, at, length, 0, 0)
    else:
        bench.memory.write(at, content * 8)
        driver.set_descriptor(head, at, length % 200, 1, following)
        driver.set_descriptor(following, at + 0x1_0000, 1, 2, 0)
    driver.publish(head)
    bench.guest.kick(index)


def _frame(bench: Bench, r: Record) -> None:
    """A frame comes from the network, to all, to the guest or to another; or the tap is deleted."""
    if r.b % 64 == 63:
        bench.tap.delete()
        bench.net.rx_backlog.check()
    to = (b"\xff" * 6, MAC, r.value.to_bytes(8, "little")[:6])[r.b % 3]
    with allowed(OSError):
        bench.tap.put(to + bytes(r.a % 65_000))


def _announce(bench: Bench, r: Record) -> None:
    bench.net.announce()
    bench.net.rx_filter()
    bench.net.counters()


def _pause(bench: Bench, r: Record) -> None:
    bench.pci.pause()
    if r.a & 1:
        bench.pci.reset()
    bench.pci.resume()


def _backlog(bench: Bench, r: Record) -> None:
    """What a packet handover does to a NIC."""
    backlog = bench.net.rx_backlog
    kind = r.a % 5
    if kind == 0:
        backlog.hold()
    elif kind == 1:
        backlog.inject(
            [r.value.to_bytes(8, "little") + bytes(r.b % 66_000)] * (1 + (r.size & 3) * 30)
        )
    elif kind == 2:
        backlog.release()
    elif kind == 3:
        bench.pci.pause()
        backlog.take(r.b % 64)
        bench.pci.resume()
    else:
        bench.pci.pause()
        backlog.drain()
        bench.pci.resume()


def _migrate(bench: Bench, r: Record) -> None:
    """Save the state, and load it into another device, which saves the same."""
    state = bench.save()
    other = Bench(bench.memory, bench.vhost, resume=False)
    try:
        other.pci.load(decode(encode(state), bench.pci.State))
        require(other.save() == state, "the state that was loaded differs from the saved one")
        if r.a & 1:
            other.pci.prepare(bench.pci.hints())
    finally:
        other.close()
        bench.pci.resume()


def _log(bench: Bench, r: Record) -> None:
    """The dirty log of vhost goes on and off in the middle of traffic."""
    backend = bench.net.backend
    if isinstance(backend, VhostBackend):
        if r.a % 3 == 0:
            backend.start_log()
        elif backend._logs:
            if r.a % 3 == 1:
                backend.take_log()
            else:
                backend.stop_log()


def _probe(bench: Bench, r: Record) -> None:
    """The driver begins anew."""
    guest = bench.guest
    guest.write_config(4, 2, 6)
    guest.write_config(0x10, 4, BAR)
    guest.base = BAR
    guest.probe(r.value | 1 << 32 if r.a & 1 else _ALL, 1 << r.size * 2)


_OPS = (
    *(_read, _write, _write, _common, _queue_register, _config_read, _config_write, _ring, _ring),
    *(_descriptor, _publish, _kick, _buffer, _buffer, _frame, _announce, _pause, _backlog),
    *(_migrate, _log, _probe),
)
COUNT = len(_OPS)
OPS = {operation.__name__.strip("_"): index for index, operation in enumerate(_OPS)}


def operation(record: Record) -> str:
    """Return the name of what a record does."""
    return _OPS[record.op % COUNT].__name__.strip("_")


TARGET = Target(
    "virtio",
    run,
    ("/godwit/hw/virtio/", "/godwit/hw/nic/", "/godwit/hw/pci", "/godwit/hw/irq"),
    records.strategy(len(_OPS), st.binary(min_size=1, max_size=1)),
    record=records.SIZE,
    head=1,
)
