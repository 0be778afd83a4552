"""What of a NIC's state seldom changes, and takes the kernel long to set up.

A source tells it before the guest stops, so that its destination has it in place by then. It is a
guess: the state that comes in the stop counts, and what differs from it is set anew.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_Queue = Annotated[int, msgspec.Meta(ge=0, lt=64)]


class Foresight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a model with MSI-X and notifications by eventfd; others have none."""

    #: Guest address of BAR 0; 0: not mapped.
    bar: Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
    #: Queues that are notified.
    queues: Annotated[list[_Queue], msgspec.Meta(max_length=64)]
    #: The MSI-X table.
    table: Annotated[bytes, msgspec.Meta(max_length=16 * 64)]
