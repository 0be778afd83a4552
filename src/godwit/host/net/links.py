"""Links of taps: carrier and bridge port, without which frames do not reach the network.

A frame that leaves before the tap has carrier, or before its bridge's port forwards, is lost
without an error (virtual switches and spanning tree take seconds). So the announcement waits.
"""

from __future__ import annotations

from collections.abc import Callable

from godwit.errors import HostError
from godwit.host.loop import Loop

from . import rtnetlink
from .rtnetlink import FORWARDING, LinkEvents

_STATES = {0: "disabled", 1: "listening", 2: "learning", 4: "blocking"}


class Port:
    """A tap as the host's network sees the tap: the tap's own link, and its port of a bridge.

    All methods belong to the loop's thread. :attr:`not_ready_reason` and :attr:`warning` may
    be read from any. The interface that the tap has when the port is first read is the guest's: if
    another one has that name later, the guest is not attached there.
    """

    def __init__(self, tap: str) -> None:
        self.tap = tap
        #: Why frames would be lost; None: frames reach the network, as far as this host knows.
        self.not_ready_reason: str | None = f"the link of '{tap}' was not read yet"
        #: Index of the interface, and of its bridge; 0: none.
        self.index = self.bridge = 0
        #: What may be wrong, or meant so, while frames leave; None: nothing.
        self.warning: str | None = None
        #: Called in the loop's thread when the port became ready.
        self.on_ready: Callable[[], None] = lambda: None
        #: Called in the loop's thread at each look while the guest's interface has not its name.
        self.on_gone: Callable[[], None] = lambda: None
        #: Called in the loop's thread when another interface has the name.
        self.on_anew: Callable[[], None] = lambda: None
        self._own = 0  # index of the guest's interface
        self._anew = 0  # index of the last other one

    def refresh(self) -> None:
        """Read the link's state from the kernel again."""
        before = self.not_ready_reason
        try:
            link = rtnetlink.link(self.tap)
        except OSError:
            self.not_ready_reason = None  # where the kernel cannot be asked, nothing is held up
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
            self._own = self._own or self.index
            self.not_ready_reason = _not_ready_reason(self.tap, link)
            if link is not None and self.index != self._own:
                self.not_ready_reason = (
                    f"'{self.tap}' is another interface than the one that the guest's NIC has"
                )
            self._notice()
        if before is not None and self.not_ready_reason is None:
            self.on_ready()

    def _notice(self) -> None:
        """Report the guest's interface gone, and each other of the same name, once."""
        gone = self._own != 0 and self.index != self._own
        if gone:  # each time: it may have been renamed first, and deleted then
            self.on_gone()
        if gone and self.index and self.index != self._anew:
            self._anew = self.index
            self.on_anew()


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
    """The ports of a VM's taps, each refreshed when any link changes.

    Raises:
        HostError: the kernel does not report changes of links.
    """

    def __init__(self, taps: list[str], loop: Loop) -> None:
        self.ports = [Port(tap) for tap in taps]
        self._loop = loop
        try:
            self._events = LinkEvents()
        except OSError as error:
            raise HostError(f"rtnetlink: {error}") from error
        # Subscribed first, read second: no change is missed.
        loop.watch(self._events.sock.fileno(), self._changed)
        self.refresh()

    def refresh(self) -> None:
        """Read the state of each tap's link from the kernel again."""
        for port in self.ports:
            port.refresh()

    def close(self) -> None:
        """Stop watching links and close the socket."""
        self._loop.unwatch(self._events.sock.fileno())
        self._events.close()

    def _changed(self) -> None:
        if self._events.changed():
            self.refresh()
