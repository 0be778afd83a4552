"""The lab's EVPN and OVN: what their daemons are given, and the parts that both are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.errors import LabError
from lab.networks import evpn, ovn, parts


def _neighbours(address: str) -> tuple[set[str], str]:
    """Return a VTEP's BGP neighbours, and all of its configuration."""
    text = evpn._bgp(evpn.Vtep("netns", address, Path("/nowhere")))
    words = [line.split() for line in text.splitlines()]
    return {line[1] for line in words if line[2:3] == ["remote-as"]}, text


def test_the_border_reflects_routes_between_hosts_that_have_no_other_neighbour() -> None:
    border, a, b = evpn._C, evpn._A, evpn._B
    for host in (a, b):
        neighbours, text = _neighbours(host)
        assert neighbours == {border}
        assert "route-reflector-client" not in text
        assert "advertise ipv4 unicast" not in text  # the border knows no route to all guests
    neighbours, text = _neighbours(border)
    assert neighbours == {a, b}
    assert text.count("route-reflector-client") == 2
    assert "advertise ipv6 unicast" in text


def test_the_hosts_bridges_neither_learn_from_the_fabric_nor_flood_questions() -> None:
    commands = evpn._vtep(evpn.Vtep("netns", evpn._A, Path("/nowhere")))
    commands += evpn._host(evpn.Vtep("netns", evpn._A, Path("/nowhere")))
    for vni in ("vx10", "vx99"):
        assert f"link set {vni} type bridge_slave neigh_suppress on learning off" in commands


def test_the_guests_logical_port_is_bound_to_its_addresses() -> None:
    words = ovn._logical("52:54:00:00:00:01")
    at = words.index("lsp-set-port-security")
    assert words[at + 1 : at + 3] == ["guest", "52:54:00:00:00:01 10.0.0.2 fd00::2"]


def test_what_does_not_come_is_named() -> None:
    with pytest.raises(LabError, match="the route: not within 0 s"):
        parts.wait("the route", lambda: False, deadline=0)
    parts.wait("the route", lambda: True, deadline=0)


def test_a_command_that_fails_is_shown() -> None:
    assert parts.ask(None, ["echo", "good"]) == "good\n"
    with pytest.raises(LabError, match=r"ls /nowhere: .*No such file"):
        parts.ask(None, ["ls", "/nowhere"])
    with pytest.raises(LabError, match="scripts/setup"):
        parts.ask(None, ["no-such-program"])


def test_a_daemon_that_exits_is_named_with_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.traffic.entering", lambda netns: None)
    argv = ["sh", "-c", "echo no such option; exit 3"]
    with parts.Daemon("netns", argv, tmp_path / "log", "zebra") as daemon:
        daemon._process.wait(10)
        with pytest.raises(LabError, match="zebra exited with 3: no such option"):
            daemon.check()
