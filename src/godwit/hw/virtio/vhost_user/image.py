"""A qcow2 image that one VM alone may have open, behind a disk that is always there.

qemu-storage-daemon exports the node ``disk``, whose content is nothing at first: zeros, of the
image's size. To acquire the image is to open it, by which the daemon locks it, and to put it in the
place of nothing; to release it, the reverse. The device notices none of that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress

from godwit.errors import HostError
from godwit.host.storage_daemon import StorageDaemon
from godwit.hw.capabilities import OwnsHostState
from godwit.spec.back_ends import ImageFile


class OpenedImage(OwnsHostState):
    """An image of the node ``disk`` of a daemon, closed at first.

    Raises:
        HostError: there is no such image.
    """

    def __init__(self, image: ImageFile, daemon: StorageDaemon) -> None:
        self._image = image
        self._daemon = daemon
        self._open = False
        self._flushing = threading.Lock()
        #: An error of a write that the kernel had taken, and reports once.
        self._lost: OSError | None = None
        try:
            self._fd = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"disk image '{image.path}': {error.strerror}") from error

    def sync(self) -> None:
        """Flush what the daemon has written to the disk."""
        self._flush()  # if it fails, so does a release

    def _flush(self) -> OSError | None:
        """Flush, and return the error of this or an earlier time.

        Of two at once the kernel would report an error to one alone, and the other be done first.
        """
        with self._flushing:
            if self._lost is None:
                try:
                    os.fdatasync(self._fd)
                except OSError as error:
                    self._lost = error
            return self._lost

    def release(self) -> None:
        """Close the image, by which all is flushed and the lock is free.

        Raises:
            HostError: what the guest wrote is not on the disk.
        """
        if self._open:
            self._show("nothing")
            self._open = False
            self._close("image", "file")
            self._flush()  # the daemon's own errors at the end go nowhere
        if self._lost is not None:
            raise HostError(
                f"disk image '{self._image.path}' cannot be flushed: {self._lost.strerror}"
            )

    def acquire(self) -> None:
        """Open the image, by which nobody else can.

        Raises:
            HostError: another has it, or the file is no such image.
        """
        if self._open:
            return
        with suppress(OSError):  # what another host has written since
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        image, options = self._image, self._options()
        path = os.path.abspath(image.path)
        self._add("file", {"driver": "file", "filename": path, **options})
        try:
            self._add("image", {"driver": image.format, "file": "file", **options})
            try:
                self._show("image")
            except HostError:
                self._close("image")
                raise
        except HostError:
            self._close("file")
            raise
        self._open = True

    def _options(self) -> dict[str, object]:
        image = self._image
        return {
            "read-only": image.readonly,
            "discard": "unmap" if image.discard else "ignore",
            "cache": {"direct": image.direct},
        }

    def _add(self, name: str, node: Mapping[str, object]) -> None:
        try:
            self._daemon.execute("blockdev-add", **{"node-name": name, **node})
        except HostError as error:
            raise HostError(f"disk image '{self._image.path}': {error}") from error

    def _show(self, child: str) -> None:
        """Have the disk show the content of another node."""
        node = {"driver": "raw", "node-name": "disk", "file": child, **self._options()}
        self._daemon.execute("blockdev-reopen", options=[node])

    def _close(self, *names: str) -> None:
        for name in names:
            self._daemon.execute("blockdev-del", node_name=name)

    def close(self) -> None:
        """Give the descriptors of the image back. The daemon closes the image at its end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._daemon.close()
