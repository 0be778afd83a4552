"""The fallback: the host announces all addresses of a guest that cannot announce itself.

The guest hangs, its interface is down, or its driver is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from vm_bench import MORE_TAPS, Bench, Guest, Watched, announce

from lab.judge import Announcement, announcements
from lab.scenario import MAC, wait_for
from lab.traffic import FLOWS

_MAC2 = "52:54:00:67:77:22"
_NIC2 = f"id=second,tap={MORE_TAPS[0]},mac={_MAC2}"
#: eth1's addresses; the client has .1 and ::1 beside them.
_IPV4, _IPV6 = "10.1.0.2", "fd01::2"
_TAGGED = "10.1.100.2"
_SET_UP = (
    "modprobe 8021q 2>/dev/null; ip link set eth1 up && ip addr add 10.1.0.2/24 dev eth1 && "
    "ip addr add fd01::2/64 dev eth1 && ip link add link eth1 name eth1.100 type vlan id 100 && "
    "ip link set eth1.100 up && ip addr add 10.1.100.2/24 dev eth1.100 && "
    "ping -c 1 -W 10 10.1.0.1 && ping -c 1 -W 10 10.1.100.1 && ping6 -c 1 -W 10 fd01::1"
)
_UNBIND = (
    "cd /sys/bus/virtio/drivers/virtio_net && "
    "basename $(readlink /sys/class/net/eth1/device) > unbind"
)


@pytest.fixture(scope="module", autouse=True)
def _client_addresses(bench: Bench) -> None:
    for interface, address in (
        ("net0", "10.1.0.1/24"),
        ("net0", "fd01::1/64"),
        ("net0.100", "10.1.100.1/24"),
    ):
        bench.client_ip("address", "replace", address, "dev", interface)


@pytest.fixture
def pair(bench: Bench) -> Iterator[tuple[Guest, Watched]]:
    """Yield a guest with two NICs, and its destination."""
    target = bench.run(bench.net.b, "--incoming", "defer", cpus=1, more_nics=[_NIC2])
    guest = bench.boot(keep=[target], cpus=1, more_nics=[_NIC2])
    guest.agent.sh(_SET_UP, 60)
    bench.answers()  # so that the first NIC's addresses are known as well
    wait_for(lambda: _known(guest.vm) >= {_IPV4, _IPV6, _TAGGED}, 30)
    yield guest, target
    bench.drop_guest()


def _known(vm: Watched) -> set[str]:
    return {one["ip"] for one in announce(vm, "second")["addresses"] if one["ip"]}


def _by_host(frames: list[Announcement]) -> set[tuple[str, int, str]]:
    return {(f.kind, f.vlan, f.address) for f in frames if f.sender == "host"}


#: What the host announces for the second NIC.
_COMPLETE = {
    ("RARP", 0, _MAC2),
    ("RARP", 100, _MAC2),
    ("GARP", 0, _IPV4),
    ("GARP", 100, _TAGGED),
    ("NA", 0, _IPV6),
}


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ("ip link set eth1 down", 2),
        (_UNBIND, 0),
    ],
    ids=["interface down", "driver gone"],
)
def test_an_interface_that_is_down_and_a_driver_that_is_gone(
    bench: Bench, pair: tuple[Guest, Watched], before: str, asked: int
) -> None:
    guest, target = pair
    guest.agent.sh(before)
    with bench.capture("silent") as capture:
        bench.move(guest, target)
        wait_for(lambda: announce(target, "second")["rounds"] >= 5, 60)
        guest.agent.ping(60)
        capture.stop()
    record = announce(target, "second")
    assert (record["method"], record["acks"]) == ("host", 0)
    timeouts = [e["data"]["asked"] for e in target.news("ANNOUNCE_TIMEOUT")]
    assert timeouts[:asked] == list(range(1, asked + 1))
    frames = announcements(capture.path, _MAC2)
    assert _by_host(frames) >= _COMPLETE
    assert not [f for f in frames if f.sender == "guest"]
    # The other NIC is none the worse.
    assert announce(target)["method"] == "guest"
    assert announce(target)["acks"] >= 5


def test_the_host_announces_for_a_guest_that_hangs_and_later_announces_itself(
    bench: Bench, pair: tuple[Guest, Watched]
) -> None:
    guest, target = pair
    uri = bench.listen(target)
    guest.agent.hang(18)
    with ExitStack() as stack:
        capture = stack.enter_context(bench.capture("hung"))
        moved = bench.move(guest, target, uri)
        host = target.event("ANNOUNCE_HOST", lambda data: data["nic"] == "second")
        assert host["data"]["why"] == "no ack"
        assert len(target.news("ANNOUNCE_TIMEOUT")) >= 2
        # It awakes and acknowledges what was asked long ago; the next announcement is its own.
        guest.agent.ping(60)
        for nic in ("nic0", "second"):
            wait_for(lambda nic=nic: announce(target, nic)["acks"] >= 1, 60)  # type: ignore[misc]
        target.qmp.execute("migrate-set-parameters", {"announce-deadline": 10_000})
        target.qmp.execute("announce-self", {"id": "later", "rounds": 1})
        wait_for(lambda: announce(target, "second")["acks"] >= 1, 60)
        capture.stop()
    assert announce(target, "second")["method"] == "guest"
    frames = announcements(capture.path, _MAC2)
    assert _by_host(frames) >= _COMPLETE
    assert min(f.at for f in frames) > moved.loaded
    assert {f.address for f in announcements(capture.path, MAC) if f.sender == "host"} >= {
        flow.guest for flow in FLOWS if flow.family == "ipv4"
    }
