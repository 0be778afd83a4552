"""The destination's side of the handover: the guest's traffic is drawn here, and none of it lost.

Just before the guest runs, a marked broadcast leaves in its name on each of its networks. Switches
send its frames to this host from then on; they wait in the tap while those that went to the old
host come over the line (:mod:`.forwarder`), and the guest gets these first. It is no announcement:
no host takes it for one, and the announcement that follows is what it always was.
"""

from __future__ import annotations

import select
import threading
import time
from typing import Any

from godwit.announce.uplink import Station
from godwit.errors import GodwitError, LinkLost, StreamError
from godwit.machine.machine import Machine, Mark
from godwit.migration.wire import messages as codec
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.sockets import SILENCE, Channel

#: Networks of a NIC that are drawn, the most important first.
MAX_MARKS = 64
#: How long the tap waits for the old host's next frames, s: longer than the source waits for a mark
#: while none comes.
HOLD_S = 1.0
#: How long it waits in all, s from the draw on: longer than the source does.
LONGEST_S = 3.0
#: How long the announcement waits for them, s from the draw on. Where a mark is lost it is what
#: draws the traffic, and the tap's frames wait on behind the old host's.
SETTLE_S = 0.3
#: The source looks for late frames for less than this after its last word, s.
_LISTEN_S = 40.0
_SLICE_MS = 50
#: Read at once, bytes.
_SOME = 1 << 18


class Hold:
    """How long the taps wait, from the draw on. Times are of ``time.monotonic``."""

    def __init__(self) -> None:
        self._drawn_at: float | None = None
        self._heard_at = 0.0

    def begin(self, now: float) -> None:
        """The traffic is drawn."""
        self._heard_at = now  # first: who finds the other set, looks at this
        self._drawn_at = now

    def heard(self, now: float) -> None:
        """Frames of the old host's came."""
        self._heard_at = now

    def settled(self, now: float) -> bool:
        """Whether the announcement has waited long enough."""
        return self._drawn_at is not None and now >= self._drawn_at + SETTLE_S

    def over(self, now: float) -> bool:
        """Whether the taps have waited long enough."""
        drawn_at = self._drawn_at
        return drawn_at is not None and now >= min(self._heard_at + HOLD_S, drawn_at + LONGEST_S)


class Arrival:
    """Of one guest. :meth:`draw` is called by whoever starts it, the rest by the move's thread.

    ``mark`` is the move's secret, 16 bytes.
    """

    def __init__(self, machine: Machine, channel: Channel, mark: bytes) -> None:
        self._machine = machine
        self._channel: Channel | None = channel
        self._mark = mark
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._marks: list[list[bytes]] = []
        self._held: set[int] = set()
        self._hold = Hold()
        self._begun = False
        self._read = bytearray()  # of a frame that is not whole yet
        #: The source knows that its guest is here.
        self.heard = False
        self._counts = {"frames": 0, "late": 0, "refused": 0, "repeated": 0, "marks-sent": 0}

    @property
    def holding(self) -> bool:
        """Whether a tap waits for the old host's frames."""
        return bool(self._held)

    def prepare(self) -> None:
        """The guest is loaded, its commit awaited: have the marks ready, and the taps wait."""
        if self._channel is not None:
            self._poll.register(self._channel.fileno(), select.POLLIN)
        for index, nic in enumerate(self._machine.nics):
            nic.hold()
            self._held.add(index)
        self._marks = [
            self._marks_of(index, station) for index, station in enumerate(self._machine.stations)
        ]

    def keep(self, payload: bytearray) -> None:
        """Frames came over the line. Raises StreamError."""
        frames = codec.decode(payload, codec.Frames)
        nic = self._machine.nics[self._known(frames.nic)]
        self._counts["frames" if frames.nic in self._held else "late"] += len(frames.frames)
        self._counts["refused"] += nic.put_ahead(frames.frames)
        self._hold.heard(time.monotonic())

    def draw(self, mark: Mark) -> None:
        """The guest is about to run: draw its traffic here. Under the machine's lock.

        Never fails: a network that was not told is told by the announcement.
        """
        if self._begun:
            return
        self._begun = True
        if self._channel is not None:
            # What was flooded here so far, the old host has too, and sends. All taps first: one
            # NIC's mark may reach another's.
            for nic in self._machine.nics:
                nic.drain()
        sent = []
        for nic, marks in zip(self._machine.nics, self._marks, strict=True):
            count = 0
            for frame in marks:
                try:
                    nic.send_from_host(frame)
                except (GodwitError, OSError):
                    break
                count += 1
            sent.append(count)
        self._counts["marks-sent"] = sum(sent)
        self._hold.begin(time.monotonic())
        try:
            self.send(Kind.DRAWN, codec.Drawn(sent))
        except LinkLost:
            pass  # the move's thread will find out
        mark("drawn")

    def settle(self) -> bool:
        """The guest runs: until its old host's frames are all here, or it shall announce itself
        without; whether they are here. :meth:`listen` goes on with those that are not."""
        while self._held and self._channel is not None:
            self._step()  # first: a start may have taken longer than this waits
            if self._held and self._hold.settled(time.monotonic()):
                return False
        return True

    def listen(self) -> None:
        """Take what else the source has to say, until it hangs up; it was told that its guest is
        here. One that does not hear that may be asking on another line."""
        began = time.monotonic()
        while self._channel is not None:
            self._step()
            if time.monotonic() >= began + (_LISTEN_S if self.heard else SILENCE):
                break
        self.abandon()

    def abandon(self) -> None:
        """No more will come from the source: the taps' turn."""
        self._channel = None
        for index in tuple(self._held):
            self._release(index)

    def send(self, kind: Kind, value: Any) -> None:
        """Say something to the source, from any thread. Raises LinkLost."""
        channel = self._channel
        if channel is None:
            raise LinkLost("the line to the source is gone")
        with self._sending:
            channel.send(kind, value)

    def info(self) -> dict[str, int]:
        """For the report: frames that came over the line (late: after the tap's turn had come),
        those of them that were refused, frames of the tap's that had come twice."""
        return dict(self._counts)

    # --- inside -----------------------------------------------------------------------------------
    def _marks_of(self, index: int, station: Station) -> list[bytes]:
        return station.layer2_updates(
            lambda number: self._mark + index.to_bytes(2, "big") + number.to_bytes(2, "big"),
            MAX_MARKS,
        )

    def _step(self) -> None:
        """Wait a little for the source's next word, and heed it."""
        channel = self._channel
        if channel is None:
            return
        try:
            # Never more than what is there: a frame that does not end must not hold the taps.
            if self._poll.poll(_SLICE_MS):
                self._read += channel.read_some(_SOME)
                while self._heed():
                    pass
        except (GodwitError, OSError, ValueError):
            self.abandon()
            return
        if self._hold.over(time.monotonic()):
            for index in tuple(self._held):
                self._release(index)

    def _heed(self) -> bool:
        """Take the next whole frame that was read; whether there was one."""
        size = codec.HEADER.size
        if len(self._read) < size:
            return False
        kind, length = codec.parse_header(self._read[:size])
        if len(self._read) < size + length:
            return False
        payload = self._read[size : size + length]
        del self._read[: size + length]
        if kind is Kind.FRAMES:
            self.keep(payload)
        elif kind is Kind.ROAD_ENDS:
            self._release(self._known(codec.decode(payload, codec.RoadEnds).nic))
        elif kind is Kind.HEARD:
            self.heard = True
        else:
            raise StreamError(f"frame {kind.name} after the commit")
        return True

    def _known(self, index: int) -> int:
        if index >= len(self._machine.nics):
            raise StreamError(f"nic: there is no NIC {index}")
        return index

    def _release(self, index: int) -> None:
        if index in self._held:
            self._held.discard(index)
            self._counts["repeated"] += self._machine.nics[index].release()
