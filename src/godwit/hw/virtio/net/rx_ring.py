"""Placement of a frame in a virtio-net receive queue (virtio 1.2, 5.1.6.4) in Python."""

from __future__ import annotations

import os

from godwit.errors import GuestError
from godwit.hw.virtio.chain import Chain
from godwit.hw.virtio.queue import Virtqueue

from .backend import Ring

#: The pieces that one frame may take, as writev's. Linux gives a frame of 64 KB some forty.
_MAX_PIECES = 1024


def place(queue: Virtqueue, frame: bytes, merge: bool) -> bool:
    """Put one frame, header included, into the buffers, or return False if there are too few.

    ``merge``: VIRTIO_NET_F_MRG_RXBUF was negotiated. A frame that never fits is dropped: longer
    than a buffer, if buffers are not merged, or than all that the ring can hold at once, or than
    1,024 pieces of buffers.

    Raises:
        GuestError: a buffer without space, or another broken rule.
    """
    chains: list[tuple[Chain, int]] = []
    left = memoryview(frame)
    pieces = 0
    while left or not chains:
        # The driver may add buffers meanwhile: what is used for one frame is counted here.
        never = bool(chains) and (not merge or len(chains) == queue.size or pieces > _MAX_PIECES)
        chain = None if never else queue.pop()
        if chain is None:
            for given_back in reversed(chains):
                queue.unpop(*given_back)
            return never
        pieces += chain.pieces
        taken = 0
        for part in chain.writable:
            size = min(len(part), len(left))
            part[:size] = left[:size]
            taken += size
            left = left[size:]
        if taken == 0:
            raise GuestError("a receive buffer without space")
        chains.append((chain, taken))
    first = chains[0][0].writable
    _put_u16(first, 10, len(chains))  # num_buffers (5.1.6.3)
    for chain, taken in chains:
        queue.push(chain, taken)
    return True


def notify(ring: Ring) -> None:
    """Interrupt the guest, if the driver wants an interrupt for what was used."""
    if ring.queue.should_notify() and ring.call >= 0:
        os.eventfd_write(ring.call, 1)


def _put_u16(parts: list[memoryview], offset: int, value: int) -> None:
    """Store a u16 at ``offset`` of scattered parts."""
    for byte in value.to_bytes(2, "little"):
        at = offset
        for part in parts:
            if at < len(part):
                part[at] = byte
                break
            at -= len(part)
        else:
            raise GuestError("a receive buffer shorter than the packet header")
        offset += 1
