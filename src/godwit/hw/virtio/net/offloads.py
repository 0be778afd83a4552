"""virtio-net's offload features and the tap's flags for them."""

from __future__ import annotations

from godwit.host.net import tap

CSUM = 1 << 0
GUEST_CSUM = 1 << 1
GUEST_TSO4 = 1 << 7
GUEST_TSO6 = 1 << 8
GUEST_ECN = 1 << 9
GUEST_UFO = 1 << 10
HOST_TSO4 = 1 << 11
HOST_TSO6 = 1 << 12
HOST_ECN = 1 << 13
HOST_UFO = 1 << 14

#: What the tap must do for the guest to receive unfinished frames.
_RECEIVE = {
    GUEST_CSUM: tap.F_CSUM,
    GUEST_TSO4: tap.F_TSO4,
    GUEST_TSO6: tap.F_TSO6,
    GUEST_ECN: tap.F_TSO_ECN,
    GUEST_UFO: tap.F_UFO,
}
#: What the host finishes for the guest: the vnet header alone makes it possible.
_SEND = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN


def offered(tap_offloads: int) -> int:
    """Return the virtio-net features a tap with these TUN_F_* flags can carry."""
    features = _SEND | (HOST_UFO if tap_offloads & tap.F_UFO else 0)
    for feature, flag in _RECEIVE.items():
        if tap_offloads & flag:
            features |= feature
    return features


def tap_flags(negotiated: int) -> int:
    """Return the TUN_F_* flags for the features a driver negotiated."""
    flags = 0
    for feature, flag in _RECEIVE.items():
        if negotiated & feature:
            flags |= flag
    if not flags & (tap.F_TSO4 | tap.F_TSO6):
        flags &= ~tap.F_TSO_ECN  # alone it is EINVAL, and a guest may negotiate what it likes
    return flags if flags & tap.F_CSUM else 0
