"""A guest's CID between two machines: one of them has it, on one host's kernel as on two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from msgspec import structs

from godwit.errors import KvmError, StreamError
from godwit.hw.virtio.vsock.device import VirtioVsock
from godwit.migration.wire import compatibility
from migration_bench import Migration, S, Side
from tests.fakes.host import NIC, Host, config
from tests.fakes.vhost_vsock import FakeVhostVsock

TOKEN = bytes(16)
FIXED, AUTO = ("--vsock", "cid=9"), ("--vsock", "cid=auto")
Taken = dict[int, FakeVhostVsock]


@pytest.fixture
def taken() -> Iterator[Taken]:
    """The CIDs of the one kernel, on which all machines are."""
    taken: Taken = {}
    made = mock.patch(
        "godwit.hw.virtio.vsock.device.VhostVsock", side_effect=lambda: FakeVhostVsock(taken)
    )
    with made:
        yield taken


@pytest.fixture
def move(taken: Taken, tmp_path: Path) -> Iterator[Migration]:
    move = Migration(tmp_path, here=(NIC, FIXED), there=(NIC, AUTO))
    yield move
    move.here.close()
    move.there.close()
    assert taken == {}


def vsock(side: Side | Host) -> VirtioVsock:
    (found,) = side.machine.devices.having(VirtioVsock)
    return found


def test_on_one_host_the_cid_goes_over_at_the_commit(move: Migration, taken: Taken) -> None:
    assert taken.keys() == {9}
    before = taken[9]
    move.run()
    assert move.here.states.current is S.POSTMIGRATE
    assert before.closed, "the host's connections are reset by that"
    assert taken.keys() == {9}
    assert vsock(move.there).properties() == {"cid": 9}
    assert vsock(move.there)._reset_due


def test_a_guest_that_cannot_go_keeps_its_connections(move: Migration, taken: Taken) -> None:
    move.there.refuse_states()
    before = taken[9]
    move.run()
    assert move.here.states.current is S.RUNNING
    assert taken == {9: before}
    assert not vsock(move.here)._reset_due


def test_a_destination_that_cannot_start_gives_the_cid_back(move: Migration, taken: Taken) -> None:
    def resume(*_: object) -> None:
        raise KvmError("no")

    move.there.machine.resume = resume  # type: ignore[method-assign]
    before = taken[9]
    move.run()
    assert move.here.states.current is S.RUNNING
    assert taken.keys() == {9}
    assert before.closed
    assert vsock(move.here)._device is taken[9]
    assert vsock(move.here)._reset_due, "the host's ends were reset meanwhile"


def test_another_hosts_cid_is_checked_before_the_stop(taken: Taken) -> None:
    here, there = Host(config(FIXED)), Host(config(AUTO))
    here.machine.devices.acquire()
    hello = compatibility.describe(here.machine, TOKEN)
    assert hello.boot
    compatibility.check(hello, there.machine)  # the source has it, and will give it up
    elsewhere = structs.replace(hello, boot="another host's")
    says = "this host cannot take the guest: vsock0: CID 9 is another guest's"
    with pytest.raises(StreamError, match=says):
        compatibility.check(elsewhere, there.machine)
    with pytest.raises(StreamError, match=says):  # from a file: whoever has it stays
        compatibility.check(hello, there.machine, kept=True)
    here.machine.devices.release()
    compatibility.check(elsewhere, there.machine)
    assert taken[9] is vsock(there)._device
    here.close()
    there.close()


def test_a_cid_that_differs_is_refused_by_name(taken: Taken) -> None:
    here, there = Host(config(FIXED)), Host(config(("--vsock", "cid=10")))
    hello = compatibility.describe(here.machine, TOKEN)
    with pytest.raises(StreamError, match="device vsock0, cid: 9 at the source, 10 here"):
        compatibility.check(hello, there.machine)
    here.close()
    there.close()


def test_a_guest_without_a_vsock_does_not_show_the_boot() -> None:
    host = Host(config())
    assert compatibility.describe(host.machine, TOKEN).boot == ""
    host.close()
