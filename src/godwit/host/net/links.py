"""Whether a tap is wired: what is sent through it reaches the network.

A frame that leaves before the tap has carrier, or before its bridge's port forwards, is lost, and
nobody hears of it (virtual switches and spanning tree take seconds). So the announcement waits.
"""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import HostError
from godwit.host.loop import Loop

from . import rtnetlink
from .rtnetlink import FORWARDING, LinkEvents

_STATES = {0: "disabled", 1: "listening", 2: "learning", 4: "blocking"}


class Port:
    """A tap as the host's network sees it. All methods belong to the loop's thread, except
    :attr:`not_ready_reason`, which may be read from any."""

    def __init__(self, tap: str) -> None:
        self.tap = tap
        #: Why frames would be lost; None: they would not, as far as this host can tell.
        self.not_ready_reason: str | None = "it was not looked at yet"
        #: Index of the interface and of its bridge; 0 while there is none.
        self.index = self.bridge = 0
        #: What may be wrong, or meant so: frames leave. Read as :attr:`not_ready_reason` is.
        self.warning: str | None = None
        #: Called when it became ready, in the loop's thread.
        self.on_ready: Callable[[], None] = lambda: None

    def refresh(self) -> None:
        """Ask the kernel how it is."""
        before = self.not_ready_reason
        try:
            link = rtnetlink.link(self.tap)
        except OSError:
            self.not_ready_reason = None  # where nobody can be asked, nothing is held up
        else:
            bridge = link.master if link and link.port_state is not None else 0
            if bridge:
                self.warning = None
            elif self.bridge:
                self.warning = (
                    f"'{self.tap}' was in a bridge and is in none any more; if it should be: "
                    f"ip link set {self.tap} master BRIDGE"
                )
            self.index = link.number if link else 0
            self.bridge = bridge
            self.not_ready_reason = _not_ready_reason(self.tap, link)
        if before is not None and self.not_ready_reason is None:
            self.on_ready()


def _not_ready_reason(tap: str, link: rtnetlink.Link | None) -> str | None:
    if link is None:
        return f"there is no interface '{tap}'"
    if not link.carrier:
        return f"'{tap}' has no carrier; is it up? (ip link set {tap} up)"
    if link.port_state not in (None, FORWARDING):
        state = _STATES.get(link.port_state or 0, "not forwarding")
        return f"its bridge's port is {state}"
    return None


class Ports:
    """The taps of a VM. Raises HostError when the kernel does not tell of links."""

    def __init__(self, taps: list[str], loop: Loop) -> None:
        self.ports = [Port(tap) for tap in taps]
        self._loop = loop
        try:
            self._events = LinkEvents()
        except OSError as error:
            raise HostError(f"rtnetlink: {error}") from error
        # Subscribed first, looked second: no change is missed.
        loop.watch(self._events.sock.fileno(), self._changed)
        self.refresh()

    def refresh(self) -> None:
        """Ask anew how all of them are."""
        for port in self.ports:
            port.refresh()

    def close(self) -> None:
        """Give the socket back."""
        self._loop.unwatch(self._events.sock.fileno())
        self._events.close()

    def _changed(self) -> None:
        if self._events.changed():
            self.refresh()
