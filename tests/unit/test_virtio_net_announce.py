"""The announcement's rules: who declines, what the guest sees, what the acknowledgement does."""

import threading
from collections.abc import Iterator

import pytest

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.chain import Chain
from tests.fakes.driver import Part
from virtio_bench import (
    ACK,
    ALL,
    DRIVER,
    F_ANNOUNCE,
    F_EVENT_IDX,
    FEATURES_OK,
    Bench,
)

OK, ERR = 0, 1
LINK_UP, ANNOUNCE = 1, 2


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- (d) who accepts, and what follows ------------------------------------------------------------
def test_an_announcement_sets_the_bit_and_raises_the_config_interrupt(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    assert guest.net_status() == LINK_UP
    assert bench.net.announce()
    assert bench.net.announce_pending
    assert guest.net_status() == LINK_UP | ANNOUNCE
    assert guest.interrupts(0) == 1
    assert [guest.interrupts(vector) for vector in (1, 2, 3)] == [0, 0, 0]


def test_asking_again_raises_it_again(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.net.announce()
    assert bench.net.announce()
    assert bench.guest.interrupts(0) == 2


def test_without_the_feature_it_declines(bench: Bench) -> None:
    bench.guest.probe(ALL & ~F_ANNOUNCE)
    _declines(bench)


def test_a_nic_without_the_property_does_not_offer_and_declines(memory: GuestMemory) -> None:
    bench = Bench(memory, announce=False)
    try:
        bench.guest.probe()
        assert not bench.guest.offered() & F_ANNOUNCE
        _declines(bench)
    finally:
        bench.close()


def test_before_the_driver_is_ready_it_declines(bench: Bench) -> None:
    guest = bench.guest
    _declines(bench)
    guest.walk()
    guest.write_config(4, 2, 6)
    guest.status = ACK | DRIVER
    assert guest.accept(guest.offered())
    assert guest.status & FEATURES_OK
    guest.enable_msix()
    guest.write(0x10, 2, 0)
    guest.set_up_queues(True, 64, True)
    _declines(bench)


def test_after_a_reset_it_declines(bench: Bench) -> None:
    bench.guest.probe()
    bench.guest.status = 0
    _declines(bench)


def test_after_an_offence_it_declines(bench: Bench) -> None:
    bench.guest.probe()
    bench.guest.queues[2].publish(9999)
    bench.guest.kick(2)
    bench.serve()
    assert bench.errors
    bench.guest.interrupts(0)
    _declines(bench)


def test_while_paused_it_declines(bench: Bench) -> None:
    bench.guest.probe()
    bench.pci.pause()
    assert not bench.net.announce()
    bench.pci.resume()
    assert bench.guest.net_status() == LINK_UP
    assert bench.net.announce()


# --- (e) the acknowledgement ----------------------------------------------------------------------
def test_an_ack_clears_the_bit_and_answers_ok(bench: Bench) -> None:
    bench.guest.probe()
    bench.net.announce()
    assert bench.guest.command(3, 0) == OK
    assert bench.guest.net_status() == LINK_UP
    assert bench.acks == 1


def test_the_bit_is_clear_before_the_buffer_is_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = bench.guest
    guest.probe()
    queue = bench.net.queues[2]
    push = queue.push
    seen: list[tuple[int, int, int]] = []

    def watched(chain: Chain, written: int) -> None:
        # Still before: the used index has not moved, and what the guest may read is decided.
        seen.append((guest.net_status(), guest.queues[2].used_index(), chain.writable[0][0]))
        push(chain, written)

    monkeypatch.setattr(queue, "push", watched)
    bench.net.announce()
    assert guest.command(3, 0) == OK
    assert seen == [(LINK_UP, 0, OK)]


@pytest.mark.parametrize("features", [ALL, ALL & ~F_EVENT_IDX], ids=["event idx", "flags"])
def test_many_announcements_in_a_row_are_acknowledged(bench: Bench, features: int) -> None:
    bench.guest.probe(features)
    for _ in range(200):
        assert bench.net.announce()
        assert bench.guest.command(3, 0) == OK
        assert not bench.net.announce_pending
    assert bench.acks == 200
    assert bench.guest.interrupts(3) == 200


def test_an_ack_with_nothing_pending_is_an_error(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.guest.command(3, 0) == ERR
    bench.net.announce()
    assert bench.guest.command(3, 0) == OK
    assert bench.guest.command(3, 0) == ERR
    assert bench.acks == 1


@pytest.mark.parametrize("command", [1, 2, 255])
def test_any_other_command_of_the_class_is_an_error(bench: Bench, command: int) -> None:
    bench.guest.probe()
    bench.net.announce()
    assert bench.guest.command(3, command) == ERR
    assert bench.net.announce_pending
    assert bench.acks == 0


@pytest.mark.parametrize("data", [b"\0", b"\0\0", bytes(1000)])
def test_an_ack_with_data_is_an_error(bench: Bench, data: bytes) -> None:
    bench.guest.probe()
    bench.net.announce()
    assert bench.guest.command(3, 0, data) == ERR
    assert bench.net.announce_pending
    assert bench.guest.command(3, 0) == OK


def test_an_ack_may_be_cut_into_pieces(bench: Bench) -> None:
    guest = bench.guest
    guest.probe()
    bench.net.announce()
    driver = guest.queues[2]
    answer = driver.place(b"\xee\xee")
    parts = [Part(driver.place(b"\3"), 1), Part(driver.place(b"\0"), 1)]
    driver.add([*parts, Part(answer, 0, True), Part(answer, 2, True)], indirect=True)
    guest.kick(2)
    bench.serve()
    assert driver.take() is not None
    assert guest.bench.memory.read(answer, 2) == b"\0\xee"
    assert bench.acks == 1


def test_the_listener_is_called_once_an_ack_and_not_under_the_lock(bench: Bench) -> None:
    bench.guest.probe()
    free: list[bool] = []

    def from_another_thread() -> None:
        free.append(bench.net.lock.acquire(timeout=5))
        if free[-1]:
            bench.net.lock.release()

    def acked() -> None:
        thread = threading.Thread(target=from_another_thread)
        thread.start()
        thread.join()

    bench.net.on_ack = acked
    bench.net.announce()
    bench.guest.command(3, 0)
    bench.guest.command(3, 0)
    assert free == [True]


def _declines(bench: Bench) -> None:
    assert not bench.net.announce()
    assert not bench.net.announce_pending
    assert bench.net.config()[6] == LINK_UP
    if bench.pci.msix.fds[0] in bench.vm.irqfds:
        assert bench.guest.interrupts(0) == 0
