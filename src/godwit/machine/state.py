"""A machine's saved state: what follows RAM in a migration stream."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.announce.saved import AddressBookState
from godwit.host.kvm.cpustate import PlatformState, VcpuState
from godwit.hw.nic.models import NicState
from godwit.hw.power import PowerState
from godwit.hw.serial import SerialState


class NicSaved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One NIC."""

    id: Annotated[str, msgspec.Meta(max_length=64)]
    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    state: NicState
    addresses: AddressBookState


class MachineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything but RAM."""

    vcpus: Annotated[list[VcpuState], msgspec.Meta(min_length=1, max_length=64)]
    platform: PlatformState
    serial: SerialState
    power: PowerState
    pci_address: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    nics: Annotated[list[NicSaved], msgspec.Meta(max_length=64)]
    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
