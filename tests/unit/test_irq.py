"""INTx lines; MSI-X: what waits while masked, what reaches the routing table, what is saved."""

import os
from collections.abc import Iterator

import pytest

from godwit.hw.irq import IntxLines, Msix, Routes
from godwit.hw.layout import intx_gsi
from tests.fakes.kvm import FakeVm

COUNT = 3
ENABLE, MASK_ALL = 1 << 15, 1 << 14


class Device:
    """A device's vectors and its VM."""

    def __init__(self) -> None:
        self.vm = FakeVm()
        self.routes = Routes(self.vm)
        self.msix = Msix(self.vm, self.routes, COUNT)
        self.msix.attach()

    def program(self, vector: int, data: int, *, masked: bool = False) -> None:
        at = 16 * vector
        self.msix.write_table(at, 4, 0xFEE0_0000)
        self.msix.write_table(at + 4, 4, 0)
        self.msix.write_table(at + 8, 4, data)
        self.msix.write_table(at + 12, 4, masked)

    def mask(self, vector: int, on: bool) -> None:
        self.msix.write_table(16 * vector + 12, 4, on)

    def live(self) -> list[int]:
        return [vector for vector, fd in enumerate(self.msix.fds) if fd in self.vm.irqfds]

    def delivered(self, vector: int) -> int:
        """What KVM would have taken from the eventfd."""
        assert vector in self.live()
        try:
            return os.eventfd_read(self.msix.fds[vector])
        except BlockingIOError:
            return 0


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.msix.close()


def test_at_first_all_is_masked_and_off(device: Device) -> None:
    assert device.msix.control() == COUNT - 1
    assert [device.msix.read_table(16 * v + 12, 4) for v in range(COUNT)] == [1] * COUNT
    device.msix.set_control(ENABLE)
    assert device.live() == []
    assert device.msix.control() == COUNT - 1 | ENABLE


def test_a_vector_is_routed_and_live_once_enabled_and_unmasked(device: Device) -> None:
    device.program(1, 0x51)
    assert device.live() == []
    device.msix.set_control(ENABLE)
    assert device.live() == [1]
    gsi = device.vm.irqfds[device.msix.fds[1]]
    assert device.vm.routes == {gsi: (0xFEE0_0000, 0x51)}
    assert gsi >= 24
    device.msix.signal(1)
    assert device.delivered(1) == 1


def test_before_msix_is_enabled_a_signal_is_nothing(device: Device) -> None:
    device.program(0, 0x50)
    device.msix.signal(0)
    device.msix.set_control(ENABLE)
    assert device.delivered(0) == 0


@pytest.mark.parametrize("vector", [-1, COUNT, 0xFFFF])
def test_no_vector_is_no_error(device: Device, vector: int) -> None:
    for one in range(COUNT):
        device.program(one, one)
    device.msix.set_control(ENABLE)
    device.msix.signal(vector)
    assert [device.delivered(one) for one in range(COUNT)] == [0] * COUNT


def test_what_is_signalled_while_masked_waits(device: Device) -> None:
    device.program(0, 0x50)
    device.program(2, 0x52)
    device.msix.set_control(ENABLE)
    device.mask(2, True)
    assert device.live() == [0]
    device.msix.signal(2)
    device.msix.signal(0)
    assert device.msix.read_pending(0, 4) == 0b100
    assert device.msix.read_pending(0, 8) == 0b100
    assert device.msix.read_pending(4, 4) == 0
    device.mask(2, False)
    assert device.msix.read_pending(0, 4) == 0
    assert device.delivered(2) == 1
    assert device.delivered(0) == 1


def test_the_function_mask_masks_all(device: Device) -> None:
    for vector in range(COUNT):
        device.program(vector, vector)
    device.msix.set_control(ENABLE | MASK_ALL)
    assert device.live() == []
    device.msix.signal(1)
    assert device.msix.read_pending(0, 1) == 0b010
    device.msix.set_control(ENABLE)
    assert device.live() == [0, 1, 2]
    assert device.delivered(1) == 1
    device.msix.set_control(0)
    assert device.live() == []


def test_a_new_message_is_routed_at_the_unmasking(device: Device) -> None:
    device.program(0, 0x50)
    device.msix.set_control(ENABLE)
    device.mask(0, True)
    device.msix.write_table(8, 4, 0x99)
    device.mask(0, False)
    assert list(device.vm.routes.values()) == [(0xFEE0_0000, 0x99)]


def test_routes_are_told_only_when_they_change(device: Device) -> None:
    device.program(0, 0x50)
    device.msix.set_control(ENABLE)
    before = device.vm.count("set_routes")
    for on in (True, False) * 5:
        device.mask(0, on)
    assert device.vm.count("set_routes") == before


def test_the_table_takes_eight_bytes_and_refuses_what_is_beyond(device: Device) -> None:
    device.msix.write_table(0, 8, 0x1_FEE0_1000)
    device.msix.write_table(8, 8, 0x77)
    assert device.msix.read_table(0, 8) == 0x1_FEE0_1000
    assert device.msix.read_table(12, 4) == 0
    device.msix.set_control(ENABLE)
    assert device.live() == [0]
    end = 16 * COUNT
    for offset in (end - 3, end, end + 100):
        device.msix.write_table(offset, 4, 0)
    assert device.msix.read_table(end, 4) == 0
    assert device.msix.read_table(end - 4, 4) == 1


def test_detached_keeps_what_comes_and_attached_delivers_it(device: Device) -> None:
    device.program(0, 0x50)
    device.msix.set_control(ENABLE)
    device.msix.detach()
    assert device.live() == []
    device.msix.signal(0)
    device.msix.attach()
    assert device.delivered(0) == 1


def test_a_reset_forgets_all(device: Device) -> None:
    device.program(0, 0x50)
    device.msix.set_control(ENABLE)
    device.mask(0, True)
    device.msix.signal(0)
    device.msix.reset()
    assert device.live() == []
    assert device.msix.read_pending(0, 8) == 0
    assert device.msix.control() == COUNT - 1


def test_what_waits_moves_and_meets_its_route(device: Device) -> None:
    device.program(0, 0x50)
    device.program(1, 0x51, masked=True)
    device.msix.set_control(ENABLE)
    device.msix.detach()  # as the streams of old were saved
    device.msix.signal(0)
    device.msix.signal(1)
    state = device.msix.save()
    assert state.pending == [0, 1]
    other = FakeVm()
    routes = Routes(other)
    msix = Msix(other, routes, COUNT)
    routes.hold()
    msix.load(state)
    assert other.calls == []
    routes.release()
    assert other.count("set_routes") == 1
    assert [call.name for call in other.calls] == ["set_routes"]
    assert msix.save() == state
    msix.attach()
    assert os.eventfd_read(msix.fds[0]) == 1
    assert msix.fds[1] not in other.irqfds
    assert msix.read_pending(0, 1) == 0b10
    msix.close()


def test_a_state_of_another_device_is_refused(device: Device) -> None:
    device.msix.detach()
    state = device.msix.save()
    vm = FakeVm()
    other = Msix(vm, Routes(vm), COUNT + 1)
    with pytest.raises(ValueError, match=r"msix\.table"):
        other.load(state)
    other.close()
    bad = type(state)(state.table, state.enabled, state.masked, [COUNT])
    with pytest.raises(ValueError, match=r"msix\.pending"):
        device.msix.load(bad)


def test_two_devices_share_the_table_of_routes() -> None:
    vm = FakeVm()
    routes = Routes(vm)
    for number in range(2):
        msix = Msix(vm, routes, COUNT)
        msix.attach()
        msix.write_table(12, 4, 0)
        msix.write_table(8, 4, number)
        msix.set_control(ENABLE)
        msix.close()
    assert len(vm.routes) == 1 + 1
    assert vm.irqfds == {}


# --- INTx -----------------------------------------------------------------------------------------
def test_a_line_is_high_while_anyone_holds_it_up() -> None:
    vm = FakeVm()
    lines = IntxLines(vm)
    first, second, other = (lines.of(slot) for slot in (1, 9, 2))
    assert intx_gsi(1) == intx_gsi(9) == 17
    first(True)
    second(True)
    assert vm.lines == {17: True}
    first(False)
    assert vm.lines == {17: True}
    second(False)
    second(False)
    assert vm.lines == {17: False}
    other(True)
    assert vm.lines == {17: False, 18: True}


def test_slots_use_the_pins_that_the_io_apic_has() -> None:
    assert {intx_gsi(slot) for slot in range(32)} == set(range(16, 24))
    # One pin each, for as many NICs as there can be.
    assert len({intx_gsi(slot) for slot in range(1, 9)}) == 8
