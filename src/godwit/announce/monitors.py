"""The stations' eyes and ears: their taps watched, their ports followed, their peers asked.

What cannot be had (no right to look, no such interface) is said once and done without: then the
guest's word has to do, and the host knows fewer addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakSet

from godwit.errors import HostError
from godwit.host.loop import Loop
from godwit.host.net.links import Ports
from godwit.host.net.tap_watch import TapWatch
from godwit.spec.parameters import AnnounceOptions, Verify

from .announcer import no_verifier
from .attempts import Verifier
from .dissect import Sighting
from .frames import Tag
from .uplink import Station
from .verify import Verification


class Taps:
    """See the module. ``stations``: tap's name -> station; ``say(text)`` is for the operator."""

    def __init__(
        self, stations: Mapping[str, Station], loop: Loop, say: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._say = say
        self._tap_of = {station.nic.name: tap for tap, station in stations.items()}
        self._watches: list[TapWatch] = []
        self._answers: dict[str, TapWatch] = {}
        # Of all announcements under way: one on demand may begin while a move's is verified.
        self._asking: dict[str, WeakSet[Verification]] = {}
        self._ports: Ports | None = None
        #: (NIC's name, what its guest announced).
        self.on_seen: Callable[[str, Sighting], None] = lambda nic, sighting: None
        #: A NIC's port became ready.
        self.on_ready: Callable[[str], None] = lambda nic: None
        for tap, station in stations.items():
            self._watch(tap, station)
        if stations:
            self._follow(stations)

    def verifier(self, station: Station, options: AnnounceOptions) -> Verifier:
        """For an announcement that begins."""
        if options.verify is Verify.OFF and not options.refresh:
            return no_verifier(station, options)
        name = station.nic.name
        watch = self._answers.get(name)
        if options.verify is Verify.PROBE or options.refresh:
            try:
                if watch is None:
                    watch = self._answers[name] = TapWatch(
                        self._tap_of[name],
                        lambda frame, outer: self._answered(name, frame, outer),
                        self._loop,
                        answers=True,
                    )
                elif watch.closed:  # the interface was gone; there may be another by now
                    watch.reopen()
            except HostError as error:
                self._say(f"{name}: {error}")
        inject = watch.inject if watch and options.refresh else None
        verification = Verification(station, options.verify, inject)
        # Replaced, not changed: another thread may be going through it.
        self._asking[name] = WeakSet([*self._asking.get(name, ()), verification])
        return verification

    def close(self) -> None:
        """Give everything back."""
        for watch in (*self._watches, *self._answers.values()):
            watch.close()
        if self._ports is not None:
            self._ports.close()

    def _answered(self, name: str, frame: bytes, outer: Tag | None) -> None:
        for verification in tuple(self._asking.get(name, ())):
            verification.answer(frame, outer)

    def _watch(self, tap: str, station: Station) -> None:
        name = station.nic.name
        observer = station.observer
        clock = self._loop.now

        def lost(error: OSError) -> None:
            station.watched = False
            self._say(f"{name}: its tap is watched no more: {error.strerror or error}")

        def look(frame: bytes, outer: Tag | None) -> None:
            observer.frame(frame, outer, clock())

        station.on_seen = lambda sighting: self.on_seen(name, sighting)
        try:
            self._watches.append(TapWatch(tap, look, self._loop, lost))
        except HostError as error:
            self._say(f"{name}: {error}")
        else:
            station.watched = True

    def _follow(self, stations: Mapping[str, Station]) -> None:
        try:
            self._ports = Ports(list(stations), self._loop)
        except HostError as error:
            self._say(f"whether taps are ready is not known: {error}")
            return
        for port in self._ports.ports:
            station = stations[port.tap]
            station.port = port
            port.on_ready = self._ready(station.nic.name)

    def _ready(self, name: str) -> Callable[[], None]:
        return lambda: self.on_ready(name)
