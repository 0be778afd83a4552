"""The monitors of uplinks, with fakes for the watch and the ports.

tests/unit/test_watch.py and tests/vm/test_ports.py have the real ones.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from announce_bench import GATEWAY, IP4, IP6, Nic, Port
from godwit.announce import monitors as module
from godwit.announce.dissect import Sighting
from godwit.announce.frames import Tag, arp_request, gratuitous_arp, solicitation
from godwit.announce.monitors import NARROW_S, Monitors
from godwit.announce.uplink import AlwaysReady, Uplink
from godwit.errors import HostError
from godwit.host.net.bpf import Bits
from godwit.spec.parameters import AnnounceOptions, Verify
from tests.fakes.clock import FakeClock

PEER = bytes.fromhex("5254000000bb")
REPLY = (
    b"\x52\x54\0\0\0\x30" + PEER + bytes.fromhex("08060001080006040002")
    + PEER + GATEWAY + b"\x52\x54\0\0\0\x30" + IP4
)  # fmt: skip


class Watch:
    """A stand-in for the watch on a tap."""

    error: HostError | None = None
    all: list[Watch]

    def __init__(
        self,
        tap: str,
        on_frame: Callable[[bytes, Tag | None], None],
        loop: object,
        on_error: Callable[[OSError], None] = lambda error: None,
        *,
        network: bool = False,
    ) -> None:
        self.tap, self.on_frame, self.on_error, self.network = tap, on_frame, on_error, network
        self.closed = True
        self.opened = 0
        self.injected: list[bytes] = []
        self.narrowed: list[Bits] = []
        self.reopen()
        self.all.append(self)

    def reopen(self) -> None:
        if Watch.error is not None:
            raise Watch.error
        self.opened += 1
        self.closed = False

    def inject(self, frame: bytes) -> None:
        self.injected.append(frame)

    def narrow(self, known: Bits) -> None:
        self.narrowed.append(known)

    def close(self) -> None:
        self.closed = True


class TapPort(Port):
    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap
        self.on_ready: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None
        self.on_anew: Callable[[], None] = lambda: None


class Ports:
    """A stand-in for the ports of taps."""

    error: HostError | None = None
    all: list[Ports]

    def __init__(self, taps: list[str], loop: object) -> None:
        if Ports.error is not None:
            raise Ports.error
        self.ports = [TapPort(tap) for tap in taps]
        self.closed = False
        self.all.append(self)

    def close(self) -> None:
        self.closed = True


class Place:
    def __init__(self, count: int = 2) -> None:
        self.loop: Any = FakeClock()
        self.nics = [Nic(self.loop, f"nic{number}") for number in range(count)]
        self.uplinks = {f"tap{n}": Uplink(nic, self.loop) for n, nic in enumerate(self.nics)}
        self.first = next(iter(self.uplinks.values()), None)
        self.logged: list[str] = []

    def monitors(self) -> Monitors:
        return Monitors(list(self.uplinks.values()), self.loop, self.logged.append)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TapWatch", Watch)
    monkeypatch.setattr(module, "Ports", Ports)
    for fake in (Watch, Ports):
        monkeypatch.setattr(fake, "error", None)
        monkeypatch.setattr(fake, "all", [], raising=False)


@pytest.fixture
def place() -> Place:
    return Place()


def test_each_tap_is_watched_for_its_uplink(place: Place) -> None:
    monitors = place.monitors()
    seen: list[tuple[str, Sighting]] = []
    monitors.on_seen = lambda nic, sighting: seen.append((nic, sighting))
    assert [(watch.tap, watch.network) for watch in Watch.all] == [
        ("tap0", False), ("tap0", True), ("tap1", False), ("tap1", True),
    ]  # fmt: skip
    frame = gratuitous_arp(place.nics[1].mac, IP4)
    Watch.all[2].on_frame(frame, None)
    Watch.all[0].on_frame(frame[:20], None)
    assert [(nic, sighting.ip) for nic, sighting in seen] == [("nic1", IP4)]
    first, second = place.uplinks.values()
    assert (first.watched, second.watched, first.observer.malformed) == (True, True, 1)
    assert (len(first.entries()), len(second.entries())) == (1, 2)
    assert place.logged == []


def test_ports_are_followed(place: Place) -> None:
    monitors = place.monitors()
    ready: list[str] = []
    monitors.on_ready = ready.append
    (ports,) = Ports.all
    assert [uplink.port for uplink in place.uplinks.values()] == ports.ports
    for port in reversed(ports.ports):
        port.on_ready()
    assert ready == ["nic1", "nic0"]


def test_no_nic_no_watch() -> None:
    monitors = Place(0).monitors()
    assert (Watch.all, Ports.all) == ([], [])
    monitors.close()


def test_what_cannot_be_watched_is_logged_and_done_without(place: Place) -> None:
    Watch.error = HostError("cannot watch tap: not permitted")
    Ports.error = HostError("rtnetlink: no")
    monitors = place.monitors()
    assert place.logged == [
        "nic0: cannot watch tap: not permitted",
        "nic1: cannot watch tap: not permitted",
        "the ports of the taps are taken for ready: rtnetlink: no",
    ]
    for uplink in place.uplinks.values():
        assert not uplink.watched
        assert not uplink.listens
        assert isinstance(uplink.port, AlwaysReady)
    assert place.first is not None
    verifier = monitors.verifier(place.first, AnnounceOptions(verify=Verify.PROBE, refresh=True))
    assert place.logged[3:] == []
    verifier.begin()  # no answer will be seen, which is reported
    assert (verifier.wanted, len(verifier.missing())) == (True, 1)
    monitors.close()


def test_a_watch_that_is_lost_is_logged(place: Place) -> None:
    place.monitors()
    Watch.all[0].on_error(OSError(100, "Network is down"))
    assert place.logged == ["nic0: the tap is no longer watched: Network is down"]
    assert [uplink.watched for uplink in place.uplinks.values()] == [False, True]
    Watch.all[1].on_error(OSError(100, "Network is down"))
    assert [uplink.listens for uplink in place.uplinks.values()] == [False, True]


def test_all_is_given_back(place: Place) -> None:
    monitors = place.monitors()
    assert place.first is not None
    monitors.verifier(place.first, AnnounceOptions(refresh=True))
    monitors.close()
    assert len(Watch.all) == 4
    assert all(watch.closed for watch in Watch.all)
    assert Ports.all[0].closed


# --- verifiers ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (AnnounceOptions(), False),
        (AnnounceOptions(verify=Verify.FDB), True),
        (AnnounceOptions(verify=Verify.PROBE), True),
        (AnnounceOptions(refresh=True), False),
    ],
)
def test_a_verifier_is_made_where_wanted(
    place: Place, options: AnnounceOptions, wanted: bool
) -> None:
    monitors = place.monitors()
    assert place.first is not None
    assert monitors.verifier(place.first, options).wanted == wanted
    assert len(Watch.all) == 4


@pytest.mark.parametrize("refresh", [False, True])
def test_answers_come_to_the_verifier_and_go_to_the_guest(place: Place, refresh: bool) -> None:
    monitors = place.monitors()
    uplink = place.first
    assert uplink is not None
    Watch.all[0].on_frame(arp_request(place.nics[0].mac, IP4, GATEWAY), None)
    options = AnnounceOptions(verify=Verify.PROBE, refresh=refresh)
    verifier = monitors.verifier(uplink, options)
    watch = Watch.all[1]
    verifier.ask()
    assert verifier.missing() == ["no answer over IPv4"]
    watch.on_frame(REPLY, None)
    assert verifier.missing() == []
    assert watch.injected == ([gratuitous_arp(PEER, GATEWAY)] if refresh else [])


def test_an_answer_comes_to_all_that_ask(place: Place) -> None:
    monitors = place.monitors()
    assert place.first is not None
    Watch.all[0].on_frame(arp_request(place.nics[0].mac, IP4, GATEWAY), None)
    options = AnnounceOptions(verify=Verify.PROBE)
    both = [monitors.verifier(place.first, options) for _ in range(2)]
    for verifier in both:
        verifier.ask()
    Watch.all[1].on_frame(REPLY, None)
    assert [verifier.missing() for verifier in both] == [[], []]
    # Those that are over are forgotten.
    del verifier, both
    gc.collect()
    assert len(monitors._asking["nic0"]) == 0


def test_a_tap_that_came_back_is_watched_again(place: Place) -> None:
    monitors = place.monitors()
    first = place.first
    assert first is not None
    both = Watch.all[:2]
    for watch in both:
        watch.close()
        watch.on_error(OSError(19, "No such device"))
    assert (first.watched, first.listens) == (False, False)
    monitors.verifier(first, AnnounceOptions())
    assert [(watch.opened, watch.closed) for watch in both] == [(2, False)] * 2
    assert (first.watched, first.listens) == (True, True)
    for watch in both:
        watch.close()
    Watch.error = HostError("there is no such interface")
    monitors.verifier(first, AnnounceOptions())
    assert place.logged[-1] == "nic0: there is no such interface"


def test_the_interface_that_got_a_lost_taps_name_is_not_watched(place: Place) -> None:
    monitors = place.monitors()
    first = place.first
    assert first is not None
    for watch in Watch.all[:2]:
        watch.close()
        watch.on_error(OSError(19, "No such device"))
    place.nics[0].rx_backlog.lost = True
    monitors.verifier(first, AnnounceOptions())
    assert [(watch.opened, watch.closed) for watch in Watch.all[:2]] == [(1, True)] * 2
    assert (first.watched, first.listens) == (False, False)


# --- the network's frames -------------------------------------------------------------------------
def test_what_others_claim_leaves_the_book_and_is_passed_on(place: Place) -> None:
    monitors = place.monitors()
    answers: list[tuple[str, bytes | None]] = []
    monitors.on_answer = lambda nic, sighting: answers.append((nic, sighting.ip))
    guest, network = Watch.all[:2]
    assert place.first is not None
    guest.on_frame(gratuitous_arp(place.nics[0].mac, IP4), None)
    assert len(place.first.entries()) == 2
    network.on_frame(gratuitous_arp(PEER, IP4), None)
    network.on_frame(b"\xff" * 20, None)
    assert len(place.first.entries()) == 1
    assert answers == [("nic0", IP4)]


def test_the_kernel_passes_what_concerns_the_book(place: Place) -> None:
    place.monitors()
    guest, network = Watch.all[:2]
    network.on_frame(gratuitous_arp(PEER, IP4), None)
    place.loop.advance(1)
    assert network.narrowed == [], "no guest is here: anything may matter"
    mac = place.nics[0].mac
    for number in range(5):
        guest.on_frame(gratuitous_arp(mac, bytes([192, 0, 2, 7 + number])), None)
    guest.on_frame(gratuitous_arp(PEER, b"\xc0\0\2\x20"), None)
    guest.on_frame(solicitation(mac, IP6, IP6[:-1] + b"\1"), None)
    assert network.narrowed == []
    place.loop.advance(NARROW_S)
    ips = sum(1 << number for number in (7, 8, 9, 10, 11, 0x20))
    (known,) = network.narrowed
    assert known == Bits(ips, 1 << IP6[-1], 1 << 1, 1 << PEER[-1]), "once for all changes"
    guest.on_frame(gratuitous_arp(mac, IP4), None)
    place.loop.advance(1)
    assert len(network.narrowed) == 1, "nothing is new"


def test_a_tap_that_is_gone_is_checked_and_a_new_one_reported(place: Place) -> None:
    monitors = place.monitors()
    anew: list[str] = []
    monitors.on_anew = anew.append
    port, backlog = Ports.all[0].ports[0], place.nics[0].rx_backlog
    port.on_gone()  # renamed, or in another namespace
    port.on_anew()
    assert (backlog.checks, backlog.lost, anew) == (1, False, [])
    backlog.gone = True
    port.on_gone()
    port.on_anew()
    assert (backlog.checks, backlog.lost, anew) == (2, True, ["nic0"])
