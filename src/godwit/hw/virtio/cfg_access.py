"""The configuration access capability: the BAR, reached through configuration space (4.1.4.9)."""

from __future__ import annotations

from struct import unpack_from
from typing import ClassVar


class CfgAccess:
    """The struct virtio_pci_cfg_cap at ``at`` of a configuration space."""

    SIZE: ClassVar[int] = 20
    #: What a driver may write, from cap_len on: bar, offset, length, data.
    MASK: ClassVar[bytes] = b"\0\0\xff\0\0\0" + b"\xff" * 12

    def __init__(self, config: bytearray, at: int, bar_size: int) -> None:
        self._config = config
        self._at = at
        self._bar_size = bar_size

    @property
    def data(self) -> int:
        """The offset of the register whose access is an access of the BAR."""
        return self._at + 16

    def target(self) -> tuple[int, int]:
        """Return offset in the BAR and length, or length 0 where the driver broke the rules."""
        bar = self._config[self._at + 4]
        at, length = unpack_from("<II", self._config, self._at + 8)
        if bar or length not in (1, 2, 4) or at % length or at + length > self._bar_size:
            return 0, 0
        return at, length

    def save(self) -> bytes:
        """Return the whole capability, as a driver may stand between setting and using it."""
        return bytes(self._config[self._at : self._at + self.SIZE])

    def load(self, saved: bytes) -> None:
        """Take over the fields a driver may write."""
        for index, (byte, mask) in enumerate(zip(saved[2:], self.MASK, strict=True), self._at + 2):
            self._config[index] = self._config[index] & ~mask | byte & mask
