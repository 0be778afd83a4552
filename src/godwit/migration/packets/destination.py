"""Packet handover at the destination: the guest's traffic is switched over without loss.

Just before the guest runs, a marker frame, a broadcast, leaves in the guest's name on each of the
guest's networks. Switches send the guest's packets to this host from then on; these wait in the tap
while the packets from the old host come over the connection (:mod:`.source`) and go to the guest
first. A marker is no announcement: no host takes a marker for one, and the announcement that
follows is the same as ever.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from godwit.announce.uplink import Uplink
from godwit.errors import GodwitError, LinkLost, StreamError
from godwit.machine.machine import OnPhase
from godwit.migration.guest import Guest
from godwit.migration.times import TIMES, Times
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.stream import WaitingConnection
from godwit.spec import saved

#: Networks of a NIC that get a marker, the most important first.
MAX_MARKERS = 64
_SLICE_S = 0.05
#: Received at once, bytes.
_SOME = 1 << 18


class Hold:
    """The time for which taps wait, from the switchover on, by the migration's clock."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._switched_at: float | None = None
        self._received_at = 0.0

    def begin(self) -> None:
        """Start the hold, as the traffic is switched over."""
        self._received_at = self._times.now()  # first: readers that see the other see this too
        self._switched_at = self._received_at

    def received(self) -> None:
        """Note that packets of the old host came."""
        self._received_at = self._times.now()

    @property
    def settled(self) -> bool:
        """True once the announcement has waited long enough."""
        at = self._switched_at
        return at is not None and self._times.now() >= at + self._times.settle

    @property
    def over(self) -> bool:
        """True once the taps have waited long enough."""
        at = self._switched_at
        if at is None:
            return False
        times = self._times
        return times.now() >= min(self._received_at + times.hold, at + times.hold_longest)


class PacketDestination:
    """The destination's side of one guest's packet handover.

    :meth:`switch_over` is called by whoever starts the guest, all else by the migration's thread.
    ``cookie`` is the migration's secret, 16 bytes.
    """

    def __init__(
        self, guest: Guest, connection: WaitingConnection, cookie: bytes, times: Times = TIMES
    ) -> None:
        self._guest = guest
        self._connection: WaitingConnection | None = connection
        self._cookie = cookie
        self._times = times
        self._sending = threading.Lock()
        self._markers: list[list[bytes]] = []
        self._versions: list[int | None] = []  # of the address books with which they were built
        self._held: set[int] = set()
        self._hold = Hold(times)
        self._begun = False
        self._received = bytearray()  # of a message that is not whole yet
        #: True once the source knows that its guest is here.
        self.acknowledged = False
        self._counts = {"packets": 0, "late": 0, "refused": 0, "repeated": 0, "markers-sent": 0}

    @property
    def holding(self) -> bool:
        """True while a tap waits for the old host's packets."""
        return bool(self._held)

    def prepare(self) -> None:
        """Build the markers and hold the taps, as the guest is loaded and its commit awaited."""
        for index, nic in enumerate(self._guest.nics):
            nic.rx_backlog.hold()
            self._held.add(index)
        uplinks = self._guest.uplinks
        self._markers = [self._markers_of(index, uplink) for index, uplink in enumerate(uplinks)]
        # Afterwards: the first look takes over what the driver has set.
        self._versions = [uplink.observer.version for uplink in uplinks]

    def inject(self, payload: bytearray) -> None:
        """Give the guest the packets of a PACKETS message.

        Raises:
            StreamError: the message is malformed, or names no NIC.
        """
        packets = saved.decode(payload, messages.Packets)
        nic = self._guest.nics[self._known(packets.nic)]
        self._counts["packets" if packets.nic in self._held else "late"] += len(packets.frames)
        self._counts["refused"] += nic.rx_backlog.inject(packets.frames)
        self._hold.received()

    def switch_over(self, on_phase: OnPhase) -> bool:
        """Switch over the traffic of a guest that is about to run, under the machine's lock.

        Never fails: a network that got no marker learns by the announcement. Returns False if the
        traffic was switched over before.
        """
        if self._begun:
            return False
        self._begun = True
        # What was flooded here so far, the old host has too, and sends; and if the old host is
        # gone, it is older than the guest's start. All taps first: one NIC's marker may reach
        # another's.
        for nic in self._guest.nics:
            nic.rx_backlog.drain()
        for index, uplink in enumerate(self._guest.uplinks):
            if uplink.observer.version != self._versions[index]:  # another claims an address
                self._markers[index] = self._markers_of(index, uplink)
        sent = []
        for nic, markers in zip(self._guest.nics, self._markers, strict=True):
            count = 0
            for frame in markers:
                try:
                    nic.send_from_host(frame)
                except (GodwitError, OSError):
                    break
                count += 1
            sent.append(count)
        self._counts["markers-sent"] = sum(sent)
        self._hold.begin()
        try:
            self.send(Kind.SWITCHED, messages.Switched(sent))
        except LinkLost:
            pass  # the migration's thread will find out
        on_phase("switched-over")
        return True

    def settle(self) -> bool:
        """Wait, while the guest runs, for the old host's packets, and return whether all are here.

        Returns False once the guest shall announce itself without the rest. :meth:`listen` goes on
        with those.
        """
        while self._held and self._connection is not None:
            self._step()  # first: a start may have taken longer than this waits
            if self._held and self._hold.settled:
                return False
        return True

    def listen(self) -> None:
        """Receive the source's other messages until the connection is closed.

        A source that does not receive that its guest is here may be querying on another connection.
        """
        began = self._times.now()
        while self._connection is not None:
            self._step()
            longest = self._times.listen if self.acknowledged else self._times.silence
            if self._times.now() >= began + longest:
                break
        self.abandon()

    def abandon(self) -> None:
        """End the holds, as no more will come from the source."""
        self._connection = None
        for index in tuple(self._held):
            with suppress(Exception):  # the others' taps, too, are to be released
                self._release(index)

    def send(self, kind: Kind, value: Any) -> None:
        """Send a message to the source, from any thread.

        Raises:
            LinkLost: the connection broke, or is gone.
        """
        connection = self._connection
        if connection is None:
            raise LinkLost("the connection to the source is gone")
        with self._sending:
            connection.send(kind, value)

    def info(self) -> dict[str, int]:
        """Return the handover's share of the report.

        ``packets`` came over the connection, ``late`` ones after the tap's turn had come; of both,
        ``refused`` ones were not kept; ``repeated`` frames of the tap had come twice.
        """
        return dict(self._counts)

    # --- inside -----------------------------------------------------------------------------------
    def _markers_of(self, index: int, uplink: Uplink) -> list[bytes]:
        return uplink.layer2_updates(
            lambda number: self._cookie + index.to_bytes(2, "big") + number.to_bytes(2, "big"),
            MAX_MARKERS,
        )

    def _step(self) -> None:
        """Wait a little for the source's next message, and handle it."""
        connection = self._connection
        if connection is None:
            return
        try:
            # Never more than what is here: a message that does not end must not hold the taps.
            if connection.wait(_SLICE_S)[0]:
                self._received += connection.read_some(_SOME)
                while self._handle():
                    pass
            if self._hold.over:
                for index in tuple(self._held):
                    self._release(index)
        except Exception:  # whatever it is: the guest may run, and goes on without the packets
            self.abandon()

    def _handle(self) -> bool:
        """Handle the next whole message, and return whether there was one."""
        size = messages.HEADER.size
        if len(self._received) < size:
            return False
        kind, length = messages.parse_header(self._received[:size])
        if len(self._received) < size + length:
            return False
        payload = self._received[size : size + length]
        del self._received[: size + length]
        if kind is Kind.PACKETS:
            self.inject(payload)
        elif kind is Kind.PATH_DRAINED:
            self._release(self._known(saved.decode(payload, messages.PathDrained).nic))
        elif kind is Kind.ACK:
            self.acknowledged = True
        else:
            raise StreamError(f"message {kind.name} after the commit")
        return True

    def _known(self, index: int) -> int:
        if index >= len(self._guest.nics):
            raise StreamError(f"nic: there is no NIC {index}")
        return index

    def _release(self, index: int) -> None:
        if index in self._held:
            self._held.discard(index)
            self._counts["repeated"] += self._guest.nics[index].rx_backlog.release()
