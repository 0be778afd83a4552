"""virtio over PCI: reset, a BAR that moves, interrupts, saved state."""

import os
from collections.abc import Iterator

import pytest
from msgspec import structs

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.net.device import NetState
from godwit.hw.virtio.pci import VirtioState
from virtio_bench import (
    ACK,
    BAR,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    MAC,
    Bench,
)


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- reset ----------------------------------------------------------------------------------------
def test_a_device_reset_forgets_the_driver(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    guest.status = 0
    assert guest.status == 0
    assert not bench.net.started
    assert not bench.backend.running
    assert bench.vm.ioeventfds == {}
    assert bench.net.negotiated == 0
    guest.write(0x16, 2, 0)
    assert [guest.read(at, 4) for at in (0x20, 0x28, 0x30)] == [0, 0, 0]
    assert (guest.read(0x10, 2), guest.read(0x1A, 2), guest.read(0x1C, 2)) == (0xFFFF, 0xFFFF, 0)
    guest.probe()
    assert bench.backend.starts == 2


def test_a_machine_reset_puts_the_function_back(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    guest.write_config(0x10, 4, 0xD000_0000)
    guest.base = 0xD000_0000
    guest.kick(0, 4)
    bench.pci.pause()
    bench.pci.reset()
    bench.pci.resume()
    guest.base = BAR
    assert bench.pci.bar is None
    assert guest.read_config(4, 2) == 0
    assert guest.read_config(0x10) == BAR
    assert guest.read_config(guest.msix_at + 3, 1) == 0
    assert bench.vm.irqfds == {}
    assert bench.vm.ioeventfds == {}
    guest.probe()
    assert bench.net.started


# --- BAR ------------------------------------------------------------------------------------------
def test_the_bar_is_sized_and_moved_and_notifications_move_along(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    kicks = [bench.pci.kick_fd(index) for index in range(3)]
    guest.write_config(0x10, 4, 0xFFFFFFFF)
    assert guest.read_config(0x10) == 0xFFFF_C000  # 16 KiB, 32-bit, not prefetchable
    assert guest.read_config(0x14) == guest.read_config(0x30) == 0
    guest.write_config(0x10, 4, 0xC800_1234)
    assert guest.read_config(0x10) == 0xC800_0000
    assert guest.read(0x12, 2) == 0xFFFF
    guest.base = 0xC800_0000
    assert guest.read(0x12, 2) == 3
    assert bench.vm.ioeventfds == {(0xC800_2000 + 4 * i, 2): fd for i, fd in enumerate(kicks)}
    guest.write_config(4, 2, 0)
    assert guest.read(0x12, 2) == 0xFFFF
    assert bench.vm.ioeventfds == {}
    guest.write_config(4, 2, 2)
    assert guest.read(0x12, 2) == 3
    assert bench.vm.ioeventfds == {(0xC800_2000 + 4 * i, 2): fd for i, fd in enumerate(kicks)}


def test_the_queues_may_start_while_the_bar_is_off(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    bench.pci.pause()
    guest.write_config(4, 2, 0)
    bench.pci.resume()
    assert bench.vm.ioeventfds == {}
    guest.write_config(4, 2, 2)
    assert len(bench.vm.ioeventfds) == 3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_notification_of_any_width_arrives(bench: Bench, size: int) -> None:
    guest = bench.guest
    guest.probe()
    guest.kick(1, size)
    assert os.eventfd_read(bench.pci.kick_fd(1)) == 1
    guest.kick(3, size)  # there is no such queue
    guest.write(0x3FFC, 4, 9)


# --- the configuration access capability (4.1.4.9) ------------------------------------------------
def test_the_bar_can_be_reached_through_configuration_space(bench: Bench) -> None:
    guest = bench.guest
    guest.walk()
    at = guest.capabilities[5][0]
    assert guest.read_config(4, 2) & 2 == 0  # no memory decoding at all

    def aim(bar: int, offset: int, length: int) -> None:
        guest.write_config(at + 4, 1, bar)
        guest.write_config(at + 8, 4, offset)
        guest.write_config(at + 12, 4, length)

    aim(0, 0x12, 2)
    assert guest.read_config(at + 16, 2) == 3
    aim(0, 0x800, 4)
    assert guest.read_config(at + 16, 4) == int.from_bytes(MAC[:4], "little")
    assert guest.read_config(at + 16, 1) == MAC[0]
    aim(0, 0x14, 1)
    guest.write_config(at + 16, 1, ACK | DRIVER)
    assert guest.read_config(at + 16, 1) == ACK | DRIVER
    for bar, offset, length in ((1, 0, 4), (0, 2, 4), (0, 0x4000, 4), (0, 0, 8), (0, 0, 3)):
        aim(bar, offset, length)
        guest.write_config(at + 16, 4, 0)
        guest.read_config(at + 16, 4)
    aim(0, 0x14, 1)
    assert guest.read_config(at + 16, 1) == ACK | DRIVER


# --- interrupts and the generation ----------------------------------------------------------------
def test_the_vector_of_a_running_queue_may_change(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    guest.write(0x16, 2, 1)
    guest.write(0x1A, 2, 3)
    assert bench.backend.calls[1] == bench.pci.msix.fds[3]
    guest.write(0x1A, 2, 99)
    assert guest.read(0x1A, 2) == 0xFFFF
    assert bench.backend.calls[1] == -1


def test_the_isr_is_cleared_by_reading(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    bench.net.announce()
    assert guest.read(0x400, 1) == 2
    assert guest.read(0x400, 1) == 0


def test_each_change_of_the_configuration_is_a_new_generation(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    seen = [guest.read(0x15, 1)]
    assert guest.read(0x15, 1) == seen[0]
    bench.net.announce()
    seen.append(guest.read(0x15, 1))
    assert guest.read(0x15, 1) == seen[1]
    assert guest.command(3, 0) == 0
    seen.append(guest.read(0x15, 1))
    assert guest.command(1, 1, b"\x02\0\0\0\0\x07") == 0
    seen.append(guest.read(0x15, 1))
    assert seen == sorted(set(seen))


# --- stop and go, save and load -------------------------------------------------------------------
def test_pause_takes_the_rings_back_and_resume_wakes_both_sides(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    bench.pci.pause()
    bench.pci.pause()
    assert not bench.backend.running
    assert len(bench.vm.irqfds) == 4, "to take one away would cost a grace period in the stop"
    bench.pci.resume()
    bench.pci.resume()
    assert bench.backend.running
    assert bench.backend.starts == 2
    assert len(bench.vm.irqfds) == 4
    assert [guest.interrupts(vector) for vector in range(4)] == [0, 1, 1, 1]
    assert [os.eventfd_read(bench.pci.kick_fd(index)) for index in range(3)] == [1, 1, 1]


def test_a_device_moves(memory: GuestMemory, bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    guest.write_config(0x10, 4, 0xD000_0000)
    guest.write_config(0x3C, 1, 11)
    guest.base = 0xD000_0000
    state = bench.save()
    other = Bench(memory, resume=False)
    try:
        other.load(state)
        assert other.vm.irqfds == {}, "no interrupt before the guest runs"
        assert other.vm.ioeventfds == {}
        assert len(other.vm.routes) == 4
        assert other.save() == state
        other.pci.resume()
        other.guest.base = guest.base
        other.guest.queues = guest.queues
        assert other.guest.status == ACK | DRIVER | FEATURES_OK | DRIVER_OK
        assert other.backend.negotiated == bench.net.negotiated
        assert len(other.vm.ioeventfds) == 3
        assert other.guest.read_config(0x3C, 1) == 11
        # A byte of message control, before anything else was read or written.
        assert other.guest.read_config(guest.msix_at or 0x43, 1) is not None
        assert other.guest.command(0, 0, b"\1") == 0
    finally:
        other.close()


def test_what_was_prepared_is_not_set_up_again(memory: GuestMemory, bench: Bench) -> None:
    bench.guest.probe()
    hints = bench.pci.hints()
    state = bench.save()
    other = Bench(memory, resume=False)
    try:
        other.pci.prepare(hints)
        kicks, routes = dict(other.vm.ioeventfds), dict(other.vm.routes)
        assert (len(kicks), len(routes)) == (3, 4)
        assert other.vm.irqfds == {}
        calls = len(other.vm.calls)
        other.load(state)
        assert len(other.vm.calls) == calls
        other.pci.resume()
        assert {call.name for call in other.vm.calls[calls:]} == {"irqfd"}
        assert (other.vm.ioeventfds, other.vm.routes) == (kicks, routes)
    finally:
        other.close()


def test_what_was_prepared_wrongly_does_not_stay(memory: GuestMemory, bench: Bench) -> None:
    bench.guest.probe()
    hints = bench.pci.hints()
    wrong = structs.replace(hints, bar=0xD000_0000, queues=[0, 2], table=bytes(64))
    state = bench.save()
    other, reset = Bench(memory, resume=False), Bench(memory, resume=False)
    try:
        other.pci.prepare(wrong)
        assert list(other.vm.ioeventfds) == [(0xD000_2000, 2), (0xD000_2008, 2)]
        other.load(state)
        assert other.vm.ioeventfds == {}, "in the way of another device, perhaps"
        other.pci.resume()
        assert list(other.vm.ioeventfds) == [(BAR + 0x2000 + 4 * i, 2) for i in range(3)]
        assert set(other.vm.routes.values()) == set(bench.vm.routes.values())
        # The driver went away after the source had sent its hints.
        reset.pci.prepare(hints)
        reset.load(bench_without_driver(memory))
        assert reset.vm.ioeventfds == {}
    finally:
        other.close()
        reset.close()


def bench_without_driver(memory: GuestMemory) -> VirtioState[NetState]:
    """The state of a device that nobody drives."""
    idle = Bench(memory)
    try:
        return idle.save()
    finally:
        idle.close()


@pytest.mark.parametrize(
    "change", [{"queues": [63]}, {"queues": [0, 0]}, {"table": b"\1" * 5}, {"bar": (1 << 52) - 1}]
)
def test_hostile_hints_harm_nothing(
    memory: GuestMemory, bench: Bench, change: dict[str, object]
) -> None:
    bench.guest.probe()
    hints = structs.replace(bench.pci.hints(), **change)
    state = bench.save()
    other = Bench(memory, resume=False)
    try:
        other.pci.prepare(hints)
        other.load(state)
        other.pci.resume()
        assert len(other.vm.ioeventfds) == 3
        assert len(other.vm.irqfds) == 4
    finally:
        other.close()


def test_a_driver_that_is_moved_while_it_probes_goes_on(memory: GuestMemory) -> None:
    one = Bench(memory)
    guest = one.guest
    guest.walk()
    access = guest.capabilities[5][0]
    guest.write_config(4, 2, 6)
    guest.status = ACK | DRIVER
    guest.write(8, 4, 1)
    guest.write(0xC, 4, 1)
    guest.write(0, 4, 1)
    guest.write(0x16, 2, 2)
    guest.write(0x18, 2, 40_000)  # no size at all: that is the guest's affair, not the migration's
    guest.write(0x16, 2, 1)
    guest.write_config(access + 8, 4, 0x12)
    guest.write_config(access + 12, 4, 2)
    state = one.save()
    one.close()
    two = Bench(memory, resume=False)
    try:
        two.load(state)
        two.pci.resume()
        there = two.guest
        assert (there.read(0, 4), there.read(8, 4), there.read(0xC, 4)) == (1, 1, 1)
        assert there.read(0x16, 2) == 1
        assert there.read_config(access + 16, 2) == 3
        there.write(0x16, 2, 2)
        assert there.read(0x18, 2) == 40_000
    finally:
        two.close()


def test_a_byte_of_message_control_is_current(memory: GuestMemory, bench: Bench) -> None:
    bench.guest.probe()
    state = bench.save()
    other = Bench(memory, resume=False)
    try:
        other.load(state)
        assert other.guest.read_config(bench.guest.msix_at + 3, 1) == 0x80
    finally:
        other.close()
