"""What a device behind vhost-user refuses, and its options."""

from __future__ import annotations

import socket

import pytest

from godwit.errors import ConfigError, HostError
from godwit.host.vhost_user import BackEnd, connect
from godwit.hw.memory import GuestMemory
from godwit.spec.back_ends import ImageFile, Share, VhostUserConfig
from godwit.spec.config import VmConfig, parse_devices
from tests.fakes import vhost_user as fake
from tests.fakes.vhost_user import FakeBackEnd
from vhost_user_bench import BLK, Bench

pytestmark = pytest.mark.usefixtures("quick_links")


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("back_end", "says"),
    [
        (FakeBackEnd(features=fake.FEATURES & ~(1 << 32)), "does not know virtio 1"),
        (FakeBackEnd(protocol=fake.PROTOCOL & ~(1 << 9)), "shows no configuration"),
    ],
    ids=["legacy", "no configuration"],
)
def test_a_back_end_that_will_not_do(shared: GuestMemory, back_end: FakeBackEnd, says: str) -> None:
    with pytest.raises(HostError, match=says):
        Bench(shared, back_end)
    back_end.kill()


def test_more_queues_than_it_has(shared: GuestMemory) -> None:
    back_end = FakeBackEnd()
    with pytest.raises(HostError, match="it has 4 queues, and 5 are wanted"):
        Bench(shared, back_end, BLK._replace(queues=5))
    back_end.kill()


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
def test_what_is_tied_to_its_host(shared: GuestMemory, config: VhostUserConfig, says: str) -> None:
    bench = Bench(shared, config=config)
    for into_file in (False, True):
        assert says in (bench.device.unmovable(into_file) or "")
    bench.close()


def test_a_disk_that_is_written_is_in_no_copy(shared: GuestMemory) -> None:
    for features, copied in ((fake.FEATURES, False), (fake.FEATURES | 1 << 5, True)):
        bench = Bench(shared, FakeBackEnd(features=features))
        assert (bench.device.why_no_copy() is None) is copied
        bench.close()


def test_one_that_does_not_log_stays(shared: GuestMemory) -> None:
    bench = Bench(shared, FakeBackEnd(protocol=fake.PROTOCOL & ~2))
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
        VhostUserConfig(
            "share0", "vhost-user-fs", queues=1, tag="data", serves=Share("/srv", True)
        ),
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
