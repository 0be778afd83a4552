"""How many queues a disk has: one for each vCPU, or as many as are asked for, or there are.

With fewer, a request's end comes to a vCPU that may not have asked, and has to send it on.
"""

from __future__ import annotations

from pathlib import Path
from struct import pack, unpack_from

import pytest

from blk_bench import make_image
from godwit.errors import HostError, StreamError
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.blk.device import F_MQ, make
from godwit.migration.wire import compatibility
from godwit.spec.back_ends import VhostUserConfig
from godwit.spec.config import DiskConfig
from tests.fakes import vhost_user as fake
from tests.fakes.host import Host, config
from tests.fakes.slot import Board
from tests.fakes.vhost_user import FakeBackEnd
from vhost_user_bench import BLK, Bench

pytestmark = pytest.mark.usefixtures("quick_links")
_NUM_QUEUES = 34  # in struct virtio_blk_config (5.2.4)
_WITHOUT_MQ = fake.PROTOCOL & ~1


# --- in the process -------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "queues"), [(None, 3), (1, 1), (5, 5)])
def test_in_the_process(
    memory: GuestMemory, tmp_path: Path, given: int | None, queues: int
) -> None:
    board = Board(memory)
    path = make_image(tmp_path / "disk.raw")
    pci = make(DiskConfig("disk0", str(path), queues=given), board.slot(cpus=3))
    device = pci.device
    assert device.properties()["queues"] == len(device.queues) == queues
    assert unpack_from("<H", device.config(), _NUM_QUEUES)[0] == queues
    assert bool(device.offered & F_MQ) == (queues > 1)
    pci.close()
    board.close()


@pytest.mark.parametrize(("here", "there"), [(2, 1), (1, 2)])
def test_a_guest_goes_where_there_are_as_many(tmp_path: Path, here: int, there: int) -> None:
    path = make_image(tmp_path / "disk.raw")
    source, destination = (
        Host(config(("--disk", f"path={path},queues={count}"), cpus=2)) for count in (here, there)
    )
    hello = compatibility.describe(source.machine, bytes(16))
    says = f"disk0, queues: {here} at the source, {there} here; give queues={here} here"
    with pytest.raises(StreamError, match=says):
        compatibility.check(hello, destination.machine)
    default = Host(config(("--disk", f"path={path}"), cpus=2))
    if here == 2:
        compatibility.check(hello, default.machine)
    for host in (source, destination, default):
        host.close()


# --- behind vhost-user, whose fake back end has four ----------------------------------------------
@pytest.mark.parametrize(("cpus", "queues"), [(1, 1), (3, 3), (8, 4)])
def test_as_far_as_the_back_end_has_them(shared: GuestMemory, cpus: int, queues: int) -> None:
    bench = Bench(shared, cpus=cpus)
    assert len(bench.device.queues) == bench.device.properties()["queues"] == queues
    assert unpack_from("<H", bench.device.config(), _NUM_QUEUES)[0] == queues
    bench.guest.probe()
    assert len(bench.guest.queues) == queues
    assert bench.reads()
    bench.close()


@pytest.mark.parametrize(
    ("protocol", "features", "answer", "queues"),
    [
        (fake.PROTOCOL, fake.FEATURES, (1 << 64) - 1, 8),
        (_WITHOUT_MQ, fake.FEATURES, 4, 1),
        (fake.PROTOCOL, fake.FEATURES & ~F_MQ, 4, 1),
    ],
    ids=["more than any guest has vCPUs", "it does not say", "its guest may use one"],
)
def test_what_a_back_end_says_of_itself(
    shared: GuestMemory, protocol: int, features: int, answer: int, queues: int
) -> None:
    back_end = FakeBackEnd(protocol, features)
    back_end.answers[fake.GET_QUEUE_NUM] = pack("=Q", answer)
    bench = Bench(shared, back_end, cpus=8)
    assert len(bench.device.queues) == queues
    bench.close()


@pytest.mark.parametrize(
    ("protocol", "answer", "given", "says"),
    [
        (fake.PROTOCOL, 4, 5, "it has 4 queues, and 5 are wanted"),
        (fake.PROTOCOL, 0, None, "it has 0 queues, and 1 are wanted"),
        (_WITHOUT_MQ, 4, 2, "it has 1 queues, and 2 are wanted"),
    ],
)
def test_fewer_than_are_wanted(
    shared: GuestMemory, protocol: int, answer: int, given: int | None, says: str
) -> None:
    back_end = FakeBackEnd(protocol)
    back_end.answers[fake.GET_QUEUE_NUM] = pack("=Q", answer)
    with pytest.raises(HostError, match=says):
        Bench(shared, back_end, BLK._replace(queues=given), cpus=4)
    back_end.kill()


@pytest.mark.parametrize("fewer", [True, False], ids=["fewer", "it does not say"])
def test_another_back_end_has_to_have_as_many(shared: GuestMemory, fewer: bool) -> None:
    """One that is taken for want of a look never serves what the other vCPUs ask."""
    bench = Bench(shared, cpus=2)
    bench.guest.probe()
    assert bench.reads()
    back_end = bench.back_end
    back_end.kill()
    bench.lost()
    if fewer:
        back_end.answers[fake.GET_QUEUE_NUM] = pack("=Q", 1)
    else:
        back_end.protocol = _WITHOUT_MQ
    back_end.revive()
    bench.until(lambda: "it has 1 queues, and 2 are wanted" in (bench.changes[-1] or ""))
    back_end.answers.clear()
    back_end.protocol = fake.PROTOCOL
    bench.back()
    assert bench.reads()
    bench.close()


def test_a_share_has_one_whatever_its_back_end_has(shared: GuestMemory) -> None:
    """Beside that for urgent requests."""
    files = VhostUserConfig("share0", "vhost-user-fs", "/share", tag="src")
    back_end = FakeBackEnd()
    back_end.answers[fake.GET_QUEUE_NUM] = pack("=Q", 2)
    bench = Bench(shared, back_end, files, cpus=4)
    assert bench.device.properties()["queues"] == 1
    assert len(bench.device.queues) == 2
    bench.close()
