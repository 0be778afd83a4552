"""How quickly announcements may follow each other, so that switches keep up.

Broadcasts, ARP and neighbour advertisements go through a switch's control plane, which takes some
hundreds to some thousands of them a second and drops the rest, other hosts' ARP among them. So a VM
announces its first addresses at once and the rest at a limited rate. docs/announcement.md has the
sums.
"""

from __future__ import annotations

#: What may go at once, as the time that it would take at the rate, s.
BURST_S = 0.1


class Pacer:
    """A token bucket in virtual time: it says how long to wait. Pure; not thread-safe."""

    def __init__(self) -> None:
        self._free_at = float("-inf")  # when all that was reserved is on the wire, at the rate

    def take(self, frames: int, rate: int, now: float, first: bool = True) -> float:
        """Send so many frames now, at ``rate`` a second (0: no limit), and get 0; or wait for so
        many seconds and ask again. Who waits holds no place: what is cancelled costs nobody.

        What is not the ``first`` of its NIC leaves half of a burst to those that are.
        """
        if not rate:
            return 0.0
        start = max(self._free_at, now - BURST_S)
        limit = now if first else now - BURST_S / 2
        if start > limit:
            return start - limit
        self._free_at = start + frames / rate
        return 0.0
