"""The record of one NIC's announcement, as query-announce shows the record."""

from __future__ import annotations

import msgspec


class NicRecord(msgspec.Struct):
    """A record of what became of one NIC since its last announcement began.

    Times are the clock's, in seconds; None: not yet.

    Attributes:
        nic: the NIC's name.
        id: the announcement: ``migration``, ``returned``, or what announce-self was given.
        began_at: when the announcement began.
        mac: the address announced last, ``52:54:00:...``.
        method: who announced last: ``guest`` or ``host``; None before the first round.
        rounds: rounds made for this NIC.
        asked: attempts: how often the guest was asked and the model accepted.
        asked_at: when the guest was first asked.
        acked_at: when the guest first acknowledged.
        acks: how often the guest acknowledged.
        timeouts: how often the guest did not acknowledge in time.
        host_sent: frames the host sent.
        host_sent_at: when the host sent the first frame.
        rarp_sent: RARPs of the NIC's MAC address the host sent beside the guest's announcement.
        reports_sent: multicast memberships the host reported.
        questions: frames in which the host asked the network in the guest's name.
        answers: how many of the peers asked answered.
        proved_at: when the last network was shown to pass the guest's frames; None: not all were.
        unproved: the networks that were not, in words.
        given_up: whether the wait for answers is over.
        held: why the announcement waits for the port; None: it does not wait.
        ready_at: when a port that was waited for became ready.
        verified_at: when the network was found to know where the guest is.
        unverified: what the network was not found to know.
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
    rarp_sent: int = 0
    reports_sent: int = 0
    questions: int = 0
    answers: int = 0
    proved_at: float | None = None
    unproved: list[str] = []
    given_up: bool = False
    held: str | None = None
    ready_at: float | None = None
    verified_at: float | None = None
    unverified: list[str] = []
    error: str | None = None

    @property
    def beside(self) -> int:
        """Return the number of frames the host sent beside the announcements of addresses."""
        return self.rarp_sent + self.reports_sent + self.questions

    @property
    def proof(self) -> str | None:
        """The state of the wait for answers: ``answered``, ``awaited`` or ``none came``."""
        if not self.rounds:
            return None
        if self.proved_at is not None:
            return "answered"
        return "none came" if self.given_up else "awaited"

    @property
    def ack_ms(self) -> float | None:
        """The milliseconds from the first attempt to the first ack, if there was an ack."""
        if self.asked_at is None or self.acked_at is None:
            return None
        return (self.acked_at - self.asked_at) * 1000

    def ms_until(self, at: float | None) -> float | None:
        """Return the milliseconds from the announcement's beginning until ``at``, if any."""
        return None if at is None else round((at - self.began_at) * 1000, 3)
