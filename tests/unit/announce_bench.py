"""A VM's NICs without the VM, for the tests of the announcer."""

from collections.abc import Callable

from godwit.announce.announcer import Announcer
from godwit.announce.station import Station
from godwit.nic.filterview import FilterView
from godwit.nic.rxfilter import RxFilter
from godwit.runstate import RunState, RunStates
from godwit.testing.clock import FakeClock

S = RunState


class Nic:
    """A NIC that notes what it is asked, and when."""

    def __init__(self, clock: FakeClock, name: str = "nic0", accepts: bool = True) -> None:
        self.name = name
        self.mac = bytes.fromhex("5254000000") + name[-1:].encode()
        self.accepts = accepts
        self.asked: list[float] = []
        self.sent: list[tuple[float, bytes]] = []
        self.error: Exception | None = None
        self.announce_error: Exception | None = None
        self.during: Callable[[], None] | None = None
        self._clock = clock
        self._start = clock.now()

    def announce(self) -> bool:
        self.asked.append(self._at())
        if self.during:
            self.during()
        if self.announce_error:
            raise self.announce_error
        return self.accepts

    def rx_filter(self) -> FilterView:
        return RxFilter().view(self.mac, True)

    def send_from_host(self, frame: bytes) -> None:
        if self.error:
            raise self.error
        self.sent.append((self._at(), frame))

    def _at(self) -> float:
        return round(self._clock.now() - self._start, 6)


class Bench:
    """A VM of NICs without the VM."""

    def __init__(self, first: RunState = S.PRELAUNCH_MIGRATE, **accepts: bool) -> None:
        self.clock = FakeClock()
        self.nics = [Nic(self.clock, name, does) for name, does in accepts.items()]
        self.events: list[tuple[str, dict[str, object]]] = []
        self.stations = [Station(nic, self.clock) for nic in self.nics]
        self.announcer = Announcer(
            self.stations, self.clock, lambda name, data: self.events.append((name, data))
        )
        self.states = RunStates(first)
        self.states.listen(self.announcer.run_state_changed)

    def go(self, *states: RunState) -> None:
        for state in states:
            self.states.set(state)

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


ROUNDS = [0.0, 0.05, 0.2, 0.45, 0.8]
