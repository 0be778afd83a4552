"""A device behind vhost-user, and its guest."""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack, unpack

import pytest

from godwit.errors import HostError
from godwit.hw.memory import GuestMemory
from tests.fakes import vhost_user as fake
from tests.fakes.vhost_user import FakeBackEnd
from vhost_user_bench import PATIENCE, Bench
from virtio_bench import NEEDS_RESET

pytestmark = pytest.mark.usefixtures("quick_links")


@pytest.fixture
def bench(shared: GuestMemory) -> Iterator[Bench]:
    bench = Bench(shared)
    yield bench
    bench.close()


# --- work -----------------------------------------------------------------------------------------
def test_requests_are_served_and_signalled(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.reads(3)
    assert bench.reads(4)
    bench.until(lambda: bench.guest.interrupts(1) > 0)
    assert unpack("<Q", bench.guest.device_config()[:8]) == (fake.SECTORS,)
    assert bench.device.properties() == {"queues": 1, "size": fake.SECTORS * 512}
    assert bench.errors == []


def test_a_reset_and_another_driver(bench: Bench) -> None:
    for _ in range(3):
        bench.guest.probe()
        assert bench.reads()
    assert bench.errors == []


def test_features_are_those_that_both_know(shared: GuestMemory) -> None:
    back_end = FakeBackEnd(features=fake.FEATURES & ~(1 << 29) | 1 << 11 | 1 << 40)
    bench = Bench(shared, back_end)
    assert bench.device.offered == 1 << 32 | 1 << 28 | 1 << 9 | 1 << 6 | 1 << 12
    bench.guest.probe()
    assert bench.reads()
    bench.close()


def test_what_was_written_is_logged(bench: Bench) -> None:
    bench.guest.probe()
    bench.device.start_log()
    data = bench.add(7)
    bench.used()
    first = bench.device.take_log()
    assert first[data // 4096 // 8] & 1 << data // 4096 % 8
    used = bench.driver.used
    assert first[used // 4096 // 8] & 1 << used // 4096 % 8
    assert not any(bench.device.take_log())
    bench.back_end.hold = True
    data = bench.add(8)
    bench.until(lambda: bench.back_end.taken == 1)
    bench.pci.pause()
    bench.back_end.hold = False  # done while the pause is waited for
    assert bench.pci.paused(PATIENCE)
    last = bench.device.take_log()
    assert last[data // 4096 // 8] & 1 << data // 4096 % 8
    assert last[used // 4096 // 8] & 1 << used // 4096 % 8
    bench.used()
    bench.device.stop_log()
    bench.pci.resume()
    assert bench.reads()
    assert not any(bench.device.take_log())


def test_a_changed_configuration_is_shown(bench: Bench) -> None:
    bench.guest.probe()
    (session,) = bench.back_end.sessions
    bench.back_end.config = pack("<Q", 99) + bytes(52)
    session.send_own(2)
    bench.until(lambda: bench.guest.device_config()[:8] == pack("<Q", 99))
    bench.until(lambda: bench.guest.interrupts(0) > 0)
    session.send_own(2)  # the same again, and what nobody knows
    session.send_own(77)
    assert bench.reads()
    assert bench.changes == []


def test_a_pause_waits_for_what_is_in_flight(bench: Bench) -> None:
    bench.guest.probe()
    bench.back_end.hold = True
    data = bench.add(5)
    bench.until(lambda: bench.back_end.taken == 1)
    bench.pci.pause()
    assert not bench.pci.paused(0.01)
    bench.pci.resume()  # the machine goes on then
    bench.back_end.hold = False
    bench.used()
    assert bench.memory.read(data, 8) == pack("<Q", 5)
    bench.pause()
    bench.device.save()


def test_a_back_end_that_finishes_nothing_holds_no_second_pause(bench: Bench) -> None:
    bench.guest.probe()
    bench.back_end.hold = True
    bench.add(5)
    bench.until(lambda: bench.back_end.taken == 1)
    for expected in (False, True):
        bench.pci.pause()
        assert bench.pci.paused(0.01) is expected
        if not expected:
            bench.pci.resume()
    assert bench.changes[0] == "it does not finish its requests"
    with pytest.raises(HostError, match="with requests in flight"):
        bench.device.save()


# --- the guest ------------------------------------------------------------------------------------
def test_a_used_index_that_the_guest_wrote_is_its_error(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.reads()
    bench.memory.write(bench.driver.used + 2, pack("<H", 500))
    bench.pause()
    assert "queue 0: used index 500, not 1" in bench.errors[0]
    bench.pci.resume()
    assert bench.guest.status & NEEDS_RESET
    bench.guest.probe()
    assert bench.reads()


def test_a_used_index_is_looked_at_before_the_start(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.reads()
    bench.pause()
    bench.memory.write(bench.driver.used + 2, pack("<H", 9))
    bench.pci.resume()
    assert bench.errors == ["queue 0: used index 9, not 1"]
