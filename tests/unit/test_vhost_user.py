"""A device behind vhost-user: its back end works, breaks rules, is silent, dies and comes back."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from struct import pack, unpack, unpack_from
from typing import Any, cast

import pytest

from godwit.errors import ConfigError, HostError
from godwit.host.vhost_user import BackEnd, connect
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.vhost_user import link
from godwit.hw.virtio.vhost_user.device import VirtioVhostUser
from godwit.spec.back_ends import ImageFile, Share, VhostUserConfig
from godwit.spec.config import VmConfig, parse_devices
from tests.fakes import vhost_user as fake
from tests.fakes.driver import Driver, Part
from tests.fakes.slot import Board
from tests.fakes.vhost_user import FakeBackEnd
from virtio_bench import NEEDS_RESET, SLOT, Guest

PATIENCE = 20.0
BLK = VhostUserConfig("disk0", "vhost-user-blk", "/disk")
_ALL = (
    *(fake.GET_FEATURES, fake.GET_PROTOCOL, fake.SET_PROTOCOL, fake.SET_BACKEND_FD),
    *(fake.GET_QUEUE_NUM, fake.SET_MEM_TABLE, fake.GET_CONFIG, fake.SET_FEATURES),
    *(fake.GET_INFLIGHT, fake.SET_INFLIGHT, fake.SET_NUM, fake.SET_BASE, fake.SET_ADDR),
    *(fake.SET_KICK, fake.SET_CALL, fake.SET_ENABLE),
)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    """A guest's RAM, shared with the back end."""
    memory = GuestMemory(32 << 20, shared=True)
    yield memory
    memory.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another back end is looked for at once."""
    monkeypatch.setattr(link, "_AGAIN_S", 0.001)


class Bench:
    """A disk of a fake back end in a slot, and its guest."""

    def __init__(
        self,
        memory: GuestMemory,
        back_end: FakeBackEnd | None = None,
        config: VhostUserConfig = BLK,
        reply_s: float = PATIENCE,
        cpus: int = 1,
    ) -> None:
        self.board = board = Board(memory)
        self.memory, self.vm, self.loop = memory, board.vm, board.loop
        self.ports, self.mmio, self.bus = board.ports, board.mmio, board.bus
        self.back_end = back_end or FakeBackEnd()
        self.reply_s = reply_s
        self.changes: list[str | None] = []
        self.device = VirtioVhostUser(config, memory, board.loop, self.connect, cpus=cpus)
        self.device.on_back_end = self.changes.append
        self.requests_lost = 0
        self.device.on_requests_lost = self.lose_requests
        self.pci = VirtioPci(self.device, board.slot(SLOT))
        self.guest = Guest(cast(Any, self))
        self.pci.resume()

    def connect(self, _: VhostUserConfig) -> BackEnd:
        return BackEnd(self.back_end.connect(), self.reply_s)

    def lose_requests(self) -> None:
        self.requests_lost += 1

    @property
    def errors(self) -> list[str]:
        return [message for _, message in self.board.errors]

    @property
    def driver(self) -> Driver:
        return self.guest.queues[0]

    def add(self, sector: int) -> int:
        driver = self.driver
        header, data = Part(driver.place(pack("<IIQ", 0, 0, sector)), 16), driver.place(513)
        driver.add([header, Part(data, 513, True)])
        self.guest.kick(0)
        return data

    def used(self, count: int = 1) -> None:
        for _ in range(count):
            self.until(lambda: self.driver.take() is not None)

    def reads(self, sector: int = 3) -> bool:
        data = self.add(sector)
        self.used()
        return self.memory.read(data, 9) == pack("<QB", sector, 0)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, "it does not come"
            self.loop.run_once(0.005)

    def lost(self) -> None:
        self.until(lambda: len(self.changes) > 0 and self.changes[-1] is not None)

    def back(self) -> None:
        self.until(lambda: len(self.changes) > 0 and self.changes[-1] is None)

    def pause(self) -> None:
        self.pci.pause()
        assert self.pci.paused(PATIENCE)

    def close(self) -> None:
        self.back_end.hold = False
        self.pause()
        self.pci.close()
        self.back_end.kill()
        self.board.close()


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
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


def test_features_are_those_that_both_know(memory: GuestMemory) -> None:
    back_end = FakeBackEnd(features=fake.FEATURES & ~(1 << 29) | 1 << 11 | 1 << 40)
    bench = Bench(memory, back_end)
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


# --- what the back end does -----------------------------------------------------------------------
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
def test_requests_in_flight_are_done_again(memory: GuestMemory, record: bool) -> None:
    protocol = fake.PROTOCOL if record else fake.PROTOCOL & ~(1 << 12)
    bench = Bench(memory, FakeBackEnd(protocol))
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
    assert [unpack("<Q", memory.read(at, 8))[0] for at in places] == [5, 6]
    assert bench.reads()
    assert bench.errors == []
    bench.close()


def test_without_a_record_an_unknown_order_needs_a_reset(memory: GuestMemory) -> None:
    bench = Bench(memory, FakeBackEnd(fake.PROTOCOL & ~(1 << 12)))
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


def test_a_request_left_long_ago_is_not_mistaken_for_the_last(memory: GuestMemory) -> None:
    """One is stuck, and all others have one head: the rings look as if all were in order."""
    bench = Bench(memory, FakeBackEnd(fake.PROTOCOL & ~(1 << 12)))
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


def test_without_a_record_a_loss_at_rest_loses_nothing(memory: GuestMemory) -> None:
    bench = Bench(memory, FakeBackEnd(fake.PROTOCOL & ~(1 << 12)))
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
    assert memory.read(data, 8) == pack("<Q", 6)
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
def test_it_dies_at_any_message(memory: GuestMemory, request_number: int) -> None:
    back_end = FakeBackEnd()
    back_end.dies_at = request_number
    try:
        bench = Bench(memory, back_end)
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
    memory: GuestMemory, request_number: int, answer: bytes | None
) -> None:
    if request_number == fake.GET_FEATURES and answer == b"\xff" * 8:
        return  # that is a right one
    back_end = FakeBackEnd()
    back_end.answers[request_number] = answer
    try:
        bench = Bench(memory, back_end, reply_s=0.1)
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


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("back_end", "says"),
    [
        (FakeBackEnd(features=fake.FEATURES & ~(1 << 32)), "does not know virtio 1"),
        (FakeBackEnd(protocol=fake.PROTOCOL & ~(1 << 9)), "shows no configuration"),
    ],
    ids=["legacy", "no configuration"],
)
def test_a_back_end_that_will_not_do(memory: GuestMemory, back_end: FakeBackEnd, says: str) -> None:
    with pytest.raises(HostError, match=says):
        Bench(memory, back_end)
    back_end.kill()


def test_more_queues_than_it_has(memory: GuestMemory) -> None:
    back_end = FakeBackEnd()
    with pytest.raises(HostError, match="it has 4 queues, and 5 are wanted"):
        Bench(memory, back_end, BLK._replace(queues=5))
    back_end.kill()


@pytest.mark.parametrize(("cpus", "queues"), [(1, 1), (3, 3), (8, 4)])
def test_a_queue_for_each_vcpu(memory: GuestMemory, cpus: int, queues: int) -> None:
    """As far as the back end has them, and the guest reads how many there are (num_queues)."""
    bench = Bench(memory, cpus=cpus)
    assert len(bench.device.queues) == bench.device.properties()["queues"] == queues
    assert unpack_from("<H", bench.device.config(), 34)[0] == queues
    bench.guest.probe()
    assert len(bench.guest.queues) == queues
    assert bench.reads()
    bench.close()


def test_nobody_listens() -> None:
    with pytest.raises(HostError, match="No such file"):
        connect("/nowhere/at/all")
    with pytest.raises(HostError, match="path too long"):
        connect("/" * 300)


def test_silence_has_an_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(HostError, match=r"did not answer within 0\.05 s"):
        BackEnd(ours, reply_s=0.05)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (VhostUserConfig("s", "vhost-user-fs", tag="src", serves=Share("/src")), "is a share"),
        (BLK._replace(serves=ImageFile("x.qcow2", "qcow2")), r"qemu-img convert -O raw"),
    ],
)
def test_what_is_tied_to_its_host(memory: GuestMemory, config: VhostUserConfig, says: str) -> None:
    bench = Bench(memory, config=config)
    for into_file in (False, True):
        assert says in (bench.device.unmovable(into_file) or "")
    bench.close()


def test_a_disk_that_is_written_is_in_no_copy(memory: GuestMemory) -> None:
    for features, copied in ((fake.FEATURES, False), (fake.FEATURES | 1 << 5, True)):
        bench = Bench(memory, FakeBackEnd(features=features))
        assert (bench.device.why_no_copy() is None) is copied
        bench.close()


def test_one_that_does_not_log_stays(memory: GuestMemory) -> None:
    bench = Bench(memory, FakeBackEnd(protocol=fake.PROTOCOL & ~2))
    reason = bench.device.unmovable(False)
    assert reason == "the back end of 'disk0' does not log what it writes (VHOST_F_LOG_ALL)"
    bench.close()


# --- options --------------------------------------------------------------------------------------
def test_options() -> None:
    given = [
        ("--device", "vhost-user,socket=/run/d.sock,type=blk,queues=2"),
        ("--device", "vhost-user,socket=/run/f.sock,type=fs,tag=src,id=files"),
        ("--share", "path=/srv,tag=data,readonly"),
    ]
    assert parse_devices(given) == (
        VhostUserConfig("vhost-user0", "vhost-user-blk", "/run/d.sock", 2),
        VhostUserConfig("files", "vhost-user-fs", "/run/f.sock", queues=1, tag="src"),
        VhostUserConfig("share0", "vhost-user-fs", tag="data", serves=Share("/srv", True)),
    )


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--device", "vfio,host=1", "begin with vhost-user"),
        ("--device", "vhost-user,type=blk", "socket= needs the path"),
        ("--device", f"vhost-user,socket=/{'x' * 107},type=blk", "at most 107 bytes"),
        ("--device", "vhost-user,socket=/s,type=gpu", "type=gpu"),
        ("--device", "vhost-user,socket=/s,type=fs", "tag= belongs to type=fs"),
        ("--device", "vhost-user,socket=/s,type=blk,tag=x", "tag= belongs to type=fs"),
        ("--device", "vhost-user,socket=/s,type=blk,queues=17", "from 1 to 16"),
        ("--share", "tag=x", "path= needs the folder"),
        ("--share", f"path=/srv,tag={'x' * 37}", "1 to 36 bytes"),
    ],
)
def test_options_that_are_wrong(option: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_devices([(option, value)])


def test_ram_has_to_be_shared_and_tags_differ() -> None:
    devices = (VhostUserConfig("share0", "vhost-user-fs", tag="x", serves=Share("/a")),)
    with pytest.raises(ConfigError, match=r"'share0': another process serves it.*shared=on"):
        VmConfig(devices=devices)
    two = (*devices, devices[0]._replace(id="share1"))
    with pytest.raises(ConfigError, match="two shares have the tag 'x'"):
        VmConfig(devices=two, shared_memory=True)
