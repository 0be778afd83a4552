"""The log of pages that a back end writes: two bitmaps in files, of which one is in use."""

from __future__ import annotations

import mmap
import os

from godwit.host.memory import sealed_memfd
from godwit.host.vhost import LOG_PAGE


class Log:
    """Two bitmaps for all pages below ``end``, one bit a page, to be swapped and read in turn.

    Made with the device: in the sandbox no files are made. What nobody writes takes no memory.

    Attributes:
        size: bytes of a bitmap.
        on: what the back end writes is logged.
    """

    def __init__(self, end: int) -> None:
        self.on = False
        self.size = -(-(end // LOG_PAGE) // 64) * 8
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        try:
            for _ in range(2):
                # Sealed: whoever has the file could cut it, and a read here would be the end.
                self._fds.append(sealed_memfd("godwit-dirty-log", self.size))
                self._maps.append(mmap.mmap(self._fds[-1], self.size))
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The file of the bitmap in use."""
        return self._fds[0]

    def swap(self) -> None:
        """Switch to the other bitmap for what is written from now on."""
        self._fds.reverse()
        self._maps.reverse()

    def take_idle(self) -> bytes:
        """Return the bitmap not in use, and clear the bits."""
        return self._take(1)

    def take_both(self) -> bytes:
        """Return both bitmaps in one, and clear them, once nobody writes."""
        both = (int.from_bytes(self._take(index), "little") for index in (0, 1))
        return (next(both) | next(both)).to_bytes(self.size, "little")

    def _take(self, index: int) -> bytes:
        taken = self._maps[index][:]
        if taken.count(0) != len(taken):
            self._maps[index][:] = bytes(self.size)
        return taken

    def close(self) -> None:
        """Give the bitmaps' memory back."""
        while self._maps:
            self._maps.pop().close()
        while self._fds:
            os.close(self._fds.pop())
