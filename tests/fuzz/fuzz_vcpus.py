"""Several vCPUs at once on two NICs, with the event loop, a network and an operator.

The input is what each vCPU does, and the operator. Threads change places between any two lines of
the devices, not only where the interpreter would let them: each sleeps for a moment at some lines.
How they interleave is still the machine's own, so a replay need not show a finding again at the
first time.

Findings: an exception in a thread; a thread that does not come to an end; a device that cannot be
saved, or does not come back after all that by a reset.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any
from zlib import crc32

from hypothesis import strategies as st

from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.nic import E1000
from godwit.spec.saved import encode
from tests.fakes.e1000 import Driver
from tests.fakes.tap import FakeTap

from . import fuzz_e1000, fuzz_virtio, records
from .guests import logged_memory
from .records import Record
from .target import Finding, Target, allowed

VCPUS = 4
#: Long enough for a host whose CPUs are busy with something else, seconds.
_DEADLOCK_S = 20.0
#: The share of the lines at which a thread sleeps.
_SHARE = 0.02
_E1000_SLOT, _E1000_GSI_BAR = 2, 0xE010_0000
_PORT = 0xC100


class Host:
    """Both NICs on one board, and the threads around them."""

    def __init__(self, memory: Any, vhost: bool) -> None:
        self.bench = bench = fuzz_virtio.Bench(memory, vhost)
        self.tap = FakeTap(name="tap1")
        self.nic = E1000("nic1", fuzz_virtio.MAC, self.tap, bench.board.slot(_E1000_SLOT))
        bench.guest.write_config(4, 2, 6)
        bench.guest.write_config(4, 2, 7, slot=_E1000_SLOT)
        self.nic.resume()
        bench.guest.probe()
        # At another place of RAM than the rings of virtio-net.
        self.driver = Driver(memory, self._read, self._write, size=16, base=0xA0_0000)
        self.driver.start()
        self.driver.offer(15)
        self.errors: list[BaseException] = []
        self.stopping = threading.Event()
        self._pausing = threading.Event()
        self._changed = threading.Condition()
        self._running = 0
        # At the loop's thread, and no more an error of the test's.
        bench.loop._on_error = self.errors.append

    def _read(self, offset: int) -> int:
        return self.bench.mmio.read(_E1000_GSI_BAR + offset, 4)

    def _write(self, offset: int, value: int) -> None:
        self.bench.mmio.write(_E1000_GSI_BAR + offset, 4, value)

    # --- threads ----------------------------------------------------------------------------------
    def vcpu(self, accesses: Sequence[Record]) -> None:
        """Do one vCPU's accesses, and stand still while the operator pauses the machine."""
        for record in accesses:
            self._exit()
            with self._changed:
                self._running += 1
            try:
                _access(self, record)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def _exit(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._pausing.is_set(), _DEADLOCK_S)

    def loop(self) -> None:
        """Run the event loop."""
        while not self.stopping.is_set():
            self.bench.loop.run_once(0.002)

    def network(self) -> None:
        """Bring frames to both taps, and take what comes out."""
        while not self.stopping.is_set():
            for tap in (self.bench.tap, self.tap):
                with allowed(OSError):
                    tap.put(b"\xff" * 6 + bytes(54))
                while tap.get() is not None:
                    pass
            time.sleep(0.0005)

    def operate(self, what: int) -> None:
        """Pause, save and resume both NICs, as an operator or a migration does."""
        self._pausing.set()
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._running, _DEADLOCK_S):
                    raise Finding("a vCPU does not stop")
            pci, nic, net = self.bench.pci, self.nic, self.bench.net
            pci.pause()
            nic.pause()
            encode(pci.save())
            encode(nic.save())
            if what & 1:
                pci.reset()
                nic.reset()
            if what & 2:
                for one in (net, nic):
                    one.rx_backlog.hold()
                    one.rx_backlog.inject([bytes(12) + b"\xff" * 6 + bytes(80)] * 3)
            pci.resume()
            nic.resume()
        finally:
            with self._changed:
                self._pausing.clear()
                self._changed.notify_all()
        net.announce()
        net.rx_filter()
        nic.rx_filter()
        net.rx_backlog.release()
        nic.rx_backlog.release()

    def close(self) -> None:
        """Close both devices."""
        self.nic.pause()
        self.nic.close()
        self.bench.close()


def _access(host: Host, r: Record) -> None:
    """Do one access as a vCPU does, to registers, configuration space or RAM."""
    bench, kind = host.bench, r.op % 8
    if kind == 0:
        bench.mmio.write(_E1000_GSI_BAR + _register(r), 4, r.limited(4))
    elif kind == 1:
        bench.mmio.read(_E1000_GSI_BAR + _register(r), r.width)
    elif kind == 2:
        at = r.a % 0x4000 if r.b & 1 else r.a % 0x3C  # half of them at the common registers
        bench.mmio.write(fuzz_virtio.BAR + at, r.width, r.limited(r.width))
    elif kind == 3:
        bench.mmio.read(fuzz_virtio.BAR + r.a % 0x4000, r.width)
    elif kind == 4:
        # Two accesses, between which another vCPU may come: a driver has a lock for it.
        bench.ports.write(0xCF8, 4, 1 << 31 | (1 + r.size % 2) << 11 | r.a & 0xFC)
        bench.ports.write(0xCFC, r.port_width, r.limited(r.port_width))
    elif kind == 5:
        base = (0x10_0000, 0x20_0000, 0x30_0000, 0xA0_0000)[r.size % 4]
        bench.memory.write(base + r.a % 0x800, r.value.to_bytes(8, "little"))
    elif kind == 6:
        bench.mmio.write(fuzz_virtio.BAR + 0x2000 + 4 * (r.a % 3), 2, r.a % 3)
    else:
        bench.ports.write(_PORT + r.a % 8, 4, r.limited(4))
        bench.ports.read(_PORT + 4, 4)


def _register(r: Record) -> int:
    return fuzz_e1000.REGISTERS[r.a % len(fuzz_e1000.REGISTERS)]


def run(data: bytes) -> None:
    """Run all threads until the vCPUs have done what the input has for each."""
    how = data[0] if data else 0
    accesses = list(records.read(data[1:]))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with logged_memory() as memory:
            host = Host(memory, bool(how & fuzz_virtio.VHOST))
            try:
                _run(host, accesses, how)
                _begin_anew(host)
            finally:
                host.close()
    finally:
        sys.setswitchinterval(interval)


def _run(host: Host, accesses: Sequence[Record], how: int) -> None:
    shares = [accesses[number::VCPUS] for number in range(VCPUS)]
    seed = crc32(b"".join(record.encode() for record in accesses))
    vcpus = [
        _thread(host, lambda share=share: host.vcpu(share), seed + number)
        for number, share in enumerate(shares)
    ]
    others = [_thread(host, host.loop, seed - 1), _thread(host, host.network, seed - 2)]
    for pause in range(1 + (how >> 4 & 3)):
        host.operate(how >> 2 & 3 if pause == 0 else 0)
    for thread in vcpus:
        thread.join(_DEADLOCK_S)
    host.stopping.set()
    for thread in others:
        thread.join(_DEADLOCK_S)
    if any(thread.is_alive() for thread in (*vcpus, *others)):
        raise Finding("a thread does not come to an end")
    if host.errors:
        raise host.errors[0]


def _yields(seed: int) -> Callable[[FrameType, str, Any], Any]:
    """Return a trace function that lets other threads go on at some lines of the devices."""
    rnd = random.Random(seed)

    def lines(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and rnd.random() < _SHARE:
            time.sleep(0.00001)
        return lines

    def calls(frame: FrameType, event: str, arg: Any) -> Any:
        return lines if "/godwit/hw/" in frame.f_code.co_filename else None

    return calls


def _thread(host: Host, work: Callable[[], None], seed: int) -> threading.Thread:
    def main() -> None:
        sys.settrace(_yields(seed))
        try:
            work()
        except BaseException as error:
            host.errors.append(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    return thread


def _begin_anew(host: Host) -> None:
    """The drivers of another kernel find both devices as after power-on."""
    bench = host.bench
    bench.loop._on_error = None
    fuzz_virtio._begin_anew(bench)
    bench.guest.write_config(0x10, 4, _E1000_GSI_BAR, slot=_E1000_SLOT)
    bench.guest.write_config(4, 2, 7, slot=_E1000_SLOT)
    host._write(regs.CTRL, fuzz_e1000.CTRL_RST)
    while host.tap.drain():
        pass
    host.nic.rx_backlog.clear()
    host.driver.start()
    host.driver.send(b"\xff" * 60)
    for _ in range(4):
        bench.loop.run_once(0)
    if not host.driver.tx_done(0):
        raise Finding("a controller that was reset does not send")


TARGET = Target(
    "vcpus",
    run,
    (),
    records.strategy(8, st.binary(min_size=1, max_size=1)),
    record=records.SIZE,
    head=1,
    limit=60.0,
    quick=30,
)
