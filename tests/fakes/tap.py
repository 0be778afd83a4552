"""A tap without a kernel's network: a pair of sockets that keep frames apart."""

from __future__ import annotations

import socket

from godwit.host.net.tap import F_CSUM, F_TSO4, F_TSO6, F_TSO_ECN, GONE, HEADER, Tap


class FakeTap(Tap):
    """A :class:`godwit.host.net.tap.Tap` whose other end is :meth:`put` and :meth:`get`."""

    def __init__(self, offloads: int = F_CSUM | F_TSO4 | F_TSO6, name: str = "tap0") -> None:
        mine, self._network = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        )
        self.fd = mine.detach()
        self.name = name
        self.offloads = offloads
        self.flags = 0
        self.gone = False

    def delete(self) -> None:
        """Delete the interface: the descriptor is readable for ever, and has nothing."""
        self.gone = True
        self._network.close()

    @property
    def attached(self) -> bool:
        """Return whether the interface was not deleted."""
        return not self.gone

    def receive(self) -> bytes:
        """Return the next frame, as a tap does.

        Raises:
            OSError: there is none, or the interface was deleted.
        """
        if self.gone:
            raise OSError(GONE, "File descriptor in bad state")
        return super().receive()

    def set_offloads(self, flags: int) -> None:
        """Note the offloads, and refuse those that no kernel takes."""
        if flags & F_TSO_ECN and not flags & (F_TSO4 | F_TSO6):
            raise OSError("ECN without TSO")  # drivers/net/tun.c, set_offload: EINVAL
        self.flags = flags

    def put(self, frame: bytes, header: bytes = bytes(HEADER)) -> None:
        """Send a frame from the network to the guest.

        Raises:
            BlockingIOError: the tap is full.
        """
        self._network.send(header + frame)

    def get(self) -> bytes | None:
        """Return the next frame out of the tap, header included, or None if there is none."""
        try:
            return self._network.recv(1 << 18)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Close both ends of the tap."""
        super().close()
        self._network.close()
