"""The bytes that one client has not taken yet: replies, which are never lost, and events.

A client may read slowly, and a guest may cause events quickly. Only so many events wait for a
client: what comes beyond is left out, and counted in an event EVENTS_LOST before the next one of
the same kind. Each kind has some space of its own: a flood of one costs no event of another, and
never a reply.
"""

from __future__ import annotations

from collections import deque

from godwit.spec.events import Event

from . import protocol

#: The most bytes of events that wait for a client.
MAX_EVENTS = 1 << 20
#: The bytes of each kind of event that may wait beyond that.
RESERVED = 32 << 10


class Outbox:
    """The messages for one client, in order, until they are sent. It has no lock.

    Attributes:
        replies: the unsent bytes of replies, by which the caller bounds their number.
    """

    def __init__(self) -> None:
        self.replies = 0
        self._data = bytearray()
        self._sent = 0
        self._pushed = 0
        # (where its end is in all that was ever pushed, kind of event, bytes) of each message;
        # a reply is of no kind
        self._messages: deque[tuple[int, str, int]] = deque()
        self._waiting: dict[str, int] = {}
        self._all_waiting = 0
        self._lost: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the number of unsent bytes."""
        return len(self._data)

    @property
    def data(self) -> bytearray:
        """The unsent bytes in their order, of which :meth:`sent` drops some."""
        return self._data

    def reply(self, message: bytes) -> None:
        """Add a reply, whatever waits already."""
        self.replies += len(message)
        self._push("", message)

    def event(self, kind: str, message: bytes) -> None:
        """Add an event, or count one more loss where too many wait already."""
        waiting = self._waiting.get(kind, 0)
        space = max(MAX_EVENTS - self._all_waiting, RESERVED - waiting)
        # One is always taken, however long it is. After a loss all have to be gone first, so that
        # there are not as many gaps as events.
        if kind in self._lost or (waiting and len(message) > space):
            self._lost[kind] = self._lost.get(kind, 0) + 1
            return
        self._all_waiting += len(message)
        self._waiting[kind] = waiting + len(message)
        self._push(kind, message)

    def sent(self, count: int) -> None:
        """Drop sent bytes, and add the count of losses of each kind with space again."""
        del self._data[:count]
        self._sent += count
        while self._messages and self._messages[0][0] <= self._sent:
            _, kind, size = self._messages.popleft()
            if kind:
                self._waiting[kind] -= size
                self._all_waiting -= size
                if not self._waiting[kind] and kind in self._lost:
                    self._report_lost(kind, self._lost.pop(kind))
            else:
                self.replies -= size

    def _report_lost(self, kind: str, count: int) -> None:
        """Add the event of a loss, of which there is one at most for each kind of event."""
        name, data = Event.EVENTS_LOST.of(event=kind, count=count)
        self.event(name, protocol.event(name, data))

    def _push(self, kind: str, message: bytes) -> None:
        self._data += message
        self._pushed += len(message)
        self._messages.append((self._pushed, kind, len(message)))
