"""The monitors of a VM's uplinks: taps watched, ports followed, peers' answers received.

A monitor that cannot be had (no permission, no such interface) is logged once and done without:
then the guest's ack has to do, and the host knows fewer addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

from godwit.errors import HostError
from godwit.host.loop import Loop
from godwit.host.net.links import Ports
from godwit.host.net.tap_watch import TapWatch
from godwit.spec.parameters import AnnounceOptions, Verify

from .announcer import no_verifier
from .dissect import Sighting
from .frames import Tag
from .nic_announcement import Verifier
from .uplink import Uplink

if TYPE_CHECKING:
    from .verify import Verification


#: From a change of the address book to that of the kernel's filter, seconds: a guest may change the
#: one in a loop.
NARROW_S = 0.05


class Monitors:
    """The monitors of some uplinks, on the event loop.

    ``log(text)`` is for the operator.

    Attributes:
        on_seen: called with the NIC's id for each announcement of the guest's own that was seen.
        on_answer: called with the NIC's id for each address that another host shows on its way to
            the guest.
        on_ready: called with the NIC's id when the NIC's port became ready.
        on_anew: called with the NIC's id when another interface has the name of a lost tap.
    """

    def __init__(self, uplinks: Sequence[Uplink], loop: Loop, log: Callable[[str], None]) -> None:
        self._loop = loop
        self._log = log
        self._watches: dict[str, TapWatch] = {}
        self._network: dict[str, TapWatch] = {}
        self._narrowed: dict[str, int] = {}  # the address book's version in the kernel's filter
        self._narrowing: set[str] = set()
        # Of all announcements under way: one on demand may begin while a migration's is verified.
        self._asking: dict[str, WeakSet[Verification]] = {}
        self._ports: Ports | None = None
        self.on_seen: Callable[[str, Sighting], None] = lambda nic, sighting: None
        self.on_answer: Callable[[str, Sighting], None] = lambda nic, sighting: None
        self.on_ready: Callable[[str], None] = lambda nic: None
        self.on_anew: Callable[[str], None] = lambda nic: None
        for uplink in uplinks:
            uplink.siblings = uplinks
            self._watch_tap(uplink)
        if uplinks:
            self._follow_ports(uplinks)

    def verifier(self, uplink: Uplink, options: AnnounceOptions) -> Verifier:
        """Return the verifier of an announcement that begins.

        Watches of an interface that was gone are opened again: there may be another by now.
        """
        self._reopen(uplink)
        if options.verify is Verify.OFF and not options.refresh:
            return no_verifier(uplink, options)
        name = uplink.nic.id
        watch = self._network.get(name)
        from .verify import Verification  # few ask for it

        inject = watch.inject if watch is not None and options.refresh else None
        verification = Verification(uplink, options.verify, inject)
        # Replaced, not changed: another thread may be going through it.
        self._asking[name] = WeakSet([*self._asking.get(name, ()), verification])
        return verification

    def close(self) -> None:
        """Stop all watches and the following of ports."""
        for watch in (*self._watches.values(), *self._network.values()):
            watch.close()
        if self._ports is not None:
            self._ports.close()

    def _answered(self, name: str, frame: bytes, outer: Tag | None) -> None:
        for verification in tuple(self._asking.get(name, ())):
            verification.answer(frame, outer)

    def _watch_tap(self, uplink: Uplink) -> None:
        name = uplink.nic.id
        observer = uplink.observer
        clock = self._loop.now

        def lost(error: OSError) -> None:
            uplink.watched = False
            self._log(f"{name}: the tap is no longer watched: {error.strerror or error}")

        def deaf(error: OSError) -> None:
            uplink.listens = False

        def look(frame: bytes, outer: Tag | None) -> None:
            observer.frame(frame, outer, clock())
            self._narrow(uplink)

        def listen(frame: bytes, outer: Tag | None) -> None:
            sighting = observer.network_frame(frame, outer, clock())
            if sighting is not None:
                self._answered(name, frame, outer)
                self.on_answer(name, sighting)
            self._narrow(uplink)

        uplink.on_seen = lambda sighting: self.on_seen(name, sighting)
        tap, loop = uplink.nic.tap, self._loop
        try:
            self._watches[name] = TapWatch(tap, look, loop, lost)
            uplink.watched = True
            self._network[name] = TapWatch(tap, listen, loop, deaf, network=True)
            uplink.listens = True
        except HostError as error:
            self._log(f"{name}: {error}")

    def _reopen(self, uplink: Uplink) -> None:
        if uplink.nic.rx_backlog.lost:
            return  # another's interface may have the name now: its frames are not the guest's
        name = uplink.nic.id
        watch, network = self._watches.get(name), self._network.get(name)
        try:
            if watch is not None and watch.closed:
                watch.reopen()
                uplink.watched = True
            if network is not None and network.closed:
                network.reopen()
                uplink.listens = True
                self._narrowed.pop(name, None)
        except HostError as error:
            self._log(f"{name}: {error}")

    def _narrow(self, uplink: Uplink) -> None:
        """Have the kernel pass only frames concerning the address book, a little later.

        Not before a guest is here: whose addresses others claim is not known until then.
        """
        name = uplink.nic.id
        if name in self._narrowing or uplink.observer.version in (None, self._narrowed.get(name)):
            return
        self._narrowing.add(name)
        self._loop.call_later(NARROW_S, lambda: self._set_filter(uplink))

    def _set_filter(self, uplink: Uplink) -> None:
        name = uplink.nic.id
        self._narrowing.discard(name)
        version, known = uplink.observer.known()
        watch = self._network.get(name)
        if version is None or watch is None:
            return
        self._narrowed[name] = version
        watch.narrow(known)

    def _follow_ports(self, uplinks: Sequence[Uplink]) -> None:
        try:
            self._ports = Ports([uplink.nic.tap for uplink in uplinks], self._loop)
        except HostError as error:
            self._log(f"the ports of the taps are taken for ready: {error}")
            return
        by_tap = {uplink.nic.tap: uplink for uplink in uplinks}
        for port in self._ports.ports:
            uplink = by_tap[port.tap]
            uplink.port = port
            port.on_ready = self._ready(uplink.nic.id)
            # It may have another name, or be in another namespace: its descriptor knows.
            port.on_gone = uplink.nic.rx_backlog.check
            port.on_anew = self._anew(uplink)

    def _ready(self, name: str) -> Callable[[], None]:
        return lambda: self.on_ready(name)

    def _anew(self, uplink: Uplink) -> Callable[[], None]:
        def anew() -> None:
            if uplink.nic.rx_backlog.lost:
                self.on_anew(uplink.nic.id)

        return anew
