"""virtio over PCI by accesses alone, as Linux's driver makes them."""

from collections.abc import Iterator

import pytest

from godwit.hw.memory import GuestMemory
from virtio_bench import (
    ACK,
    ALL,
    BAR,
    DRIVER,
    DRIVER_OK,
    F_VERSION_1,
    FEATURES_OK,
    MAC,
    MESSAGE,
    NEEDS_RESET,
    Bench,
)


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


def test_identity_and_capability_list(bench: Bench) -> None:
    guest = bench.guest
    assert guest.read_config(0) == 0x1041_1AF4
    assert guest.read_config(8) == 0x0200_0001
    assert guest.read_config(0x3D, 1) == 0  # no INTx pin
    assert guest.read_config(6, 2) & 0x10
    found = guest.walk()
    assert [kind for kind, _ in found].count(0x11) == 1
    assert set(guest.capabilities) == {1, 2, 3, 4, 5}
    assert all(at % 4 == 0 and 0x40 <= at < 0x100 for _, at in found)
    assert guest.capabilities[1][2] >= 0x38
    at = guest.capabilities[2][0]
    assert guest.read_config(at + 2, 1) == 20
    assert guest.read_config(at + 16) == 4  # notify_off_multiplier
    assert guest.capabilities[2][1:] == (0x2000, 12)
    control = guest.read_config(guest.msix_at + 2, 2)
    assert control == 3  # four vectors, disabled
    assert guest.read_config(guest.msix_at + 4) == 0x1000
    assert guest.read_config(guest.msix_at + 8) == 0x1800


def test_a_driver_gets_from_reset_to_driver_ok(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    assert guest.status == ACK | DRIVER | FEATURES_OK | DRIVER_OK
    assert bench.net.started
    assert bench.backend.running
    assert bench.backend.negotiated == guest.offered()
    assert not bench.errors
    assert bench.backend.rings is not None
    rx, tx = bench.backend.rings
    assert bench.vm.ioeventfds == {
        (BAR + 0x2000, 2): rx.kick,
        (BAR + 0x2004, 2): tx.kick,
        (BAR + 0x2008, 2): bench.pci.kick_fd(2),
    }
    assert len(bench.vm.irqfds) == 4
    assert sorted(bench.vm.routes.values()) == [(MESSAGE, 0x40 + i) for i in range(4)]
    assert bench.vm.routes[bench.vm.irqfds[rx.call]] == (MESSAGE, 0x41)
    assert bench.vm.routes[bench.vm.irqfds[tx.call]] == (MESSAGE, 0x42)


def test_registers_read_back(bench: Bench) -> None:
    guest = bench.guest
    guest.write_config(4, 2, 2)
    assert guest.read(0x12, 2) == 3
    assert guest.read(0x10, 2) == 0xFFFF
    assert guest.device_config() == MAC + b"\x01\0" + b"\x01\0" + b"\0\0"
    for index, size in ((0, 256), (1, 256), (2, 64)):
        guest.write(0x16, 2, index)
        assert (guest.read(0x16, 2), guest.read(0x18, 2), guest.read(0x1E, 2)) == (
            index,
            size,
            index,
        )
        assert guest.read(0x1A, 2) == 0xFFFF
        for at in (0x20, 0x28, 0x30):
            guest.write(at, 4, 0x1234_5670 + at)
            guest.write(at + 4, 4, 0x9ABC)
        for at in (0x20, 0x28, 0x30):
            assert guest.read(at, 4) == 0x1234_5670 + at
            assert guest.read(at, 8) == 0x9ABC_1234_5670 + at
        assert guest.read(0x1C, 2) == 0
    guest.write(0x16, 2, 3)  # there is no such queue
    assert [guest.read(at, 2) for at in (0x18, 0x1C, 0x20)] == [0, 0, 0]
    guest.write(0x10, 2, 4)  # nor such a vector
    assert guest.read(0x10, 2) == 0xFFFF


def test_an_enabled_queue_is_fixed(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    guest.write(0x16, 2, 0)
    before = [guest.read(at, 4) for at in range(0x18, 0x38, 4)]
    for at, size in ((0x18, 2), (0x1C, 2), (0x20, 4), (0x28, 8), (0x34, 4)):
        guest.write(at, size, 0)
    assert [guest.read(at, 4) for at in range(0x18, 0x38, 4)] == before


# --- features -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "features",
    [0, ALL & ~F_VERSION_1, ALL, *(F_VERSION_1 | 1 << bit for bit in (22, 63, 3))],
    ids=["none", "no VERSION_1", "all", "MQ", "bit 63", "MTU"],
)
def test_features_that_are_refused(bench: Bench, features: int) -> None:
    guest = bench.guest
    guest.write_config(4, 2, 2)
    guest.status = ACK | DRIVER
    assert not guest.accept(features & guest.offered() if not features & F_VERSION_1 else features)
    # The driver may try again.
    assert guest.accept(F_VERSION_1)


def test_features_are_fixed_once_accepted(bench: Bench) -> None:
    guest = bench.guest
    guest.write_config(4, 2, 2)
    guest.status = ACK | DRIVER
    assert guest.accept(F_VERSION_1)
    guest.write(8, 4, 0)
    guest.write(0xC, 4, 1)
    assert guest.read(0xC, 4) == 0
    assert bench.net.negotiated == F_VERSION_1
    for select in (2, 0xFFFFFFFF):
        guest.write(0, 4, select)
        assert guest.read(4, 4) == 0


def test_a_driver_that_skips_the_features_needs_a_reset(bench: Bench) -> None:
    guest = bench.guest
    guest.write_config(4, 2, 2)
    guest.status = ACK | DRIVER | DRIVER_OK
    assert guest.status & NEEDS_RESET
    assert len(bench.errors) == 1
    guest.probe()
    assert guest.status == ACK | DRIVER | FEATURES_OK | DRIVER_OK
    assert bench.net.started


def test_a_driver_cannot_take_status_bits_back_nor_set_the_devices_own(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    guest.status = ACK | NEEDS_RESET
    assert guest.status == ACK | DRIVER | FEATURES_OK | DRIVER_OK


def test_a_bad_ring_stops_the_device_and_tells_the_driver(bench: Bench) -> None:
    guest = bench.guest
    guest.walk()
    guest.write_config(4, 2, 6)
    guest.status = ACK | DRIVER
    assert guest.accept(F_VERSION_1)
    guest.enable_msix()
    guest.write(0x10, 2, 0)
    guest.set_up_queues(False, 64, True)
    bench.net.queues[1].used = 1 << 50
    guest.status = guest.status | DRIVER_OK
    assert guest.status & NEEDS_RESET
    assert not bench.net.started
    assert not bench.backend.running
    assert guest.interrupts(0) == 1
    assert "0x4000000000000" in bench.errors[0]
    bench.pci.pause()
    bench.pci.resume()
    assert guest.interrupts(0) == 1, "it may have been lost with the stop"


def test_driver_ok_without_queues_is_an_offence(bench: Bench) -> None:
    guest = bench.guest
    guest.write_config(4, 2, 2)
    guest.status = ACK | DRIVER
    guest.accept(F_VERSION_1)
    guest.status = guest.status | DRIVER_OK
    assert guest.status & NEEDS_RESET
    bench.pci.pause()
    bench.pci.resume()
    assert len(bench.errors) == 1
