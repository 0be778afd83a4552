"""A back end of vhost-user that breaks rules, is silent, dies and comes back."""

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
_ALL = (
    *(fake.GET_FEATURES, fake.GET_PROTOCOL, fake.SET_PROTOCOL, fake.SET_BACKEND_FD),
    *(fake.GET_QUEUE_NUM, fake.SET_MEM_TABLE, fake.GET_CONFIG, fake.SET_FEATURES),
    *(fake.GET_INFLIGHT, fake.SET_INFLIGHT, fake.SET_NUM, fake.SET_BASE, fake.SET_ADDR),
    *(fake.SET_KICK, fake.SET_CALL, fake.SET_ENABLE),
)


@pytest.fixture
def bench(shared: GuestMemory) -> Iterator[Bench]:
    bench = Bench(shared)
    yield bench
    bench.close()


def test_a_back_end_that_dies_is_replaced(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.reads()
    bench.back_end.kill()
    bench.lost()
    assert bench.device.unmovable(True) == "the back end of 'disk0' is gone; start it again first"
    data = bench.add(6)  # the device waits
    bench.back_end.revive()
    bench.back()
    bench.used()
    assert bench.memory.read(data, 8) == pack("<Q", 6)
    assert bench.device.unmovable(True) is None
    assert bench.device.counters() == {"losses": 1}
    assert bench.errors == []


@pytest.mark.parametrize("record", [True, False])
def test_requests_in_flight_are_done_again(shared: GuestMemory, record: bool) -> None:
    protocol = fake.PROTOCOL if record else fake.PROTOCOL & ~(1 << 12)
    bench = Bench(shared, FakeBackEnd(protocol))
    bench.guest.probe()
    assert bench.reads()
    bench.back_end.hold = True
    places = [bench.add(sector) for sector in (5, 6)]
    bench.until(lambda: bench.back_end.taken == 2)
    bench.back_end.kill()
    bench.lost()
    bench.back_end.hold = False
    bench.back_end.revive()
    bench.back()
    bench.used(2)
    assert [unpack("<Q", shared.read(at, 8))[0] for at in places] == [5, 6]
    assert bench.reads()
    assert bench.errors == []
    bench.close()


def test_without_a_record_an_unknown_order_needs_a_reset(shared: GuestMemory) -> None:
    bench = Bench(shared, FakeBackEnd(fake.PROTOCOL & ~(1 << 12)))
    bench.guest.probe()
    bench.back_end.hold = True
    bench.back_end.backwards = True
    for sector in (5, 6):
        bench.add(sector)
    bench.until(lambda: bench.back_end.taken == 2)
    bench.back_end.hold = False
    bench.used(2)
    bench.back_end.hold = True
    bench.add(7)
    bench.until(lambda: bench.back_end.taken == 1)
    bench.back_end.kill()
    bench.lost()
    bench.back_end.hold = False
    bench.back_end.revive()
    bench.back()
    bench.until(lambda: bench.requests_lost == 1)
    assert bench.guest.status & NEEDS_RESET
    assert bench.errors == []  # not the guest's fault
    bench.back_end.kill()
    bench.lost()
    bench.back_end.revive()
    bench.back()  # and nothing new is known
    bench.guest.probe()
    assert bench.requests_lost == 1
    assert bench.reads()
    bench.close()


def test_a_request_left_long_ago_is_not_mistaken_for_the_last(shared: GuestMemory) -> None:
    """One is stuck, and all others have one head: the rings look as if all were in order."""
    bench = Bench(shared, FakeBackEnd(fake.PROTOCOL & ~(1 << 12)))
    bench.guest.probe(size=8)
    driver = bench.driver
    for _ in range(10):
        assert bench.reads()
        driver.repeat_head()
    bench.back_end.hold = True
    bench.add(5)
    bench.until(lambda: bench.back_end.taken == 1)
    bench.back_end.kill()
    bench.lost()
    bench.back_end.hold = False
    bench.back_end.revive()
    bench.back()
    bench.until(lambda: bench.requests_lost == 1)
    assert bench.guest.status & NEEDS_RESET
    assert bench.errors == []  # not the guest's fault
    bench.close()


def test_without_a_record_a_loss_at_rest_loses_nothing(shared: GuestMemory) -> None:
    bench = Bench(shared, FakeBackEnd(fake.PROTOCOL & ~(1 << 12)))
    bench.guest.probe(size=8)
    for _ in range(20):
        assert bench.reads()
        bench.driver.repeat_head()
    bench.back_end.kill()
    bench.lost()
    data = bench.add(6)
    bench.back_end.revive()
    bench.back()
    bench.used()
    assert shared.read(data, 8) == pack("<Q", 6)
    assert bench.errors == []
    bench.close()


def test_it_dies_while_paused_and_the_guest_goes_on(bench: Bench) -> None:
    bench.guest.probe()
    assert bench.reads()
    bench.pause()
    bench.back_end.kill()
    bench.lost()
    bench.device.save()  # nothing is in flight
    bench.pci.resume()
    data = bench.add(4)
    bench.back_end.revive()
    bench.back()
    bench.used()
    assert bench.memory.read(data, 8) == pack("<Q", 4)


def test_another_back_end_has_to_know_what_the_guest_was_offered(bench: Bench) -> None:
    bench.guest.probe()
    bench.back_end.kill()
    bench.lost()
    bench.back_end.features &= ~(1 << 9)
    before = len(bench.back_end.got)
    bench.back_end.revive()
    bench.until(lambda: bench.back_end.got[before:].count(fake.GET_CONFIG) > 1)
    assert bench.changes[-1] == "another will not do: it lacks the features 0x200"
    assert len(bench.changes) == 2
    bench.back_end.features |= 1 << 9
    bench.back()
    assert bench.reads()


def _lacks_log(back_end: FakeBackEnd, lacks: str) -> None:
    if lacks == "feature":
        back_end.features = fake.FEATURES & ~(1 << 26)
    else:
        back_end.protocol = fake.PROTOCOL & ~(1 << 1)


@pytest.mark.parametrize("lacks", ["feature", "protocol"])
def test_another_back_end_that_cannot_log_keeps_the_guest(bench: Bench, lacks: str) -> None:
    bench.guest.probe()
    assert bench.device.unmovable(False) is None
    for changes, says in ((_lacks_log, "does not log what it writes"), (None, None)):
        bench.back_end.kill()
        bench.lost()
        bench.back_end.features, bench.back_end.protocol = fake.FEATURES, fake.PROTOCOL
        if changes is not None:
            changes(bench.back_end, lacks)
        bench.back_end.revive()
        bench.back()
        assert bench.reads()
        why = bench.device.unmovable(False)
        assert why is None if says is None else why is not None and says in why


@pytest.mark.parametrize("lacks", ["feature", "protocol"])
def test_another_back_end_that_cannot_log_waits_for_the_end_of_a_migration(
    bench: Bench, lacks: str
) -> None:
    bench.guest.probe()
    bench.device.start_log()
    bench.back_end.kill()
    bench.lost()
    _lacks_log(bench.back_end, lacks)
    before = len(bench.back_end.got)
    bench.back_end.revive()
    bench.until(lambda: bench.back_end.got[before:].count(fake.GET_CONFIG) > 1)
    assert bench.changes[-1] is not None
    assert "another will not do: it does not log what it writes" in bench.changes[-1]
    assert len(bench.changes) == 2
    bench.device.stop_log()  # the migration has failed
    bench.back()
    assert bench.reads()
    assert bench.errors == []


def test_a_log_that_comes_too_late_for_a_check_loses_the_back_end(bench: Bench) -> None:
    bench.guest.probe()
    bench.back_end.kill()
    bench.lost()
    _lacks_log(bench.back_end, "feature")
    bench.back_end.revive()
    bench.back()
    bench.device.start_log()
    bench.lost()
    bench.until(lambda: "another will not do" in (bench.changes[-1] or ""))
    bench.device.stop_log()
    bench.back()
    assert bench.reads()


@pytest.mark.parametrize("request_number", _ALL)
def test_it_dies_at_any_message(shared: GuestMemory, request_number: int) -> None:
    back_end = FakeBackEnd()
    back_end.dies_at = request_number
    try:
        bench = Bench(shared, back_end)
    except HostError:
        back_end.kill()
        return
    bench.guest.probe()
    bench.lost()
    bench.back_end.dies_at = None
    bench.back()
    assert bench.reads()
    assert bench.errors == []
    bench.close()


_WRONG = (b"", b"\xff" * 3, b"\xff" * 8, b"\xff" * 72, b"\xff" * 4000)


@pytest.mark.parametrize("answer", [*_WRONG, None], ids=str)
@pytest.mark.parametrize(
    "request_number",
    [
        *(fake.GET_FEATURES, fake.GET_PROTOCOL, fake.GET_QUEUE_NUM, fake.GET_CONFIG),
        *(fake.GET_INFLIGHT, fake.GET_BASE),
    ],
)
def test_an_answer_that_is_wrong_or_missing(
    shared: GuestMemory, request_number: int, answer: bytes | None
) -> None:
    if request_number == fake.GET_FEATURES and answer == b"\xff" * 8:
        return  # that is a right one
    back_end = FakeBackEnd()
    back_end.answers[request_number] = answer
    try:
        bench = Bench(shared, back_end, reply_s=0.1)
    except HostError:
        back_end.kill()
        return
    bench.guest.probe()
    bench.pci.pause()
    assert bench.pci.paused(PATIENCE)
    bench.pci.resume()
    back_end.answers.clear()
    if bench.changes:
        bench.back()
    bench.guest.probe()
    assert bench.reads()
    bench.close()


@pytest.mark.parametrize(
    "message",
    [b"\x02", pack("=III", 2, 1, 4000), pack("=III", 2, 9, 8), pack("=III", 2, 2, 0), bytes(4096)],
    ids=range(5),
)
def test_its_own_messages_are_checked(bench: Bench, message: bytes) -> None:
    bench.guest.probe()
    (session,) = bench.back_end.sessions
    session.send_own_bytes(message)
    bench.lost()
    bench.back()
    assert bench.reads()
