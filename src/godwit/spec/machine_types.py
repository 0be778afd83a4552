"""Versioned machines, so that nothing a guest sees changes under its feet.

A stream of one type loads only in the same type. An older type switches off what came later.
"""

from __future__ import annotations

from typing import NamedTuple

from godwit.errors import ConfigError


class MachineType(NamedTuple):
    """A version of the machine, and the defaults it pins."""

    name: str
    #: True if virtio-net offers VIRTIO_NET_F_GUEST_ANNOUNCE where a NIC's property is not given.
    guest_announce: bool
    #: True if HELLO describes the guest's CPU.
    describes_cpu: bool
    #: True if the guest is told what the machine is (SMBIOS), that it is a copy (VMGenID), and how
    #: to report a panic (pvpanic).
    informs: bool


_TYPES = {
    kind.name: kind
    for kind in (
        MachineType("godwit-0.1", guest_announce=False, describes_cpu=False, informs=False),
        MachineType("godwit-0.2", guest_announce=True, describes_cpu=True, informs=False),
        MachineType("godwit-0.3", guest_announce=True, describes_cpu=True, informs=True),
    )
}

DEFAULT = "godwit-0.3"


def names() -> list[str]:
    """Return the names of all machine types, the oldest first."""
    return list(_TYPES)


def machine_type(name: str) -> MachineType:
    """Return the machine type of a name.

    Raises:
        ConfigError: there is none of this name; the message lists those that exist.
    """
    try:
        return _TYPES[name]
    except KeyError:
        known = ", ".join(_TYPES)
        raise ConfigError(f"machine type '{name}' is unknown; there are {known}") from None
