"""The saved state of the PCI transport."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.hw.irq import MsixState
from godwit.hw.pci import PciState
from godwit.spec.saved import U64

from .cfg_access import CfgAccess
from .common import CommonState
from .queue import QueueState


class TransportState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The transport's share of a virtio device's saved state."""

    pci: PciState
    msix: MsixState
    common: CommonState
    negotiated: U64
    isr: Annotated[int, msgspec.Meta(ge=0, le=3)]
    #: The configuration access capability: a driver may stand between setting and using it.
    cfg_access: Annotated[bytes, msgspec.Meta(min_length=CfgAccess.SIZE, max_length=CfgAccess.SIZE)]
    queues: Annotated[list[QueueState], msgspec.Meta(max_length=64)]
