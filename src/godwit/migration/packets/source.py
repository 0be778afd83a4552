"""The source's side of the handover: frames that still come for the guest are sent after it.

From the guest's stop on they wait in its tap's queue, and go on coming until the network has
learned where the guest is now. The destination draws them there with a marked broadcast on each of
the guest's networks (:mod:`.arrival`), which floods to this tap as well: what the tap gives before
the mark is the old road's, what came after it went the new road. So no timer decides when the old
road is empty, unless a mark does not come. docs/decisions/0013-handover.md has the argument.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from typing import Any

from godwit.announce.frames import read_note, stack_of
from godwit.announce.uplink import Station
from godwit.errors import GodwitError
from godwit.host.net.tap import HEADER
from godwit.hw.nic.nic import Nic
from godwit.hw.nic.rx_backlog import MAX_BYTES, MAX_FRAMES
from godwit.machine.machine import Machine
from godwit.migration.wire import messages as codec
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import Channel

#: How long a mark is waited for once the destination has sent it, s: it need not come (a port that
#: does not forward, a network that floods no broadcasts). While the guest's frames still come it
#: may just be late, as on a host whose CPUs are overloaded: so long after the last one, then.
MARKS_S = 0.25
#: But never longer than this, whatever comes, s.
LONGEST_S = 2.0
#: The marks leave together. When one is here and no other follows for so long, none will, s: the
#: network does not carry that VLAN.
QUIET_S = 0.05
#: A guest that is not started at once: so long its frames are sent after it, s.
PATIENCE_S = 30.0
#: How long a tap is looked at after its last mark, for what took a longer way, s.
LATE_S = 0.3
_BATCH = 32
#: Frames seldom come alone, and each message costs both ends as much as some ten frames, ms.
_GATHER_MS = 2


class Road:
    """From one NIC's tap here to the guest there. Times are of ``time.monotonic``."""

    def __init__(self, index: int, nic: Nic, macs: frozenset[bytes]) -> None:
        self.index = index
        self.nic = nic
        self.macs = macs
        #: What was sent, until it is known that the guest has it.
        self.kept: list[bytes] = []
        self.expected: int | None = None
        self.seen: set[int] = set()
        self.first_mark = self.last_mark = 0.0
        #: When a frame to one of the guest's addresses was here last.
        self.last_frame = 0.0
        #: Tags of the networks whose frames come to the new tap.
        self.redirected: set[bytes] = set()
        self.ended_at: float | None = None
        self.frames = self.late = self.bytes = self.left = 0

    def due(self, drawn_at: float | None) -> float | None:
        """When no further mark is waited for, if no further comes."""
        if drawn_at is None or self.expected is None:
            return None
        if len(self.seen) >= self.expected:
            return drawn_at
        longest = drawn_at + LONGEST_S
        if self.seen:
            longest = min(longest, max(drawn_at, self.first_mark) + MARKS_S)
            return min(longest, max(drawn_at, self.last_mark, self.last_frame) + QUIET_S)
        return min(longest, max(drawn_at, self.last_frame) + MARKS_S)

    def marked(self, number: int, tags: bytes, at: float) -> None:
        """A mark came, in the network of these tags."""
        self.seen.add(number)
        self.redirected.add(tags)
        self.first_mark = self.first_mark or at
        self.last_mark = at

    def times(self, drawn_at: float | None) -> dict[str, float]:
        """When what came, and when it ended, ms after the source heard of the draw."""
        if drawn_at is None:
            return {}
        at = {
            "last-frame": self.last_frame,
            "first-mark": self.first_mark,
            "last-mark": self.last_mark,
            "end": self.ended_at,
        }
        return {name: round((when - drawn_at) * 1000, 3) for name, when in at.items() if when}

    def is_theirs(self, frame: bytes) -> bool:
        """Whether the new tap has this frame as well, or it is none of the guest's."""
        if frame[HEADER + 6 : HEADER + 12] in self.macs:
            return True  # its own, from where it is now
        if frame[HEADER] & 1:
            if self.ended_at is not None:
                return True
            return stack_of(memoryview(frame)[HEADER:]) in self.redirected
        # Before the mark any frame may be the guest's (its filter knows); afterwards a frame for
        # others was flooded, and to the new tap too.
        return self.ended_at is not None and frame[HEADER : HEADER + 6] not in self.macs


class Forwarder:
    """Of one move; owned by its thread. The guest is stopped, and COMMIT about to be sent.

    ``mark`` is the move's secret that tells its marks from any other frame.
    """

    def __init__(self, machine: Machine, channel: Channel, mark: bytes) -> None:
        self._channel = channel
        self._mark = mark
        self._roads = {
            nic.tap_fd: Road(index, nic, _macs(station))
            for index, (nic, station) in enumerate(zip(machine.nics, machine.stations, strict=True))
        }
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._line = select.poll()
        self._line.register(channel.fileno(), select.POLLIN)
        for fd in self._roads:
            self._poll.register(fd, select.POLLIN)
        self._began = time.monotonic()
        self._drawn_at: float | None = None
        self._keep = True

    @property
    def expecting(self) -> bool:
        """Whether the traffic is drawn to the guest, and some of it still on its way to here."""
        roads = self._roads.values()
        return self._drawn_at is not None and any(road.ended_at is None for road in roads)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        now = time.monotonic()
        return all(
            road.ended_at is not None and now >= road.ended_at + LATE_S
            for road in self._roads.values()
        )

    def serve(self, until: float) -> bool:
        """Send frames after the guest until ``until`` (``time.monotonic``); True: there is
        something to read on the line, False: the time is up, or all is over.

        Raises:
            LinkLost: the line broke.
        """
        line = self._channel.fileno()
        while True:
            wait = min([until, *self._times()]) - time.monotonic()
            ready = {fd for fd, _ in self._poll.poll(max(0.0, wait) * 1000)}
            # What the destination says comes first: the guest stands still until it is heard.
            more = [self._take(self._roads[fd]) for fd in ready - {line} if line not in ready]
            self._end_roads()
            if line in ready:
                return True
            if time.monotonic() >= until or self.over:
                return False
            if more and not any(more):
                self._line.poll(_GATHER_MS)

    def drawn(self, marks: Sequence[int]) -> None:
        """The destination has drawn the traffic there, with so many marks for each NIC."""
        if self._drawn_at is not None:
            return
        self._drawn_at = time.monotonic()
        for road in self._roads.values():
            road.expected = marks[road.index] if road.index < len(marks) else 0

    def settled(self) -> None:
        """The guest is there for good: what was sent need not be given back."""
        self._keep = False
        for road in self._roads.values():
            road.kept.clear()

    def give_back(self) -> None:
        """The guest goes on here after all: it gets its frames before what the tap has."""
        for road in self._roads.values():
            road.nic.put_ahead(road.kept)
            road.kept = []

    def info(self) -> dict[str, Any]:
        """For the report."""
        roads = self._roads.values()
        return {
            "frames": sum(road.frames for road in roads),
            "bytes": sum(road.bytes for road in roads),
            "late": sum(road.late for road in roads),
            "left-behind": sum(road.left for road in roads),
            "marks-seen": sum(len(road.seen) for road in roads),
            "marks-sent": sum(road.expected or 0 for road in roads),
            "roads": [road.times(self._drawn_at) for road in roads],
        }

    # --- inside -----------------------------------------------------------------------------------
    def _times(self) -> list[float]:
        """When something is due."""
        now = time.monotonic()
        times = []
        for road in self._roads.values():
            if road.ended_at is not None:
                if now < road.ended_at + LATE_S:
                    times.append(road.ended_at + LATE_S)
            else:
                times.append(self._due(road))
        return times

    def _due(self, road: Road) -> float:
        """When it ends, if no further mark comes."""
        due = road.due(self._drawn_at)
        return self._began + PATIENCE_S if due is None else due

    def _end_roads(self) -> None:
        now = time.monotonic()
        for road in self._roads.values():
            if road.ended_at is None and now >= self._due(road):
                # What is here by now was on the old road, up to a queue's worth.
                for _ in range(MAX_FRAMES // _BATCH):
                    if not self._take(road):
                        break
                road.ended_at = now
                self._channel.send(Kind.ROAD_ENDS, codec.RoadEnds(road.index))

    def _take(self, road: Road) -> bool:
        """Send a batch of what the tap has; whether there may be more."""
        try:
            frames = road.nic.take(_BATCH)
        except GodwitError:
            frames = []
        # One by one: what a mark says counts for what comes after it.
        kept = [f for f in frames if not self._is_mark(road, f) and not road.is_theirs(f)]
        if kept:
            if any(frame[HEADER : HEADER + 6] in road.macs for frame in kept):
                road.last_frame = time.monotonic()
            self._send(road, kept)
        return len(frames) == _BATCH

    def _send(self, road: Road, frames: list[bytes]) -> None:
        if road.frames + road.late >= MAX_FRAMES or road.bytes >= MAX_BYTES:
            road.left += len(frames)  # the bound: they are lost; its marks are still looked for
            return
        if self._keep:
            road.kept += frames
        if road.ended_at is None:
            road.frames += len(frames)
        else:
            road.late += len(frames)
        road.bytes += sum(map(len, frames))
        self._channel.send(Kind.FRAMES, codec.Frames(road.index, frames))

    def _is_mark(self, road: Road, frame: bytes) -> bool:
        view = memoryview(frame)[HEADER:]
        note = read_note(view)
        if note is None or not note.startswith(self._mark):
            return False
        at = len(self._mark)
        nic, number = (int.from_bytes(note[at + n : at + n + 2], "big") for n in (0, 2))
        # Another NIC's says nothing about this one's frames: its tap may not be emptied yet.
        if nic == road.index:
            road.marked(number, stack_of(view), time.monotonic())
        return True


def _macs(station: Station) -> frozenset[bytes]:
    return frozenset([station.nic.mac, *(entry.mac for entry in station.entries())])
