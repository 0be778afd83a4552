"""The cases of the conformance suite: each kind of device, how it is made and driven."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple, cast

import tests.fakes.e1000 as e1000_driver
from blk_bench import make_image
from godwit.host.image import Image
from godwit.host.vhost_user import BackEnd
from godwit.hw import layout
from godwit.hw.device import Device
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000.nic import E1000
from godwit.hw.nic.nic import Nic
from godwit.hw.power import Pm1
from godwit.hw.serial import Serial
from godwit.hw.virtio.blk.device import VirtioBlk
from godwit.hw.virtio.net.device import VirtioNet
from godwit.hw.virtio.net.userspace import UserspaceBackend
from godwit.hw.virtio.net.vhost import VhostBackend
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.rng import VirtioRng
from godwit.hw.virtio.vhost_user.device import VirtioVhostUser
from godwit.hw.virtio.vsock.device import VirtioVsock
from godwit.spec.back_ends import VhostUserConfig
from godwit.spec.config import DiskConfig
from tests.fakes.driver import Part
from tests.fakes.slot import Board
from tests.fakes.tap import FakeTap
from tests.fakes.vhost import FakeVhost
from tests.fakes.vhost_user import FakeBackEnd
from tests.fakes.vhost_vsock import FakeVhostVsock
from virtio_bench import MAC, SLOT, Guest

ETHERNET = b"\xff" * 6 + MAC + b"\x08\0" + bytes(46)


class Rig:
    """A device in a slot, and a guest that drives it."""

    def __init__(self, memory: GuestMemory, case: Case) -> None:
        self.memory, self.case = memory, case
        self.board = Board(memory)
        self.vm, self.loop = self.board.vm, self.board.loop
        self.ports, self.mmio, self.bus = self.board.ports, self.board.mmio, self.board.bus
        self.tap = FakeTap()
        self.back_end = FakeBackEnd()
        self.output = bytearray()
        self.level = False
        self.off = 0
        self.device = case.make(self)

    @property
    def pci(self) -> VirtioPci:
        """The device, for a guest that knows virtio."""
        return cast(VirtioPci, self.device)

    def serve(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)

    def pause(self) -> None:
        self.device.pause()
        assert self.device.paused(10.0)

    def close(self) -> None:
        self.pause()
        self.device.close()
        self.device.close()
        self.back_end.kill()
        self.tap.close()
        self.board.close()

    # --- the serial port's sink -------------------------------------------------------------------
    def has_space(self) -> bool:
        return True

    def write(self, data: bytes) -> None:
        self.output += data

    def set_level(self, level: bool) -> None:
        self.level = level

    def power_off(self) -> None:
        self.off += 1


#: Checks on the rig that took the guest over, when it runs there, what was in flight.
Check = Callable[[Rig], None]


class Case(NamedTuple):
    """A device: how it is made, and how a guest drives it.

    ``drive`` takes a device that was resumed to a state that is not the first one. ``in_flight``
    begins something that is not done when the device is paused.
    """

    make: Callable[[Rig], Device]
    drive: Callable[[Rig], None]
    in_flight: Callable[[Rig], Check]


# --- making and driving ---------------------------------------------------------------------------
def _net(vhost: bool) -> Callable[[Rig], Device]:
    def backend(rig: Rig) -> Callable[[VirtioNet], Any]:
        def guest_error(net: VirtioNet) -> Callable[[str], None]:
            return lambda message: net.on_guest_error(message)

        if vhost:
            return lambda net: VhostBackend(
                *(rig.tap, net.rx_backlog, rig.memory, rig.loop, net.lock, guest_error(net)),
                FakeVhost,
            )
        return lambda net: UserspaceBackend(
            rig.tap, net.rx_backlog, rig.loop, net.lock, net.accepts, guest_error(net)
        )

    def make(rig: Rig) -> Device:
        net = VirtioNet("nic0", MAC, rig.tap, rig.memory, rig.loop, backend(rig), mtu=1400)
        return VirtioPci(net, rig.board.slot(SLOT))

    return make


def _probe(rig: Rig) -> Guest:
    guest = Guest(cast(Any, rig))
    guest.probe()
    return guest


def _drive_net(rig: Rig) -> None:
    guest = _probe(rig)
    assert guest.command(0, 0, b"\0") == 0
    assert guest.command(1, 1, b"\x52\x54\0\0\0\x77") == 0
    (nic,) = [part for part in rig.device.parts() if isinstance(part, Nic)]
    assert nic.announce()


def _request_to_control(rig: Rig) -> Check:
    guest = _probe(rig)
    driver = guest.queues[2]
    answer = driver.place(b"\xee")
    head = driver.add([Part(driver.place(b"\0\0\1"), 3), Part(answer, 1, True)])
    guest.kick(2)

    def check(other: Rig) -> None:
        other.serve()
        assert driver.take() == (head, 1)
        assert other.memory.read(answer, 1) == b"\0"

    return check


def _drive_e1000(rig: Rig) -> None:
    _e1000(rig)


def _e1000(rig: Rig) -> e1000_driver.Driver:
    rig.ports.write(0xCF8, 4, 1 << 31 | SLOT << 11 | 4)
    rig.ports.write(0xCFC, 2, 7)
    bar = rig.board.slot(SLOT).bar
    driver = e1000_driver.Driver(
        rig.memory,
        lambda offset: rig.mmio.read(bar + offset, 4),
        lambda offset, value: rig.mmio.write(bar + offset, 4, value),
    )
    driver.start()
    return driver


def _frame_to_e1000(rig: Rig) -> Check:
    driver = _e1000(rig)
    driver.offer(4)
    rig.tap.put(ETHERNET)  # and the loop has no turn any more

    def check(other: Rig) -> None:
        if other is not rig:  # as the packet handover does
            waiting = cast(Nic, rig.device).rx_backlog.take(8)
            assert cast(Nic, other.device).rx_backlog.inject(waiting) == 0
        other.serve()
        (received,) = driver.received()
        assert received.data[: len(ETHERNET)] == ETHERNET

    return check


def _make_rng(rig: Rig) -> Device:
    return VirtioPci(VirtioRng("rng0", rig.memory, rig.loop, 64, 60.0), rig.board.slot(SLOT))


def _drive_rng(rig: Rig) -> None:
    guest = _probe(rig)
    guest.queues[0].add_in(16)
    guest.kick(0)
    rig.serve()
    assert len(guest.queues[0].take_all()) == 1


def _request_beyond_the_limit(rig: Rig) -> Check:
    guest = _probe(rig)
    driver = guest.queues[0]
    first, second = driver.add_in(64)[0], driver.add_in(32)[0]
    guest.kick(0)
    rig.serve()
    assert [length for _, length in driver.take_all()] == [64]  # the other waits for a minute
    assert rig.memory.read(first.address, 64) != bytes(64)

    def check(other: Rig) -> None:
        other.serve()
        if other is rig:
            assert driver.take_all() == []
            cast(VirtioRng, other.pci.device)._next_period()  # the minute is over
        assert [length for _, length in driver.take_all()] == [32]
        assert other.memory.read(second.address, 32) != bytes(32)

    return check


def _image() -> Path:
    """One image for all disks, whose content no test changes."""
    return make_image(Path(tempfile.mkdtemp(dir=_folder.name)) / "disk.raw", 1 << 16)


_folder = tempfile.TemporaryDirectory()
_IMAGE = str(_image())


def _make_blk(rig: Rig) -> Device:
    config = DiskConfig("disk0", _IMAGE)
    return VirtioPci(VirtioBlk(config, rig.memory, Image(_IMAGE)), rig.board.slot(SLOT))


def _add_read(rig: Rig, guest: Guest) -> int:
    driver = guest.queues[0]
    header, data = Part(driver.place(pack("<IIQ", 0, 0, 3)), 16), driver.place(513)
    driver.add([header, Part(data, 513, True)])
    guest.kick(0)
    return data


def _drive_blk(rig: Rig) -> None:
    guest = _probe(rig)
    _add_read(rig, guest)
    _await_used(guest)


def _await_used(guest: Guest) -> None:
    """Wait until a worker is done with the one request."""
    deadline = time.monotonic() + 10
    while guest.queues[0].take() is None:
        assert time.monotonic() < deadline, "the request was not answered"
        time.sleep(0.001)


def _request_to_disk(rig: Rig) -> Check:
    guest = _probe(rig)
    data = _add_read(rig, guest)

    def check(other: Rig) -> None:
        _await_used(guest)
        assert other.memory.read(data, 8) == pack("<Q", 3)
        assert other.memory.read(data + 512, 1) == b"\0"

    return check


def _make_vsock(rig: Rig) -> Device:
    device = VirtioVsock("vsock0", 7, rig.memory, rig.loop, FakeVhostVsock)
    device.acquire()
    return VirtioPci(device, rig.board.slot(SLOT))


def _drive_vsock(rig: Rig) -> None:
    guest = _probe(rig)
    assert guest.device_config()[:8] == (7).to_bytes(8, "little")
    guest.queues[2].add_in(4)


def _event_without_a_buffer(rig: Rig) -> Check:
    guest = _probe(rig)
    events = guest.queues[2]
    rig.pause()
    cast(VirtioVsock, rig.pci.device).relocated()
    rig.device.resume()
    rig.serve()

    def check(other: Rig) -> None:
        device = cast(VirtioVsock, other.pci.device)
        if other is not rig:  # as for each guest that arrives
            other.pause()
            device.relocated()
            other.device.resume()
        (buffer,) = events.add_in(4)
        os.eventfd_write(other.pci.kick_fd(2), 1)
        other.serve()
        assert [length for _, length in events.take_all()] == [4]
        assert other.memory.read(buffer.address, 4) == bytes(4)
        assert device.counters() == {"resets": 1}

    return check


def _vhost_user(config: VhostUserConfig) -> Callable[[Rig], Device]:
    def make(rig: Rig) -> Device:
        def connect(config: VhostUserConfig) -> BackEnd:
            return BackEnd(rig.back_end.connect())

        device = VirtioVhostUser(config, rig.memory, rig.loop, connect)
        return VirtioPci(device, rig.board.slot(SLOT))

    return make


def _request_to_back_end(rig: Rig) -> Check:
    rig.back_end.hold = True
    guest = _probe(rig)
    data = _add_read(rig, guest)
    deadline = time.monotonic() + 10
    while not rig.back_end.taken:
        assert time.monotonic() < deadline, "the request was not taken"
        time.sleep(0.001)
    rig.pci.pause()
    rig.back_end.hold = False  # while the pause is waited for

    def check(other: Rig) -> None:
        _await_used(guest)
        assert other.memory.read(data, 8) == pack("<Q", 3)
        assert other.memory.read(data + 512, 1) == b"\0"

    return check


def _make_serial(rig: Rig) -> Device:
    return Serial(rig, rig.set_level)


def _drive_serial(rig: Rig) -> None:
    serial = cast(Serial, rig.device)
    serial.write(1, 1, 3)
    serial.write(7, 1, 0x5A)
    serial.receive(b"typed")


def _input_that_nobody_read(rig: Rig) -> Check:
    serial = cast(Serial, rig.device)
    serial.write(1, 1, 1)
    serial.receive(b"hello")
    assert rig.level

    def check(other: Rig) -> None:
        serial = cast(Serial, other.device)
        assert serial.read(2, 1) & 0xF == 4, "received data available"
        assert bytes(serial.read(0, 1) for _ in range(5)) == b"hello"
        assert not other.level

    return check


def _make_power(rig: Rig) -> Device:
    return Pm1(rig.set_level, rig.power_off)


def _drive_power(rig: Rig) -> None:
    power = cast(Pm1, rig.device)
    power.write(2, 2, 1 << 8)
    power.press()


def _button_that_nobody_saw(rig: Rig) -> Check:
    _drive_power(rig)
    assert rig.level

    def check(other: Rig) -> None:
        power = cast(Pm1, other.device)
        assert power.read(0, 2) == 1 << 8
        power.write(0, 2, 1 << 8)
        power.write(4, 2, 1 << 13 | layout.SLEEP_TYPE_S5 << 10)
        assert other.off == 1

    return check


def _make_pci(rig: Rig) -> Device:
    return rig.bus


def _drive_pci(rig: Rig) -> None:
    rig.ports.write(0xCF8, 4, 1 << 31)


def _half_an_access(rig: Rig) -> Check:
    _drive_pci(rig)

    def check(other: Rig) -> None:
        assert other.ports.read(0xCFC, 4) == 0x1237 << 16 | 0x8086

    return check


CASES = {
    "virtio-net, vhost": Case(_net(True), _drive_net, _request_to_control),
    "virtio-net, userspace": Case(_net(False), _drive_net, _request_to_control),
    "e1000": Case(
        lambda rig: E1000("nic0", MAC, rig.tap, rig.board.slot(SLOT)), _drive_e1000, _frame_to_e1000
    ),
    "virtio-blk": Case(_make_blk, _drive_blk, _request_to_disk),
    "virtio-rng": Case(_make_rng, _drive_rng, _request_beyond_the_limit),
    "virtio-vsock": Case(_make_vsock, _drive_vsock, _event_without_a_buffer),
    "vhost-user-blk": Case(
        _vhost_user(VhostUserConfig("disk0", "vhost-user-blk", "/disk")),
        *(_drive_blk, _request_to_back_end),
    ),
    "vhost-user-fs": Case(
        _vhost_user(VhostUserConfig("share0", "vhost-user-fs", "/share", tag="src")),
        *(_drive_blk, _request_to_back_end),
    ),
    "serial": Case(_make_serial, _drive_serial, _input_that_nobody_read),
    "power": Case(_make_power, _drive_power, _button_that_nobody_saw),
    "pci-host": Case(_make_pci, _drive_pci, _half_an_access),
}
