"""The timing of announcements: when rounds are due, and how quickly frames may follow each other.

Broadcasts, ARP and neighbour advertisements go through a switch's control plane, which takes some
hundreds to some thousands of frames a second and drops the rest, other hosts' ARP among them. So a
VM announces its first addresses at once and the rest at a limited rate. docs/announcement.md has
the sums.
"""

from __future__ import annotations

from collections.abc import Iterator

from godwit.spec.parameters import AnnounceParameters

#: What may go at once, as the time that the frames would take at the rate, seconds.
BURST_S = 0.1


def round_delays(parameters: AnnounceParameters) -> Iterator[float]:
    """Yield, for each round in turn, the seconds from the round before.

    The first is 0: that round is made at the instant of the resume. The others are those of QEMU's
    net/announce.c, qemu_announce_timer_step: each ``step`` longer than the last, up to ``max``.
    """
    for number in range(parameters.rounds):
        if number == 0:
            yield 0.0
        else:
            delay = parameters.initial + (number - 1) * parameters.step
            yield min(delay, parameters.max) / 1000


class Pacer:
    """A token bucket in virtual time, without clock or lock."""

    def __init__(self) -> None:
        self._free_at = float("-inf")  # when all that was reserved is on the wire, at the rate

    def take(self, frames: int, rate: int, now: float, first: bool = True) -> float:
        """Reserve a round's frames and return 0, or return the seconds after which to ask again.

        ``rate`` is in frames a second; 0: no limit. A round that waits holds no place, so a round
        that is cancelled costs nobody. A round that is not the ``first`` of its NIC leaves half of
        a burst to first rounds.
        """
        if not rate:
            return 0.0
        start = max(self._free_at, now - BURST_S)
        limit = now if first else now - BURST_S / 2
        if start > limit:
            return start - limit
        self._free_at = start + frames / rate
        return 0.0
