"""Copies of a tap's frames from which addresses are learned: ARP, RARP, neighbour discovery.

With vhost-net no frame passes this process, so the kernel copies the few that matter. To the host,
a frame from the guest is received on the tap, and a frame to the guest is sent there. All methods
belong to the loop's thread.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable

from godwit.errors import HostError
from godwit.host.loop import Loop, Timer

from . import bpf, packet
from .ethernet import ETH_P_ALL, TPID_8021Q

#: Most frames read in each interval, 1,280 a second: a guest may send more than Python can read.
#: Some 200 more wait in the socket (net.core.rmem_default), and the kernel drops the rest.
MAX_FRAMES = 64
INTERVAL_S = 0.05

#: (tpid, vid) of the tag that the kernel took off the frame.
Outer = tuple[int, int]
OnFrame = Callable[[bytes, Outer | None], object]

_CONTROL_BYTES = socket.CMSG_SPACE(packet.AUXDATA.size)


def open_socket(tap: str, network: bool) -> socket.socket:
    """Open a packet socket on the interface for the frames of :func:`.bpf.guest_filter`.

    With ``network``, the frames are others' to the guest, by :func:`.bpf.network_filter`.

    Raises:
        OSError: there is no such interface, or no permission.
    """
    # Protocol 0: nothing is received before bind, and after bind only what the filter passes.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        bpf.attach(sock, bpf.network_filter() if network else bpf.guest_filter())
        sock.setsockopt(packet.SOL_PACKET, packet.PACKET_AUXDATA, 1)
        if not network:
            try:
                # The filter drops the same frames; this saves the kernel a copy of each.
                sock.setsockopt(packet.SOL_PACKET, packet.PACKET_IGNORE_OUTGOING, 1)
            except OSError:
                pass
        sock.bind((tap, ETH_P_ALL))
    except BaseException:
        sock.close()
        raise
    return sock


class TapWatch:
    """A watch that calls ``on_frame`` for each frame on ``tap`` from which addresses are learned.

    The frames are the guest's, or with ``network`` others' to the guest.

    The watch outlasts an interface that goes down and up. When the interface is gone, or the socket
    fails in another way, the watch closes, and ``on_error`` is called once; :meth:`reopen` starts
    the watch again.

    Raises:
        HostError: there is no such interface, or no permission.
    """

    def __init__(
        self,
        tap: str,
        on_frame: OnFrame,
        loop: Loop,
        on_error: Callable[[OSError], None] = lambda error: None,
        *,
        network: bool = False,
        opener: Callable[[str, bool], socket.socket] = open_socket,
    ) -> None:
        self.tap = tap
        self._on_frame = on_frame
        self._on_error = on_error
        self._loop = loop
        self._network = network
        self._opener = opener
        self._socket: socket.socket | None = None
        self._timer: Timer | None = None
        self._interval_ends = 0.0
        self._left = 0
        self._dropped = 0
        self.reopen()

    @property
    def closed(self) -> bool:
        """Return whether the watch is closed."""
        return self._socket is None

    @property
    def dropped(self) -> int:
        """Return how many frames the kernel dropped since the start because the socket was full."""
        if self._socket is not None:
            try:
                raw = self._socket.getsockopt(
                    packet.SOL_PACKET, packet.PACKET_STATISTICS, packet.STATISTICS.size
                )
            except OSError:
                return self._dropped
            self._dropped += packet.STATISTICS.unpack(raw)[1]
        return self._dropped

    def reopen(self) -> None:
        """Watch the interface that now has the name.

        Raises:
            HostError: there is no such interface, or no permission.
        """
        self.close()
        try:
            self._socket = self._opener(self.tap, self._network)
        except OSError as error:
            why = {
                errno.EPERM: "not permitted; run as root or with CAP_NET_RAW",
                errno.ENODEV: "there is no such interface",
                errno.EAFNOSUPPORT: "no packet sockets; load the module (modprobe af_packet)",
            }.get(error.errno or 0, error.strerror)
            raise HostError(f"cannot watch tap '{self.tap}': {why}") from error
        self._loop.watch(self._socket.fileno(), self._readable)

    def inject(self, frame: bytes) -> None:
        """Send ``frame`` (Ethernet, no FCS) to the guest, past the bridge the tap is in.

        Raises:
            OSError: the kernel did not take the frame, or the watch is closed.
        """
        if self._socket is None:
            raise OSError(errno.ENETDOWN, f"tap '{self.tap}' is not watched")
        self._socket.send(frame)

    def narrow(self, known: bpf.Bits) -> None:
        """Pass only others' frames concerning ``known`` addresses, if the watch is open.

        The kernel keeps the old filter where the new one is not taken.
        """
        if self._socket is not None:
            try:
                bpf.attach(self._socket, bpf.network_filter(known))
            except OSError:
                pass  # then more frames come than are needed

    def close(self) -> None:
        """Stop watching and close the socket, unless closed already."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._dropped = self.dropped
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # --- inside -----------------------------------------------------------------------------------
    def _readable(self) -> None:
        now = self._loop.now()
        if now >= self._interval_ends:
            self._interval_ends = now + INTERVAL_S
            self._left = MAX_FRAMES
        # on_frame may close the watch.
        while self._left > 0 and self._socket is not None:
            self._left -= 1
            try:
                frame, extra, _, _ = self._socket.recvmsg(bpf.SNAP, _CONTROL_BYTES)
            except BlockingIOError:
                self._left += 1
                return
            except OSError as error:
                self._failed(self._socket, error)
                continue
            self._on_frame(frame, _outer(extra))
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._timer = self._loop.call_later(self._interval_ends - now, self._resume)

    def _resume(self) -> None:
        self._timer = None
        if self._socket is not None:
            self._loop.watch(self._socket.fileno(), self._readable)

    def _failed(self, sock: socket.socket, error: OSError) -> None:
        # An interface that goes down is an error too, of one call; the kernel binds the socket
        # again when the interface comes up (net/packet/af_packet.c, packet_notifier). One that is
        # gone leaves the socket without a name.
        if error.errno == errno.ENETDOWN and sock.getsockname()[0]:
            return
        self.close()
        self._on_error(error)


def _outer(extra: Iterable[tuple[int, int, bytes]]) -> Outer | None:
    """Return the tag the kernel took off a frame, from the frame's control messages."""
    for level, kind, data in extra:
        if (level, kind) == (packet.SOL_PACKET, packet.PACKET_AUXDATA):
            status, _, _, _, _, tci, tpid = packet.AUXDATA.unpack(data)
            if status & packet.STATUS_VLAN_VALID:
                # 802.1Q-2018 section 9.6: priority 3 bits, drop eligible 1, VLAN id 12.
                return tpid if status & packet.STATUS_VLAN_TPID_VALID else TPID_8021Q, tci & 0xFFF
    return None
