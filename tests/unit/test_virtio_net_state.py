"""virtio-net: configuration that no guest changes, reset, and what a move carries along."""

from collections.abc import Iterator

import pytest
from msgspec import structs

from godwit.errors import StreamError
from godwit.hw.memory import GuestMemory
from virtio_bench import (
    ALL,
    F_ANNOUNCE,
    MAC,
    Bench,
)

OK, ERR = 0, 1
LINK_UP, ANNOUNCE = 1, 2


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- (f) configuration space is read-only ---------------------------------------------------------
def test_guest_writes_to_the_configuration_change_nothing(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    bench.net.announce()
    before = guest.device_config()
    assert before == MAC + b"\x03\0\x01\0\0\0"
    for size in (1, 2, 4, 8):
        for offset in range(0x100):
            for value in (0, (1 << 8 * size) - 1):
                guest.write(0x800 + offset, size, value)
    assert guest.device_config() == before
    assert bench.net.mac == MAC
    assert bench.net.announce_pending


def test_the_mtu_is_shown_when_there_is_one(memory: GuestMemory) -> None:
    bench = Bench(memory, mtu=9000)
    try:
        bench.guest.probe()
        assert bench.guest.read(0x80A, 2) == 9000
        assert bench.net.negotiated & 1 << 3
    finally:
        bench.close()


# --- (g) reset and migration ----------------------------------------------------------------------
def test_a_reset_clears_what_is_pending(bench: Bench) -> None:
    bench.guest.probe()
    bench.net.announce()
    bench.guest.status = 0
    assert not bench.net.announce_pending
    bench.guest.probe()
    assert bench.guest.net_status() == LINK_UP
    assert bench.guest.command(3, 0) == ERR


def test_a_machine_reset_clears_it_too(bench: Bench) -> None:
    bench.guest.probe()
    bench.net.announce()
    bench.pci.pause()
    bench.pci.reset()
    assert not bench.net.announce_pending


def test_what_is_pending_survives_a_move_and_is_raised_again(memory: GuestMemory) -> None:
    one = Bench(memory)
    one.guest.probe()
    one.net.announce()
    one.guest.interrupts(0)
    state = one.save()
    assert state.device.announce_pending
    two = Bench(memory, resume=False)
    try:
        two.load(state)
        two.pci.resume()
        guest = two.guest
        assert guest.interrupts(0) == 1
        assert guest.net_status() == LINK_UP | ANNOUNCE
        guest.queues = one.guest.queues
        assert guest.command(3, 0) == OK
        assert two.acks == 1
        assert not two.net.announce_pending
    finally:
        one.close()
        two.close()


def test_a_state_that_cannot_be_is_refused(memory: GuestMemory) -> None:
    one = Bench(memory)
    one.guest.probe(ALL & ~F_ANNOUNCE)
    state = one.save()
    net = state.device
    two = Bench(memory, resume=False)
    try:
        for change, text in (
            ({"announce_pending": True}, "announce_pending"),
            ({"mac": b"\x01\0\x5e\0\0\1"}, "mac"),
        ):
            with pytest.raises(StreamError, match=text):
                two.load(structs.replace(state, device=structs.replace(net, **change)))
        two.load(state)
    finally:
        one.close()
        two.close()


def test_a_transport_state_that_cannot_be_is_refused(memory: GuestMemory) -> None:
    one = Bench(memory)
    one.guest.probe()
    whole = one.save()
    state = whole.transport
    one.close()
    queue = structs.replace(state.queues[1], used=1 << 60)
    for change, text in (
        ({"negotiated": state.negotiated | 1 << 22}, "negotiated.*0x400000"),
        ({"negotiated": state.negotiated & ~(1 << 32)}, "negotiated: without VERSION_1"),
        ({"negotiated": 0}, "negotiated: without VERSION_1"),
        (
            {"common": structs.replace(state.common, status=state.common.status & ~8)},
            "DRIVER_OK without FEATURES_OK",
        ),
        ({"queues": state.queues[:2]}, "queues: 2"),
        ({"queues": [state.queues[0], queue, state.queues[2]]}, "queues.*0x1000000000000000"),
        ({"msix": structs.replace(state.msix, table=b"")}, "msix"),
    ):
        two = Bench(memory, resume=False)
        with pytest.raises(StreamError, match=text):
            two.load(structs.replace(whole, transport=structs.replace(state, **change)))
        two.close()


def test_a_stop_raises_it_again_as_well(bench: Bench) -> None:
    bench.guest.probe()
    bench.net.announce()
    bench.guest.interrupts(0)
    bench.pci.pause()
    bench.pci.resume()
    assert bench.guest.interrupts(0) == 1


def test_nothing_pending_raises_nothing(bench: Bench) -> None:
    bench.guest.probe()
    bench.pci.pause()
    bench.pci.resume()
    assert bench.guest.interrupts(0) == 0


def test_frames_of_the_host_go_out_of_the_tap(bench: Bench) -> None:
    bench.net.send_from_host(b"frame")
    assert bench.tap.get() == bytes(12) + b"frame"


def test_a_driver_that_was_ready_without_features_migrates_with_its_broken_device(
    memory: GuestMemory,
) -> None:
    """A guest must not be able to make itself unmigratable."""
    one, two = Bench(memory), Bench(memory, resume=False)
    one.guest.write_config(4, 2, 6)
    one.guest.write(0x14, 1, 4)
    assert one.errors
    state = one.save()
    two.load(state)
    two.pci.resume()
    assert two.guest.read(0x14, 1) & 64
    assert two.save() == state
    one.close()
    two.close()
