"""The work that one turn of the event loop does for a queue, whatever the driver puts there."""

from __future__ import annotations

from .chain import Chain

#: Buffers, bytes and pieces of one turn. A full frame of TCP segments is 64 KB in some twenty
#: pieces: a turn takes eight of them, and a driver that cuts a frame into bytes gets two thousand.
CHAINS, BYTES, PIECES = 64, 512 << 10, 2048


class Budget:
    """The buffers still to be served in this turn, by number, bytes and pieces.

    The last buffer may overdraw the budget: one of the longest is served in a turn of its own.
    """

    def __init__(self, chains: int = CHAINS, size: int = BYTES, pieces: int = PIECES) -> None:
        self._chains, self._bytes, self._pieces = chains, size, pieces

    @property
    def left(self) -> bool:
        """True while another buffer may be served."""
        return self._chains > 0 and self._bytes > 0 and self._pieces > 0

    def spend(self, chain: Chain) -> None:
        """Take the cost of a buffer from the budget."""
        self._chains -= 1
        self._bytes -= chain.size()
        self._pieces -= chain.pieces
