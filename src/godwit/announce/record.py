"""What became of one NIC's announcement: query-announce shows it."""

from __future__ import annotations

import msgspec


class NicRecord(msgspec.Struct):
    """What became of one NIC since its last announcement began. Times are the clock's, seconds.

    Attributes:
        nic: the NIC's name.
        id: the announcement: ``migration``, ``returned``, or what announce-self was given.
        began_at: when it began.
        mac: the address announced last, ``52:54:00:...``.
        method: who announced last: ``guest`` or ``host``; None before the first round.
        rounds: rounds made for this NIC.
        asked: how often the guest was asked and accepted.
        asked_at: when it was first asked.
        acked_at: when it first acknowledged.
        acks: how often it did.
        timeouts: how often it did not, in time.
        host_sent: frames that the host sent.
        host_sent_at: when it sent the first.
        held: why the announcement waits for its port; None: it does not.
        ready_at: when a port that was waited for became ready.
        verified_at: when the network was found to know.
        unverified: what was not found to be known.
        error: the cause of the last failure.
    """

    nic: str
    id: str = ""
    began_at: float = 0.0
    mac: str = ""
    method: str | None = None
    rounds: int = 0
    asked: int = 0
    asked_at: float | None = None
    acked_at: float | None = None
    acks: int = 0
    timeouts: int = 0
    host_sent: int = 0
    host_sent_at: float | None = None
    held: str | None = None
    ready_at: float | None = None
    verified_at: float | None = None
    unverified: list[str] = []
    error: str | None = None

    @property
    def ack_ms(self) -> float | None:
        """From the first request to the first ack, ms; None while there is no ack."""
        if self.asked_at is None or self.acked_at is None:
            return None
        return (self.acked_at - self.asked_at) * 1000

    def since(self, at: float | None) -> float | None:
        """From the beginning to ``at``, ms."""
        return None if at is None else round((at - self.began_at) * 1000, 3)
