"""A machine's saved state, which follows RAM in a migration stream."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.host.kvm.cpustate import PlatformState, VcpuState
from godwit.hw.devices import DeviceState

#: Version of :class:`MachineState` itself; each device has its own.
VERSION = 1


class MachineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of everything but RAM.

    Attributes:
        vcpus: the vCPUs, in order.
        platform: what KVM keeps beside the vCPUs.
        devices: each device's state by id, kind and version, to be decoded by the kind's own type.
        sections: by name, what a guest takes along that is no device's (the address book).
    """

    vcpus: Annotated[list[VcpuState], msgspec.Meta(min_length=1, max_length=64)]
    platform: PlatformState
    devices: Annotated[list[DeviceState], msgspec.Meta(max_length=256)]
    sections: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=64)], msgspec.Raw], msgspec.Meta(max_length=16)
    ]
    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)] = VERSION
