"""vhost-vsock: the kernel's half of a guest's vsock.

Sources: include/uapi/linux/vhost.h and drivers/vhost/vsock.c.
"""

from __future__ import annotations

import errno
import os

from godwit.errors import HostError

from .ioctl import ioctl_in, iow
from .vhost import VHOST, Vhost

DEVICE = "/dev/vhost-vsock"

SET_GUEST_CID = iow(VHOST, 0x60, 8)
SET_RUNNING = iow(VHOST, 0x61, 4)

#: CIDs that a guest may have: 0 to 2 are the hypervisor's, the loopback's and the host's, and the
#: last is VMADDR_CID_ANY (include/uapi/linux/vm_sockets.h).
FIRST_CID, LAST_CID = 3, 0xFFFF_FFFE


class VhostVsock(Vhost):
    """An open ``/dev/vhost-vsock`` with two rings: 0 to the guest, 1 from the guest.

    It is nobody's, and has no CID, until :meth:`own` and :meth:`set_cid`. Its end resets the host's
    connections with the guest, unless another device has the CID by then (vhost_vsock_dev_release).

    Raises:
        HostError: vhost-vsock is missing, or may not be used.
    """

    def __init__(self) -> None:
        try:
            super().__init__(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise HostError(
                f"{DEVICE}: {error.strerror}; load the module (modprobe vhost_vsock), or be of the "
                "file's group"
            ) from error

    def set_cid(self, cid: int) -> bool:
        """Give the guest a CID, and return False if another guest of this kernel has the CID."""
        try:
            ioctl_in(self._fd, SET_GUEST_CID, cid.to_bytes(8, "little"))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True

    def set_running(self, running: bool) -> None:
        """Serve both rings, or no longer, when what was under way is done."""
        ioctl_in(self._fd, SET_RUNNING, int(running).to_bytes(4, "little"))
