"""Packet handover at the source: packets that still come for the guest are sent after the guest.

From the guest's stop on, packets wait in its tap's queue, and go on coming until the network has
learned where the guest is now. The destination switches the traffic over with a marker frame on
each of the guest's networks (:mod:`.destination`), a broadcast that floods to this tap as well:
what the tap gives before the marker came by the old path, what came after it took the new path. So
no timer decides when the old path is drained, unless a marker does not come.
docs/decisions/0013-handover.md has the argument; 802.1AX's Marker protocol is the same idea.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from godwit.announce.frames import read_cookie, stack_of
from godwit.announce.uplink import Uplink
from godwit.errors import GodwitError
from godwit.host.net.tap import HEADER
from godwit.hw.nic.nic import Nic
from godwit.hw.nic.rx_backlog import MAX_BYTES, MAX_FRAMES
from godwit.migration.guest import Guest
from godwit.migration.times import TIMES, Times
from godwit.migration.wire import messages
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.stream import WaitingConnection

_CHUNK = 32
#: Packets seldom come alone, and each message costs both ends as much as some ten packets, seconds.
_GATHER_S = 0.002


class OldPath:
    """The path from one NIC's tap here to the guest there."""

    def __init__(self, index: int, nic: Nic, macs: frozenset[bytes], times: Times) -> None:
        self.index = index
        self.nic = nic
        self.macs = macs
        self._times = times
        #: The packets that were sent, until it is known that the guest has them.
        self.kept: list[bytes] = []
        #: How many markers the destination has sent; None until SWITCHED.
        self.expected: int | None = None
        #: The numbers of the markers that came.
        self.seen: set[int] = set()
        self.first_marker = self.last_marker = 0.0
        #: When a packet to one of the guest's addresses was here last.
        self.last_packet = 0.0
        #: Tags of the networks whose packets come to the new tap.
        self.redirected: set[bytes] = set()
        self.drained_at: float | None = None
        self.packets = self.late = self.bytes = self.left_behind = 0

    def due(self, switched_at: float | None) -> float | None:
        """Return when no further marker is waited for, if no further comes."""
        times = self._times
        if switched_at is None or self.expected is None:
            return None
        if len(self.seen) >= self.expected:
            return switched_at
        longest = switched_at + times.old_path
        if self.seen:
            longest = min(longest, max(switched_at, self.first_marker) + times.marker)
            last = max(switched_at, self.last_marker, self.last_packet)
            return min(longest, last + times.quiet)
        return min(longest, max(switched_at, self.last_packet) + times.marker)

    def note_marker(self, number: int, tags: bytes, at: float) -> None:
        """Note a marker that came in the network of these tags."""
        self.seen.add(number)
        self.redirected.add(tags)
        self.first_marker = self.first_marker or at
        self.last_marker = at

    def report(self, switched_at: float | None) -> dict[str, float]:
        """Return when each event of the path came, ms after SWITCHED."""
        if switched_at is None:
            return {}
        at = {
            "last-packet": self.last_packet,
            "first-marker": self.first_marker,
            "last-marker": self.last_marker,
            "drained": self.drained_at,
        }
        return {name: round((when - switched_at) * 1000, 3) for name, when in at.items() if when}

    def is_superfluous(self, frame: bytes) -> bool:
        """Return whether the new tap has this frame too, or the frame is none of the guest's."""
        if frame[HEADER + 6 : HEADER + 12] in self.macs:
            return True  # its own, from where it is now
        if frame[HEADER] & 1:
            if self.drained_at is not None:
                return True
            return stack_of(memoryview(frame)[HEADER:]) in self.redirected
        # Before the marker any frame may be the guest's (its filter knows); afterwards a frame for
        # others was flooded, and to the new tap too.
        return self.drained_at is not None and frame[HEADER : HEADER + 6] not in self.macs


class PacketSource:
    """The source's side of one migration's packet handover, owned by the migration's thread.

    The guest is stopped, and COMMIT about to be sent. ``cookie`` is the migration's secret that
    distinguishes its markers from any other frame.
    """

    def __init__(
        self, guest: Guest, connection: WaitingConnection, cookie: bytes, times: Times = TIMES
    ) -> None:
        self._connection = connection
        self._cookie = cookie
        self._times = times
        self._paths = {
            nic.tap_fd: OldPath(index, nic, _macs(uplink), times)
            for index, (nic, uplink) in enumerate(zip(guest.nics, guest.uplinks, strict=True))
        }
        self._began = times.now()
        self._switched_at: float | None = None
        self._keep = True

    @property
    def expecting(self) -> bool:
        """True while the traffic is switched over, and packets are still on the old path."""
        paths = self._paths.values()
        return self._switched_at is not None and any(path.drained_at is None for path in paths)

    @property
    def over(self) -> bool:
        """True once nothing more will come."""
        now = self._times.now()
        return all(
            path.drained_at is not None and now >= path.drained_at + self._times.late
            for path in self._paths.values()
        )

    def serve(self, until: float) -> bool:
        """Send packets after the guest until ``until``, by the migration's clock.

        Returns True as soon as the destination has sent something; False when the time is up, or
        all is over.

        Raises:
            LinkLost: the connection broke.
        """
        while True:
            wait = min([until, *self._due_times()]) - self._times.now()
            # A tap that is gone is readable for ever, and has nothing to read.
            fds = [fd for fd, path in self._paths.items() if not path.nic.rx_backlog.lost]
            received, taps = self._connection.wait(wait, fds)
            # The destination's message comes first: the guest stands still until it is handled.
            more = [self._take(self._paths[fd]) for fd in taps if not received]
            self._end_paths()
            if received:
                return True
            if self._times.now() >= until or self.over:
                return False
            if more and not any(more):
                self._connection.wait(_GATHER_S)

    def switched(self, markers: Sequence[int]) -> None:
        """Note that the traffic is switched over, with the number of markers for each NIC."""
        if self._switched_at is not None:
            return
        self._switched_at = self._times.now()
        for path in self._paths.values():
            path.expected = markers[path.index] if path.index < len(markers) else 0

    def settled(self) -> None:
        """Forget the sent packets: the guest is there for good, none need be requeued."""
        self._keep = False
        for path in self._paths.values():
            path.kept.clear()

    def requeue(self) -> None:
        """Give the guest, which goes on here after all, its packets before the tap's."""
        for path in self._paths.values():
            path.nic.rx_backlog.inject(path.kept)
            path.kept = []

    def info(self) -> dict[str, Any]:
        """Return the handover's share of the report."""
        paths = self._paths.values()
        return {
            "packets": sum(path.packets for path in paths),
            "bytes": sum(path.bytes for path in paths),
            "late": sum(path.late for path in paths),
            "left-behind": sum(path.left_behind for path in paths),
            "markers-seen": sum(len(path.seen) for path in paths),
            "markers-sent": sum(path.expected or 0 for path in paths),
            "old-paths": [path.report(self._switched_at) for path in paths],
        }

    # --- inside -----------------------------------------------------------------------------------
    def _due_times(self) -> list[float]:
        """Return the times at which something is due."""
        now = self._times.now()
        times = []
        for path in self._paths.values():
            if path.drained_at is not None:
                if now < path.drained_at + self._times.late:
                    times.append(path.drained_at + self._times.late)
            else:
                times.append(self._due(path))
        return times

    def _due(self, path: OldPath) -> float:
        """Return when a path is taken for drained, if no further marker comes."""
        if path.nic.rx_backlog.lost and self._switched_at is not None:
            return self._switched_at
        due = path.due(self._switched_at)
        return self._began + self._times.start if due is None else due

    def _end_paths(self) -> None:
        now = self._times.now()
        for path in self._paths.values():
            if path.drained_at is None and now >= self._due(path):
                # What is here by now was on the old path, up to a queue's worth.
                for _ in range(MAX_FRAMES // _CHUNK):
                    if not self._take(path):
                        break
                path.drained_at = now
                self._connection.send(Kind.PATH_DRAINED, messages.PathDrained(path.index))

    def _take(self, path: OldPath) -> bool:
        """Send a chunk of the tap's packets, and return whether there may be more."""
        try:
            frames = path.nic.rx_backlog.take(_CHUNK)
        except GodwitError:
            frames = []
        # One by one: a marker counts for what comes after it.
        kept = [f for f in frames if not self._is_marker(path, f) and not path.is_superfluous(f)]
        if kept:
            if any(frame[HEADER : HEADER + 6] in path.macs for frame in kept):
                path.last_packet = self._times.now()
            self._send(path, kept)
        return len(frames) == _CHUNK

    def _send(self, path: OldPath, frames: list[bytes]) -> None:
        if path.packets + path.late >= MAX_FRAMES or path.bytes >= MAX_BYTES:
            path.left_behind += len(
                frames
            )  # the bound: they are lost; markers are still looked for
            return
        if self._keep:
            path.kept += frames
        if path.drained_at is None:
            path.packets += len(frames)
        else:
            path.late += len(frames)
        path.bytes += sum(map(len, frames))
        self._connection.send(Kind.PACKETS, messages.Packets(path.index, frames))

    def _is_marker(self, path: OldPath, frame: bytes) -> bool:
        view = memoryview(frame)[HEADER:]
        cookie = read_cookie(view)
        if cookie is None or not cookie.startswith(self._cookie):
            return False
        at = len(self._cookie)
        nic, number = (int.from_bytes(cookie[at + n : at + n + 2], "big") for n in (0, 2))
        # Another NIC's is no marker of this one's packets: its tap may not be emptied yet.
        if nic == path.index:
            path.note_marker(number, stack_of(view), self._times.now())
        return True


def _macs(uplink: Uplink) -> frozenset[bytes]:
    return uplink.macs()
