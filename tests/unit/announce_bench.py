"""A VM's NICs without the VM, for the tests of the announcer."""

from collections.abc import Callable

import msgspec

from godwit.announce import frames
from godwit.announce.announcer import Announcer, no_verifier
from godwit.announce.frames import arp_request, gratuitous_arp
from godwit.announce.nic_announcement import Verifier
from godwit.announce.uplink import Uplink
from godwit.host.net.ethernet import TPID_8021Q
from godwit.hw.nic.nic import RxFilterInfo
from godwit.hw.virtio.net.rxfilter import RxFilter
from godwit.spec.parameters import (
    AnnounceOptions,
    AnnounceParameters,
    MigrationParameters,
    Rarp,
)
from godwit.spec.runstate import RunState, RunStates
from tests.fakes.clock import FakeClock

S = RunState

#: How long a healthy guest takes to acknowledge, s.
ACK_S = 0.005
IP4, GATEWAY = bytes([192, 0, 2, 7]), bytes([192, 0, 2, 1])
IP6 = bytes.fromhex("20010db8" + "00" * 11 + "07")
VLAN = ((TPID_8021Q, 100),)
PEER, STRANGER = bytes.fromhex("5254000000bb"), bytes.fromhex("525400000099")
GATEWAY6 = bytes.fromhex("20010db8" + "00" * 11 + "01")
Tags = tuple[tuple[int, int], ...]


#: Neither RARP beside the guest, nor questions to gateways, nor rounds beyond the schedule.
QUIET = AnnounceOptions(rarp=Rarp.FALLBACK, ask_gateways=False, patience=0)


def wanted(announce: AnnounceParameters | None = None, **options: object) -> MigrationParameters:
    """Return parameters with a schedule, and quiet options but for those given."""
    return MigrationParameters(
        announce=announce or AnnounceParameters(),
        announce_options=msgspec.structs.replace(QUIET, **options),
    )


class Backlog:
    """A backlog of frames of a tap that the test may lose."""

    def __init__(self) -> None:
        self.lost = self.gone = False
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        self.lost = self.gone


class Nic:
    """A NIC that records attempts and frames, and whose guest acknowledges if ``acks_after``."""

    def __init__(self, clock: FakeClock, name: str = "nic0", accepts: bool = True) -> None:
        self.id = name
        self.tap = f"tap{name[-1:]}"
        number = int(name.removeprefix("nic") or 0)
        self.mac = bytes.fromhex("52540000") + (0x30 + number).to_bytes(2, "big")
        self.accepts = accepts
        self.acks_after: float | None = ACK_S
        self.asked: list[float] = []
        self.sent: list[tuple[float, bytes]] = []
        self.error: Exception | None = None
        self.announce_error: Exception | None = None
        self.during: Callable[[], None] | None = None
        self.on_ack: Callable[[], None] = lambda: None
        self.filter = RxFilter()
        self.rx_backlog = Backlog()
        self._clock = clock
        self._start = clock.now()

    def announce(self) -> bool:
        self.asked.append(self._at())
        if self.during:
            self.during()
        if self.announce_error:
            raise self.announce_error
        if self.accepts and self.acks_after is not None:
            self._clock.call_later(self.acks_after, self.on_ack)
        return self.accepts

    def rx_filter(self) -> RxFilterInfo:
        return self.filter.view(self.mac, True)

    def send_from_host(self, frame: bytes) -> None:
        if self.error:
            raise self.error
        self.sent.append((self._at(), frame))

    @property
    def sent_at(self) -> list[float]:
        """The seconds at which the host sent frames."""
        return [at for at, _ in self.sent]

    def _at(self) -> float:
        return round(self._clock.now() - self._start, 6)


class Port:
    """A port whose state the test sets."""

    def __init__(self, not_ready_reason: str | None = None) -> None:
        self.not_ready_reason = not_ready_reason
        self.index, self.bridge = 5, 3
        self.warning: str | None = None
        self.refreshes = 0

    def refresh(self) -> None:
        self.refreshes += 1


class Questions:
    """A verifier with given answers for :meth:`missing`, after which nothing is missing."""

    wanted = True

    def __init__(self, clock: FakeClock, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.begun: list[float] = []
        self.asked: list[float] = []
        self.read: list[float] = []
        self._clock, self._start = clock, clock.now()

    def begin(self) -> None:
        self.begun.append(self._at())

    def ask(self) -> None:
        self.asked.append(self._at())

    def missing(self) -> list[str]:
        self.read.append(self._at())
        return self.answers.pop(0) if self.answers else []

    def _at(self) -> float:
        return round(self._clock.now() - self._start, 6)


class Bench:
    """The NICs of a VM, their uplinks and the announcer."""

    def __init__(self, first: RunState = S.PRELAUNCH_MIGRATE, **accepts: bool) -> None:
        self.clock = FakeClock()
        self.nics = [Nic(self.clock, name, does) for name, does in accepts.items()]
        self.events: list[tuple[str, dict[str, object]]] = []
        self.uplinks = [Uplink(nic, self.clock) for nic in self.nics]
        for uplink in self.uplinks:
            uplink.siblings = self.uplinks
        self.verifiers: dict[str, Verifier] = {}
        #: What the operator wants; replace them at any time.
        self.parameters = wanted()
        self.announcer = Announcer(
            self.uplinks,
            self.clock,
            lambda name, data: self.events.append((name, data)),
            lambda: self.parameters,
            self._verifier,
        )
        for nic in self.nics:
            nic.on_ack = self._acked(nic.id)
        self.states = RunStates(first)
        self.states.listen(self.announcer.run_state_changed)

    def go(self, *states: RunState) -> None:
        for state in states:
            self.states.set(state)

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def data(self, name: str) -> list[dict[str, object]]:
        """Return the data of each event of a name."""
        return [data for found, data in self.events if found == name]

    def guest_sends(self, frame: bytes, nic: int = 0) -> None:
        """Bring a frame of the guest's, as the watch does."""
        self.uplinks[nic].observer.frame(frame, None, self.clock.now())

    def network_sends(self, frame: bytes, nic: int = 0) -> None:
        """Bring a frame of another host's, as the watch does."""
        uplink = self.uplinks[nic]
        sighting = uplink.observer.network_frame(frame, None, self.clock.now())
        if sighting is not None:
            self.announcer.answered(uplink.nic.id, sighting)

    def listens(self, nic: int = 0) -> None:
        """Have others' frames come by, so that questions are asked."""
        self.uplinks[nic].listens = True

    def sent(self, nic: int = 0) -> list[bytes]:
        """Return the frames the host sent, and forget them."""
        found = [frame for _, frame in self.nics[nic].sent]
        self.nics[nic].sent.clear()
        return found

    def watched(self, nic: int = 0) -> None:
        """Watch the NIC's tap, and have the guest seen to use :data:`IP4`."""
        uplink = self.uplinks[nic]
        uplink.watched = True
        uplink.on_seen = lambda sighting: self.announcer.seen(uplink.nic.id, sighting)
        self.guest_sends(gratuitous_arp(uplink.nic.mac, IP4), nic)

    def _acked(self, name: str) -> Callable[[], None]:
        return lambda: self.announcer.acked(name)

    def _verifier(self, uplink: Uplink, options: AnnounceOptions) -> Verifier:
        return self.verifiers.get(uplink.nic.id) or no_verifier(uplink, options)


ROUNDS = [0.0, 0.05, 0.2, 0.45, 0.8]


def hung(**accepts: bool) -> Bench:
    """Return a running VM whose models accept and whose guests never acknowledge."""
    bench = Bench(**accepts or {"nic0": True})
    for nic in bench.nics:
        nic.acks_after = None
    bench.go(S.RUNNING)
    return bench


def reply(ip: bytes, mac: bytes = PEER, tags: Tags = (), to: bytes = bytes(4)) -> bytes:
    """Return an ARP reply of ``ip``, by default to a probe."""
    payload = frames._arp(2, mac, ip, bytes(6), to)
    return frames.ethernet(b"\x52\x54\0\0\0\x30", mac, tags, 0x0806, payload)


def bench_of(accepts: bool = True, **options: object) -> Bench:
    """Return a VM whose frames and whose network's frames come by, before its guest runs."""
    bench = Bench(nic0=accepts)
    bench.parameters = wanted(**options)
    bench.watched()
    bench.listens()
    return bench


def shows(bench: Bench, *sent: bytes) -> None:
    """Have the guest announce these at each request."""

    def during() -> None:
        for frame in sent:
            bench.guest_sends(frame)

    bench.nics[0].during = during


def waiting() -> tuple[Bench, Nic]:
    """Return a running VM whose guest has asked its gateway, and announces itself when asked."""
    bench = bench_of(ask_gateways=True, patience=60_000)
    nic = bench.nics[0]
    bench.guest_sends(arp_request(nic.mac, IP4, GATEWAY))
    shows(bench, gratuitous_arp(nic.mac, IP4))
    bench.go(S.RUNNING)
    return bench, nic


def proof(bench: Bench) -> tuple[object, object, object]:
    info = bench.announcer.info()[0]
    return info["proof"], info["proved-ms"], info["unproved"]
