"""Whether a tap is wired, by a fake kernel's word; tests/vm/test_ports.py has a real bridge."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from godwit.errors import HostError
from godwit.host.net import links as ports
from godwit.host.net import rtnetlink
from godwit.host.net.links import Port, Ports
from godwit.host.net.rtnetlink import FORWARDING, Link

READY = Link(5, "tap0", True, 3, FORWARDING)


class Kernel:
    """Says of each interface what the test wants."""

    def __init__(self) -> None:
        self.links: dict[str, Link | OSError | None] = {}
        self.asked = 0

    def link(self, name: str) -> Link | None:
        self.asked += 1
        found = self.links.get(name)
        if isinstance(found, OSError):
            raise found
        return found


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(rtnetlink, "link", kernel.link)
    return kernel


class Events:
    """Stands in for LinkEvents."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.news = True

    def changed(self) -> bool:
        return self.news

    def close(self) -> None:
        self.sock.close()


class HandLoop:
    """A loop whose descriptors are served by hand."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        self.watched[fd] = readable

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)


def port(kernel: Kernel) -> tuple[Port, list[str | None]]:
    found = Port("tap0")
    ready: list[str | None] = []
    found.on_ready = lambda: ready.append(found.not_ready_reason)
    return found, ready


def test_before_anybody_looked_it_is_not_ready(kernel: Kernel) -> None:
    assert Port("tap0").not_ready_reason is not None


@pytest.mark.parametrize(
    ("link", "not_ready_reason"),
    [
        (None, "there is no interface 'tap0'"),
        (READY._replace(carrier=False), "'tap0' has no carrier"),
        (READY._replace(carrier=False, port_state=4), "'tap0' has no carrier"),
        (READY._replace(port_state=0), "its bridge's port is disabled"),
        (READY._replace(port_state=1), "its bridge's port is listening"),
        (READY._replace(port_state=2), "its bridge's port is learning"),
        (READY._replace(port_state=4), "its bridge's port is blocking"),
        (READY._replace(port_state=9), "its bridge's port is not forwarding"),
    ],
)
def test_why_frames_would_be_lost(kernel: Kernel, link: Link | None, not_ready_reason: str) -> None:
    found, ready = port(kernel)
    kernel.links["tap0"] = link
    found.refresh()
    assert found.not_ready_reason is not None
    assert found.not_ready_reason.startswith(not_ready_reason)
    assert ready == []
    assert found.index == (5 if link else 0)
    kernel.links["tap0"] = READY
    found.refresh()
    found.refresh()
    assert ready == [None]
    assert (found.index, found.bridge) == (5, 3)


def test_what_is_no_bridges_port_has_no_bridge(kernel: Kernel) -> None:
    found, ready = port(kernel)
    # In a bond, say, or in Open vSwitch: a master that has no forwarding database to ask.
    kernel.links["tap0"] = READY._replace(port_state=None)
    found.refresh()
    assert (found.not_ready_reason, found.bridge, ready) == (None, 0, [None])


def test_one_that_left_its_bridge_is_known_until_it_is_in_one_again(kernel: Kernel) -> None:
    found, _ = port(kernel)
    alone = READY._replace(port_state=None, master=0)
    left = []
    for link in (alone, READY, alone, alone, None, alone, READY):
        kernel.links["tap0"] = link
        found.refresh()
        left.append(found.warning is not None)
    assert left == [False, False, True, True, True, True, False]


def test_a_change_to_ready_is_told_once_each_time(kernel: Kernel) -> None:
    found, ready = port(kernel)
    for state in (2, 3, 3, 2, 4, 3, 3):
        kernel.links["tap0"] = READY._replace(port_state=state)
        found.refresh()
    assert len(ready) == 2


def test_where_nobody_can_be_asked_nothing_is_held_up(kernel: Kernel) -> None:
    found, ready = port(kernel)
    kernel.links["tap0"] = OSError(1, "Operation not permitted")
    found.refresh()
    assert (found.not_ready_reason, ready) == (None, [None])


def test_all_are_looked_at_when_anything_changes(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "LinkEvents", Events)
    loop = HandLoop()
    kernel.links["tap1"] = READY
    both = Ports(["tap0", "tap1"], loop)  # type: ignore[arg-type]
    first, second = both.ports
    assert (first.not_ready_reason is None, second.not_ready_reason is None) == (False, True)
    ready: list[str] = []
    first.on_ready = lambda: ready.append("tap0")
    second.on_ready = lambda: ready.append("tap1")
    kernel.links["tap0"] = READY
    (changed,) = loop.watched.values()
    changed()
    assert ready == ["tap0"]
    both._events.news = False  # type: ignore[attr-defined]
    asked = kernel.asked
    changed()
    assert kernel.asked == asked
    both.close()
    assert loop.watched == {}


def test_a_kernel_that_does_not_tell_is_a_host_error(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Events:
        raise OSError(93, "Protocol not supported")

    monkeypatch.setattr(ports, "LinkEvents", fails)
    with pytest.raises(HostError, match=r"rtnetlink: .*Protocol not supported"):
        Ports(["tap0"], HandLoop())  # type: ignore[arg-type]


def test_another_interface_of_the_name_is_not_the_guests(kernel: Kernel) -> None:
    port = Port("tap0")
    happened: list[str] = []
    port.on_gone = lambda: happened.append("gone")
    port.on_anew = lambda: happened.append("anew")
    kernel.links["tap0"] = READY
    port.refresh()
    kernel.links["tap0"] = None
    for _ in range(3):
        port.refresh()
    assert set(happened) == {"gone"}, "it may have been renamed first, and deleted then"
    assert len(happened) == 3
    happened.clear()
    assert "there is no interface" in str(port.not_ready_reason)
    kernel.links["tap0"] = READY._replace(number=9)
    for _ in range(3):
        port.refresh()
    assert (happened.count("gone"), happened.count("anew")) == (3, 1)
    assert "another interface" in str(port.not_ready_reason)
    kernel.links["tap0"] = READY._replace(number=10)
    port.refresh()
    assert happened.count("anew") == 2
    kernel.links["tap0"] = READY  # it was only renamed
    port.refresh()
    assert port.not_ready_reason is None
