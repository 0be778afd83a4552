"""A tap: the host's end of a NIC (Documentation/networking/tuntap.rst, include/uapi/linux/if_h)."""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct

from godwit.errors import HostError
from godwit.host.ioctl import ioctl, ioctl_in, ioctl_out, ior, iow

from . import rtnetlink

_TUN = 0x54  # 'T'
IFREQ = Struct("=16sH22x")

TUNSETIFF = iow(_TUN, 202, 4)
TUNGETIFF = ior(_TUN, 210, 4)
TUNSETOFFLOAD = iow(_TUN, 208, 4)
TUNSETVNETHDRSZ = iow(_TUN, 216, 4)

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, F_UFO = 1, 2, 4, 8, 16

#: Length of virtio_net_hdr with num_buffers, which VERSION_1 always has (virtio 1.2, 5.1.6).
HEADER = 12
#: The longest frame either way: 64 KiB of IP (offloads join many), an Ethernet header, a tag.
MAX_FRAME = HEADER + 65536 + 18
_NO_HEADER = bytes(HEADER)
#: The error of a tap whose interface was deleted (drivers/net/tun.c, tun_get).
GONE = errno.EBADFD
#: Most frames thrown away at once: in a flood there would be no end.
_DRAINED = 8192


#: include/uapi/linux/sockios.h; the argument is struct ifreq with an int behind the name.
SIOCSIFMTU = 0x8922
_IFREQ_INT = Struct("=16si20x")


class Tap:
    """An attached tap with a 12-byte vnet header before each frame.

    The interface is used if it exists, else made, with this ``mtu`` if given, and goes with the
    descriptor.

    Raises:
        HostError: /dev/net/tun is missing or not permitted, or the tap is taken.
    """

    def __init__(self, name: str, mtu: int | None = None) -> None:
        made = mtu is not None and _exists(name) is False
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(
                f"/dev/net/tun: {error.strerror}; load the module (modprobe tun), or run as "
                "a user who may use it"
            ) from error
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        request = bytearray(IFREQ.pack(name.encode(), flags))
        try:
            ioctl_out(self.fd, TUNSETIFF, request)
            ioctl_in(self.fd, TUNSETVNETHDRSZ, HEADER.to_bytes(4, "little"))
        except OSError as error:
            os.close(self.fd)
            why = {
                errno.EBUSY: "another process has it open",
                errno.EPERM: "not permitted; run as root or give the tap to this user",
                errno.EINVAL: "it exists with other flags (make it with vnet_hdr, one queue)",
            }.get(error.errno or 0, error.strerror)
            raise HostError(f"tap '{name}': {why}") from error
        self.name = name
        self._unfinished: int | None = None
        if made and mtu is not None:
            try:
                _set_mtu(name, mtu)
            except OSError as error:
                os.close(self.fd)
                raise HostError(
                    f"tap '{name}': MTU {mtu}: {error.strerror}; choose another mtu="
                ) from error
        self.offloads = self._probe()

    def _probe(self) -> int:
        """Return the TUN_F_* the kernel takes: versions differ about UFO."""
        found = 0
        for flag in (F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, F_UFO):
            wanted = found | flag
            try:
                ioctl(self.fd, TUNSETOFFLOAD, wanted)
                found = wanted
            except OSError:
                continue
        self.set_offloads(0)
        return found

    def set_offloads(self, flags: int) -> None:
        """Set which unfinished frames the guest takes, as TUN_F_*.

        Raises:
            OSError: the kernel refuses.
        """
        if flags != self._unfinished:  # each call makes the kernel notify the bridge
            self._unfinished = None
            try:
                ioctl(self.fd, TUNSETOFFLOAD, flags)
            except OSError as error:
                if error.errno != GONE:  # then no frame comes that could be unfinished
                    raise
            self._unfinished = flags

    @property
    def attached(self) -> bool:
        """True while the descriptor has an interface, wherever the interface is by now."""
        try:
            ioctl_out(self.fd, TUNGETIFF, bytearray(IFREQ.size))
        except OSError as error:
            return error.errno != GONE
        return True

    def send(self, frame: bytes) -> None:
        """Send a frame to the network, as if the guest had sent the frame.

        Raises:
            OSError: the kernel does not take the frame.
        """
        os.write(self.fd, _NO_HEADER + frame)

    def receive(self) -> bytes:
        """Return the next frame that waits, with the header.

        Raises:
            OSError: there is none, or the interface is gone (:data:`GONE`).
        """
        return os.read(self.fd, MAX_FRAME)

    def drain(self) -> int:
        """Throw away the frames that wait, a queue's worth at most, and return their number."""
        for count in range(_DRAINED):
            try:
                self.receive()
            except OSError:
                return count
        return _DRAINED

    def close(self) -> None:
        """Close the descriptor, unless closed already."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def mtu_problem(name: str, told: int) -> str | None:
    """Return why a guest cannot use the MTU on a tap, or None.

    Small packets pass all the same, so that nobody notices until bulk traffic hangs.
    """
    try:
        link = rtnetlink.link(name)
    except OSError:
        return None  # where the kernel cannot be asked, the operator knows
    if link is None or not link.mtu or link.mtu >= told:
        return None
    return (
        f"tap '{name}' has MTU {link.mtu}, and the guest is told {told}: "
        f"ip link set {name} mtu {told} (and the bridge's other ports), or a lower mtu= for the NIC"
    )


def _exists(name: str) -> bool | None:
    """Return whether the interface is there, or None if the kernel cannot be asked."""
    try:
        return rtnetlink.link(name) is not None
    except OSError:
        return None


def _set_mtu(name: str, mtu: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        ioctl_in(sock.fileno(), SIOCSIFMTU, _IFREQ_INT.pack(name.encode(), mtu))
