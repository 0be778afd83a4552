"""A qcow2 image that one VM alone may have open, behind a disk that is always there.

qemu-storage-daemon exports the node ``disk``, whose content is nothing at first: zeros, of the
image's size. To acquire the image is to open it, by which the daemon locks it, and to put it in the
place of nothing; to release it, the reverse. The device notices none of that.

A command that the daemon does not answer in time may be done later. What is open is unknown from
then on, until the daemon has answered: the guest never runs on nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress

from godwit.errors import HostError
from godwit.host.storage_daemon import StorageDaemon
from godwit.hw.capabilities import OwnsHostState
from godwit.spec.back_ends import ImageFile

#: The nodes of an open image, in the order in which they are closed.
_OURS = ("image", "file")


class OpenedImage(OwnsHostState):
    """An image of the node ``disk`` of a daemon, closed at first.

    Raises:
        HostError: there is no such image.
    """

    def __init__(self, image: ImageFile, daemon: StorageDaemon) -> None:
        self._image = image
        self._daemon = daemon
        #: None while unknown: from a first command to the success of the last.
        self._open: bool | None = False
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
            HostError: what the guest wrote is not on the disk, or the daemon may have it open.
        """
        if self._open is not False:
            nodes = set(_OURS) if self._open else self._nodes()
            self._open = None
            try:
                self._clear(nodes)
            except HostError as error:
                raise HostError(
                    f"disk image '{self._image.path}' may still be open: {error}"
                ) from error
            self._open = False
            self._flush()  # the daemon's own errors at the end go nowhere
        if self._lost is not None:
            raise HostError(
                f"disk image '{self._image.path}' cannot be flushed: {self._lost.strerror}"
            )

    def acquire(self) -> None:
        """Open the image, by which nobody else can.

        Raises:
            HostError: another has it, the file is no such image, or the daemon is silent. What the
                disk shows may be nothing then.
        """
        if self._open:
            return
        nodes = self._nodes() if self._open is None else set()
        self._open = None
        try:
            if "image" in nodes:  # open and locked ever since
                self._show("image")
            else:
                self._clear(nodes)
                self._open_anew()
        except HostError:
            if not self._daemon.silent:
                with suppress(HostError):
                    self._clear(self._nodes())
                    self._open = False
            raise
        self._open = True

    def _open_anew(self) -> None:
        with suppress(OSError):  # what another host has written since
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        image, options = self._image, self._options()
        path = os.path.abspath(image.path)
        self._add_file({"driver": "file", "filename": path, **options})
        self._add("image", {"driver": image.format, "file": "file", **options, **image.secret()})
        self._show("image")

    def _nodes(self) -> set[str]:
        """Return which nodes there are, by which all earlier commands are done.

        Raises:
            HostError: the daemon does not answer: the guest must not run.
        """
        try:
            return self._daemon.nodes()
        except HostError as error:
            raise HostError(
                f"disk image '{self._image.path}': nobody knows whether it is open ({error}); see "
                "that qemu-storage-daemon and the storage work, and try again"
            ) from error

    def _clear(self, nodes: AbstractSet[str]) -> None:
        """Have the disk show nothing, and close what of the image there is."""
        if nodes.isdisjoint(_OURS):
            return  # nor can the disk show them
        self._show("nothing")
        for name in _OURS:
            if name in nodes:
                self._daemon.execute("blockdev-del", node_name=name)

    def _options(self) -> dict[str, object]:
        image = self._image
        return {
            "read-only": image.readonly,
            "discard": "unmap" if image.discard else "ignore",
            "cache": {"direct": image.direct},
        }

    def _add_file(self, node: Mapping[str, object]) -> None:
        """Open the file, with io_uring where the kernel and the daemon have it.

        Without, each request changes threads in the daemon. Linux may forbid it to all
        (kernel.io_uring_disabled), as container managers do.
        """
        try:
            self._add("file", {**node, "aio": "io_uring"})
        except HostError as error:
            if self._daemon.silent or "io_uring" not in str(error):
                raise
            self._add("file", node)

    def _add(self, name: str, node: Mapping[str, object]) -> None:
        try:
            self._daemon.execute("blockdev-add", **{"node-name": name, **node})
        except HostError as error:
            raise HostError(f"disk image '{self._image.path}': {error}") from error

    def _show(self, child: str) -> None:
        """Have the disk show the content of another node."""
        node = {"driver": "raw", "node-name": "disk", "file": child, **self._options()}
        self._daemon.execute("blockdev-reopen", options=[node])

    def close(self) -> None:
        """Give the descriptors of the image back. The daemon closes the image at its end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._daemon.close()
