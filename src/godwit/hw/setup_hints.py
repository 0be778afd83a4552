"""Setup hints: parts of a device's state that seldom change, and take the kernel long to set up.

A source sends the hints before the guest stops, so that its destination has the set-up in place by
then. Hints are a guess: the state that comes in the downtime counts, and what differs from the
hints is set up anew.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.spec.saved import U64

_Queue = Annotated[int, msgspec.Meta(ge=0, lt=64)]


class SetupHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hints of a device with MSI-X and notifications by eventfd."""

    #: Guest address of BAR 0; 0: not mapped.
    bar: Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
    #: Queues that are notified.
    queues: Annotated[list[_Queue], msgspec.Meta(max_length=64)]
    #: The MSI-X table.
    table: Annotated[bytes, msgspec.Meta(max_length=16 * 64)]
    #: Feature bits that the guest uses.
    features: U64
