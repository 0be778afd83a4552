"""Ports and rtnetlink against the kernel: when a tap is wired, and what its bridge knows.

No guest: the test holds the tap's descriptor, as a guest's NIC does.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from godwit.announce.frames import rarp
from godwit.announce.uplink import Uplink
from godwit.announce.verify import Verification
from godwit.host.loop import Loop
from godwit.host.net import rtnetlink
from godwit.host.net.ethernet import TPID_8021Q
from godwit.host.net.links import Port, Ports
from godwit.host.net.rtnetlink import Forwarding
from godwit.host.net.tap import Tap
from godwit.hw.nic import nic as hw_nic
from godwit.hw.nic.nic import RxFilterInfo
from godwit.hw.virtio.net.rxfilter import RxFilter
from godwit.spec.parameters import Verify
from lab.netns import inside

MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("5254000000aa")
NETNS, TAP, BRIDGE = f"godwit-{os.getpid()}-ports", "ported0", "ports"
VLAN = ((TPID_8021Q, 100),)


def run(*words: str) -> str:
    return subprocess.run(words, check=True, timeout=60, capture_output=True, text=True).stdout


def ip(*words: str) -> None:
    run("ip", "-n", NETNS, *words)


def bridge(*words: str) -> str:
    return run("bridge", "-n", NETNS, *words)


class Place:
    """A tap in a bridge that filters VLANs, in a namespace of its own; a loop that follows it."""

    def __init__(self) -> None:
        self.loop = Loop()
        with inside(NETNS):
            # The host's own frames would fill the bridge's database.
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            self.tap = Tap(TAP)
        ip("link", "add", BRIDGE, "type", "bridge", "vlan_filtering", "1", "stp_state", "0")
        ip("link", "set", TAP, "master", BRIDGE)
        for vlan in ("100", "200"):
            bridge("vlan", "add", "dev", TAP, "vid", vlan)
        self.ready = 0
        with inside(NETNS):
            self.ports = Ports([TAP], self.loop)
        self.port.on_ready = self._ready

    @property
    def port(self) -> Port:
        return self.ports.ports[0]

    def until(self, done: Callable[[], object]) -> None:
        """Run the loop until it is so."""
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, (self.port.not_ready_reason, self.ready)
            with inside(NETNS):
                self.loop.run_once(1)

    def up(self) -> None:
        for name in (BRIDGE, TAP):
            ip("link", "set", name, "up")
        self.until(functools.partial(self.gives, None))

    def gives(self, reason: str | None) -> bool:
        """Whether this is why the port is not ready."""
        return self.port.not_ready_reason == reason

    def forwarding(self) -> list[Forwarding]:
        with inside(NETNS):
            return rtnetlink.forwarding(self.port.bridge)

    def close(self) -> None:
        self.ports.close()
        self.tap.close()
        self.loop.close()

    def _ready(self) -> None:
        assert self.port.not_ready_reason is None
        self.ready += 1


@pytest.fixture
def place() -> Iterator[Place]:
    run("ip", "netns", "add", NETNS)
    try:
        place = Place()
        yield place
        place.close()
    finally:
        run("ip", "netns", "del", NETNS)


def link(place: Place, name: str) -> rtnetlink.Link | None:
    with inside(NETNS):
        return rtnetlink.link(name)


def shown(name: str) -> dict[str, Any]:
    """What iproute2 says of a link."""
    (found,) = json.loads(run("ip", "-n", NETNS, "-d", "-j", "link", "show", "dev", name))
    assert isinstance(found, dict)
    return found


def test_links_are_as_iproute2_shows_them(place: Place) -> None:
    place.up()
    master = shown(BRIDGE)["ifindex"]
    for name, expected in ((TAP, (True, master, 3)), (BRIDGE, (True, 0, None))):
        found = link(place, name)
        assert found is not None
        assert (found.name, found.number) == (name, shown(name)["ifindex"])
        assert (found.carrier, found.master, found.port_state) == expected
    assert shown(TAP)["linkinfo"]["info_slave_data"]["state"] == "forwarding"
    lo = link(place, "lo")
    assert lo is not None
    assert not lo.carrier
    assert link(place, "none-such") is None
    assert (place.port.index, place.port.bridge) == (shown(TAP)["ifindex"], master)


def test_up_and_down(place: Place) -> None:
    assert place.port.not_ready_reason is not None
    assert "no carrier" in place.port.not_ready_reason
    ip("link", "set", BRIDGE, "up")
    ip("link", "set", TAP, "up")
    place.until(lambda: place.ready == 1)
    ip("link", "set", TAP, "down")
    place.until(lambda: place.port.not_ready_reason)
    ip("link", "set", TAP, "up")
    place.until(lambda: place.ready == 2)
    # A bridge that is down disables its ports.
    ip("link", "set", BRIDGE, "down")
    place.until(lambda: place.port.not_ready_reason == "its bridge's port is disabled")
    ip("link", "set", BRIDGE, "up")
    place.until(lambda: place.ready == 3)
    assert place.port.not_ready_reason is None


def test_the_ports_states(place: Place) -> None:
    place.up()
    place.ready = 0
    # Blocking (4) is not kept: without a spanning tree the kernel lets a blocking port forward
    # at once (net/bridge/br_stp.c, br_make_forwarding).
    states = {0: "disabled", 1: "listening", 2: "learning"}
    for number, name in states.items():
        bridge("link", "set", "dev", TAP, "state", str(number))
        reason = f"its bridge's port is {name}"
        place.until(functools.partial(place.gives, reason))
        found = link(place, TAP)
        assert found is not None
        assert (found.carrier, found.port_state) == (True, number)
    assert place.ready == 0
    bridge("link", "set", "dev", TAP, "state", "3")
    place.until(lambda: place.ready)
    assert (place.ready, place.port.not_ready_reason) == (1, None)


def test_a_spanning_tree_lets_the_port_forward_in_its_own_time(place: Place) -> None:
    ip("link", "set", BRIDGE, "type", "bridge", "stp_state", "1", "forward_delay", "200")
    seen: list[str | None] = []
    ip("link", "set", BRIDGE, "up")
    ip("link", "set", TAP, "up")

    def forwards() -> bool:
        seen.append(place.port.not_ready_reason)
        return place.ready > 0

    place.until(forwards)
    assert "its bridge's port is learning" in seen
    assert place.ready == 1


def test_a_port_that_a_spanning_tree_blocks(place: Place) -> None:
    ip("link", "set", BRIDGE, "type", "bridge", "stp_state", "1", "forward_delay", "200")
    # A loop: the second port hears the first.
    ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
    for name in ("veth0", "veth1"):
        ip("link", "set", name, "master", BRIDGE)
        ip("link", "set", name, "up")
    with inside(NETNS):
        ports = Ports(["veth1"], place.loop)
    (port,) = ports.ports
    ready: list[str] = []
    port.on_ready = lambda: ready.append(port.tap)
    ip("link", "set", BRIDGE, "up")
    place.until(lambda: port.not_ready_reason == "its bridge's port is blocking")
    found = link(place, "veth1")
    assert found is not None
    assert (found.port_state, ready) == (4, [])
    # A port without a rival forwards in the end.
    ip("link", "set", "veth0", "nomaster")
    place.until(lambda: ready)
    ports.close()
    assert ready == ["veth1"]


def test_a_tap_without_a_bridge(place: Place) -> None:
    place.up()
    ip("link", "set", TAP, "nomaster")
    place.until(lambda: not place.port.bridge)
    found = link(place, TAP)
    assert found is not None
    assert (found.master, found.port_state, place.port.not_ready_reason) == (0, None, None)


def test_a_tap_that_goes_and_comes(place: Place) -> None:
    place.up()
    place.ready, before = 0, place.port.index
    place.tap.close()  # it is not persistent
    place.until(lambda: place.port.not_ready_reason == f"there is no interface '{TAP}'")
    assert (place.port.index, place.port.bridge) == (0, 0)
    with inside(NETNS):
        place.tap = Tap(TAP)
    ip("link", "set", TAP, "up")
    # A guest's NIC would not be attached to that one.
    place.until(lambda: place.port.index)
    assert place.port.index != before
    assert "another interface" in str(place.port.not_ready_reason)
    assert place.ready == 0


def test_a_storm_of_changes_ends_with_the_truth(place: Place) -> None:
    place.up()
    # More than the socket holds: the kernel says ENOBUFS, and all is asked anew.
    batch = "".join(f"link set {TAP} alias n{number}\n" for number in range(2000))
    batch += f"link set {TAP} down\n"
    subprocess.run(
        ["ip", "-n", NETNS, "-batch", "-"], input=batch, text=True, check=True, timeout=120
    )
    place.until(lambda: place.port.not_ready_reason)
    ip("link", "set", TAP, "up")
    place.until(lambda: place.port.not_ready_reason is None)


def test_the_forwarding_database_is_what_bridge_shows(place: Place) -> None:
    place.up()
    for dev, mac, *more in (
        (TAP, "02:00:00:00:00:01", "vlan", "100"),
        (TAP, "02:00:00:00:00:01", "vlan", "200"),
        (TAP, "02:00:00:00:00:02", "vlan", "1"),
        (BRIDGE, "02:00:00:00:00:03", "self", "local"),
    ):
        flags = more if "self" in more else ["master", "static", *more]
        bridge("fdb", "add", mac, "dev", dev, *flags)
    # Another bridge's entries are no answer, nor are a card's own.
    ip("link", "add", "other", "type", "bridge")
    ip("link", "add", "veth0", "master", "other", "type", "veth", "peer", "name", "veth1")
    bridge("fdb", "add", "02:00:00:00:00:04", "dev", "veth0", "master", "static")
    bridge("fdb", "add", "02:00:00:00:00:05", "dev", TAP, "self")
    for frame in (rarp(MAC), rarp(MAC, VLAN), rarp(OTHER, VLAN)):
        place.tap.send(frame)
    wanted = {
        Forwarding(MAC, 1, place.port.index),
        Forwarding(MAC, 100, place.port.index),
        Forwarding(OTHER, 100, place.port.index),
    }
    place.until(lambda: wanted <= set(place.forwarding()))
    index = {name: shown(name)["ifindex"] for name in (TAP, BRIDGE)}
    expected = {
        Forwarding(
            bytes.fromhex(entry["mac"].replace(":", "")),
            entry.get("vlan", 0),
            index[entry["ifname"]],
        )
        for entry in json.loads(bridge("-j", "fdb", "show", "br", BRIDGE))
        if "self" not in entry.get("flags", [])
    }
    found = place.forwarding()
    assert set(found) == expected
    assert len(found) == len(set(found))
    macs = {one.mac[-1] for one in found if one.mac[0] == 2}
    assert {1, 2} <= macs
    assert not macs & {4, 5}


def test_many_entries_take_many_datagrams(place: Place) -> None:
    place.up()
    macs = [b"\x02\0\0\1" + number.to_bytes(2, "big") for number in range(2000)]
    batch = "".join(f"fdb add {mac.hex(':')} dev {TAP} master static vlan 100\n" for mac in macs)
    subprocess.run(
        ["bridge", "-n", NETNS, "-batch", "-"], input=batch, text=True, check=True, timeout=120
    )
    found = {one.mac for one in place.forwarding() if one.vlan == 100}
    assert set(macs) <= found


def test_a_bridge_that_is_gone_is_an_error(place: Place) -> None:
    place.up()
    with inside(NETNS), pytest.raises(OSError, match="No such device"):
        rtnetlink.forwarding(99999)


class Nic:
    """A NIC whose host sends through the tap."""

    def __init__(self, tap: Tap) -> None:
        self.name, self.mac, self._tap = "nic0", MAC, tap
        self.filter = RxFilter(vlans=[100])

    def announce(self) -> bool:
        return False

    def rx_filter(self) -> RxFilterInfo:
        return self.filter.view(self.mac, True)

    def send_from_host(self, frame: bytes) -> None:
        self._tap.send(frame)


def test_verification_by_the_bridge(place: Place) -> None:
    place.up()
    uplink = Uplink(cast(hw_nic.Nic, Nic(place.tap)), place.loop)
    uplink.port = place.port
    verification = Verification(uplink, Verify.FDB)

    def missing() -> list[str]:
        with inside(NETNS):
            return verification.missing()

    mac = MAC.hex(":")
    assert missing() == [mac, f"{mac} in VLAN 100"]
    uplink.announce(uplink.entries()[:1])
    place.until(lambda: missing() == [f"{mac} in VLAN 100"])
    uplink.announce(uplink.entries())
    place.until(lambda: not missing())
    # It spoke elsewhere since: the bridge has it there.
    ip("link", "add", "veth0", "master", BRIDGE, "type", "veth", "peer", "name", "veth1")
    bridge("fdb", "replace", mac, "dev", "veth0", "master", "static", "vlan", "1")
    assert missing() == [mac]
