"""virtio-blk (virtio 1.2, 5.2): a disk whose requests go between guest memory and an image."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from struct import pack
from typing import Annotated

import msgspec

from godwit.errors import GuestError, HostError, StreamError
from godwit.host.image import SECTOR, Image
from godwit.hw.capabilities import (
    ChecksKept,
    Counts,
    HasFile,
    IoError,
    OwnsHostState,
    RefusesCopies,
    ReportsIoErrors,
)
from godwit.hw.device import Slot
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.budget import Budget
from godwit.hw.virtio.device import VirtioDevice
from godwit.hw.virtio.pci import VirtioPci
from godwit.hw.virtio.queue import Virtqueue
from godwit.spec.back_ends import MAX_QUEUES
from godwit.spec.config import DeviceConfig, DiskConfig, OnError
from godwit.spec.saved import U64

from .request import (
    FLUSH,
    IN,
    IOERR,
    MAX_DISCARD,
    MAX_SEGMENTS,
    MAX_ZEROES,
    MOST,
    OUT,
    Doer,
    Done,
    Failed,
    Request,
    parse,
)
from .workers import Workers

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10
F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 12, 1 << 13, 1 << 14

#: Requests, bytes and pieces that one thread takes at once.
_BATCH = 16, 1 << 20, 2048
#: Entries of a queue: 1 MB in a guest whose memory is in small pieces is one request.
_QUEUE_SIZE = 512
#: A queue's entries for header and status.
_NOT_DATA = 2


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request that failed, and is tried again when the guest goes on."""

    queue: Annotated[int, msgspec.Meta(ge=0, lt=64)]
    head: Annotated[int, msgspec.Meta(ge=0, lt=1024)]


class Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inode and the time of the last change of an image, by which a later write shows."""

    inode: U64
    changed_ns: U64


class BlkState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of a disk: what is to be tried again, and when its image was written last."""

    retries: Annotated[list[Retry], msgspec.Meta(max_length=64 * 1024)]
    #: None: a block device, which does not tell.
    stamp: Stamp | None


class VirtioBlk(
    VirtioDevice, Counts, OwnsHostState, HasFile, ChecksKept, RefusesCopies, ReportsIoErrors
):
    """A disk with the content of ``image``, which the disk owns."""

    kind = "virtio-blk"
    State = BlkState
    device_id = 2
    class_code = 0x010000  # SCSI storage, as QEMU's (hw/virtio/virtio-blk-pci.c)

    def __init__(self, config: DiskConfig, memory: GuestMemory, image: Image) -> None:
        features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        count = config.queues or 1
        if count > 1:
            features |= F_MQ
        if config.readonly:
            features |= F_RO
        else:
            features |= F_WRITE_ZEROES | (F_DISCARD if config.discard else 0)
        queues = [Virtqueue(memory, config.queue_size or _QUEUE_SIZE) for _ in range(count)]
        super().__init__(config.id, features, queues)
        self._memory = memory
        self._serial = config.serial
        self._on_error = config.on_error
        self._image = image
        self._config = self._make_config(config)
        self.on_io_error: Callable[[IoError], None] = lambda error: None
        self._doer = Doer(image, config.serial.encode(), config.discard)
        self._workers = Workers(
            config.id,
            self.lock,
            self._doer,
            self._take,
            self._finish,
            image.direct,
        )
        self._retries: list[Retry] = []
        self._to_retry: list[Retry] = []
        self._next_queue = 0
        self._stamp: Stamp | None = None
        self._counts = dict.fromkeys(
            ("reads", "read-bytes", "writes", "written-bytes", "flushes", "errors"), 0
        )

    def _make_config(self, config: DiskConfig) -> bytes:
        """Return struct virtio_blk_config (5.2.4): it never changes."""
        block = self._image.block
        return pack(
            "<QIIHBBIBBHIBBHIIIIIB3x",
            self._image.size // SECTOR,
            0,  # size_max
            self.queues[0].max_size - _NOT_DATA,
            *(0, 0, 0),  # geometry
            block,
            *(0, 0, 1, 0),  # topology: what is written at once is a block
            *(1, 0, len(self.queues)),  # writeback
            *(MAX_DISCARD, MAX_SEGMENTS, block // SECTOR),
            *(MAX_ZEROES, MAX_SEGMENTS, 1),
        )

    def properties(self) -> Mapping[str, str | int | None]:
        """Return size, block size and identity of the disk, and what it can do."""
        return {
            "size": self._image.size,
            "block-size": self._image.block,
            "serial": self._serial,
            "features": self.offered,
            "queues": len(self.queues),
            "queue-size": self.queues[0].max_size,
        }

    def counters(self) -> Mapping[str, int]:
        """Return how many requests were done, with how many bytes, and how many failed."""
        return dict(self._counts)

    def config(self) -> bytes:
        """Return the disk's part of the configuration."""
        return self._config

    # --- life -------------------------------------------------------------------------------------
    def start(self) -> None:
        """Serve the queues, and first of all what is to be tried again."""
        if self.started:
            return
        kicks = [self.transport.kick_fd(i) for i, queue in enumerate(self.queues) if queue.enabled]
        if not kicks:
            raise GuestError("the driver is ready, but set up no queue")
        # A driver that did not take the feature cannot flush, and takes a write for written
        # (virtio 1.2, 5.2.6.2).
        self._doer.writes_through = not self.negotiated & F_FLUSH
        self.started = True
        self._to_retry += self._retries
        self._retries.clear()
        self._workers.start(kicks)

    def stop(self) -> None:
        """Take no more requests from the queues. Requests in flight are finished."""
        if self.started:
            self.started = False
            self._workers.stop()
            self._retries[:0] = self._to_retry
            self._to_retry.clear()

    def stopped(self, timeout: float) -> bool:
        """Wait until no request is in flight, at most ``timeout`` seconds, and return if so."""
        return self._workers.stopped(timeout)

    def reset(self) -> None:
        """Forget the requests to be tried again."""
        self._retries.clear()

    def close(self) -> None:
        """End the threads and close the image."""
        if self._workers.close():
            self._image.close()  # else a thread hangs in the kernel, with the image

    # --- requests, with the lock held -------------------------------------------------------------
    def _take(self, at_most_one: bool) -> list[Request]:
        """Take the next requests of all queues, which have their turns."""
        requests: list[Request] = []
        with self.guarded("request"):
            budget = Budget(1, *_BATCH[1:]) if at_most_one else Budget(*_BATCH)
            while self._to_retry and budget.left:
                retry = self._to_retry.pop(0)
                chain = self.queues[retry.queue].again(retry.head)
                budget.spend(chain)
                requests.append(parse(retry.queue, chain))
            count = len(self.queues)
            for step in range(count):
                index = (self._next_queue + step) % count
                queue = self.queues[index]
                while queue.enabled and budget.left and (popped := queue.pop()) is not None:
                    budget.spend(popped)
                    requests.append(parse(index, popped))
            self._next_queue = (self._next_queue + 1) % count
        return requests

    def _finish(self, ends: Sequence[Done | Failed]) -> None:
        """Return requests to the guest, or keep them to be tried again."""
        touched = set()
        for end in ends:
            request = end.request
            queue = self.queues[request.queue]
            if isinstance(end, Failed):
                done = self._failed(end)
                if done is None:
                    continue
                end = done
            self._count(end)
            request.status[0] = end.status
            queue.push(request.chain, end.written + 1)
            if self._memory.logging and (end.status or request.kind != IN):
                self._mark(request)
            touched.add(request.queue)
        for index in touched:
            if self.queues[index].should_notify():
                self.transport.signal_queue(index)

    def _mark(self, request: Request) -> None:
        """Log the pages that the queue does not, which logs what comes first.

        The status comes last, and a read that failed may have written some. How much is logged is
        bounded as what is read: the driver says how large its memory is.
        """
        written = [(at, length) for at, length in request.chain.writable_at if length]
        at, length = written[-1]
        self._memory.mark_dirty(at + length - 1, 1)
        if request.kind == IN and request.inward.size <= MOST:
            for at, length in written:
                self._memory.mark_dirty(at, length)

    def _failed(self, end: Failed) -> Done | None:
        """Return how the guest is told of what the host could not do, or None to try it again."""
        nospace = end.error.errno in (errno.ENOSPC, errno.EDQUOT)
        stop = self._on_error is OnError.STOP or (self._on_error is OnError.ENOSPC and nospace)
        stop = stop and not end.final
        self._counts["errors"] += 1
        reason = end.error.strerror or str(end.error)
        action = "stop" if stop else "report"
        self.on_io_error(IoError(self.id, end.request.operation, action, nospace, reason))
        if not stop:
            return Done(end.request, IOERR)
        self._retries.append(Retry(end.request.queue, end.request.chain.head))
        return None

    def _count(self, end: Done) -> None:
        request, counts = end.request, self._counts
        if end.status:
            counts["errors"] += 1
        elif request.kind == IN:
            counts["reads"] += 1
            counts["read-bytes"] += end.written
        elif request.kind == OUT:
            counts["writes"] += 1
            counts["written-bytes"] += request.outward.size
        elif request.kind == FLUSH:
            counts["flushes"] += 1

    # --- what one VM alone may have ---------------------------------------------------------------
    def sync(self) -> None:
        """Flush the image early, to leave less to :meth:`release`."""
        try:
            self._image.flush()
        except OSError:
            pass  # the image remembers, and a release or the guest's flush fails

    def release(self) -> None:
        """Flush the image, and give back the lock.

        Raises:
            HostError: what the guest wrote is not on the disk.
        """
        try:
            self._image.flush()
        except OSError as error:
            raise HostError(
                f"disk image '{self._image.path}' cannot be flushed: {error.strerror}"
            ) from error
        self._image.unlock()

    def acquire(self) -> None:
        """Take the lock of the image.

        Raises:
            HostError: another has it.
        """
        self._image.lock()

    def check_kept(self) -> None:
        """Refuse a disk written after the guest was saved.

        A copy of the image, which has another inode or the same time, is taken to be from then.

        Raises:
            HostError: the image was written since.
        """
        now, then = self._present_stamp(), self._stamp
        if now is None or then is None or self._image.readonly:
            return
        if now.inode == then.inode and now != then:
            raise HostError(
                f"disk image '{self._image.path}' was written after the guest was saved, and its "
                "file systems would not survive that; restore with a copy of the image from then "
                "(cp -p)"
            )

    def is_file(self, device: int, inode: int) -> bool:
        """Return whether the image is this file."""
        return self._image.identity == (device, inode)

    def why_no_copy(self) -> str | None:
        """Refuse a copy of the guest that finds its disk as the guest went on to write it."""
        if self._image.readonly:
            return None
        return (
            f"the guest goes on writing its disk image '{self._image.path}', and its copy would "
            "find that with another memory"
        )

    def _present_stamp(self) -> Stamp | None:
        return None if self._image.is_device else Stamp(*self._image.stamp)

    # --- saved state ------------------------------------------------------------------------------
    def save(self) -> BlkState:
        """Return what is to be tried again, and the image's stamp."""
        return BlkState([*self._to_retry, *self._retries], self._present_stamp())

    def load(self, state: BlkState) -> None:
        """Take over what is to be tried again.

        Raises:
            StreamError: a request of a queue that is not there.
        """
        per_queue = [0] * len(self.queues)
        for retry in state.retries:
            if retry.queue >= len(self.queues) or retry.head >= self.queues[retry.queue].size:
                raise StreamError(f"retries: head {retry.head} of queue {retry.queue}")
            per_queue[retry.queue] += 1
            if per_queue[retry.queue] > self.queues[retry.queue].size:
                raise StreamError(f"retries: more than queue {retry.queue} has entries")
        self._retries = list(state.retries)
        self._to_retry = []
        self._stamp = state.stamp


def make(config: DeviceConfig, slot: Slot) -> VirtioPci:
    """Return a disk behind PCI.

    Raises:
        ConfigError: the image cannot be used so.
    """
    assert isinstance(config, DiskConfig)
    config = config._replace(queues=config.queues or min(slot.cpus, MAX_QUEUES))
    image = Image(config.path, readonly=config.readonly, direct=config.cache == "none")
    try:
        return VirtioPci(VirtioBlk(config, slot.memory, image), slot)
    except BaseException:
        image.close()
        raise
