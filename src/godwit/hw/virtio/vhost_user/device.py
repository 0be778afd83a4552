"""A virtio device whose queues another process serves by vhost-user, in shared guest memory.

The back end may end at any moment, and another may listen at the socket later: the device waits
meanwhile, and requests in flight are done again. What the back end sends is checked
(:mod:`godwit.host.vhost_user`). Who has all of the guest's memory is trusted as the guest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from godwit.errors import GuestError, HostError
from godwit.host import eventfd
from godwit.host.ioctl import address_of
from godwit.host.loop import Loop
from godwit.host.vhost_user import F_LOG_ALL, P_LOG_SHMFD, BackEnd, Inflight
from godwit.hw.capabilities import Counts, HasBackEnd, LogsDirtyPages, RefusesCopies, Unmovable
from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.device import F_VERSION_1, TRANSPORT_FEATURES, VirtioDevice
from godwit.hw.virtio.queue import Virtqueue
from godwit.spec.back_ends import MAX_QUEUES, ImageFile, VhostUserConfig

from .drain import Drain
from .image import OpenedImage
from .link import Link
from .log import Log
from .types import F_MQ, F_RO, TYPES

_QUEUE_SIZE = 128  # as QEMU's

#: Connects to the back end of a configuration: at first, and once that is lost.
Connect = Callable[[VhostUserConfig], BackEnd]


class VhostUserState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The saved state of such a device: nothing, as nothing is in flight."""


class VirtioVhostUser(VirtioDevice, LogsDirtyPages, HasBackEnd, Unmovable, RefusesCopies, Counts):
    """A device of one of :data:`.types.TYPES`, served by what listens at the configured socket.

    A disk has as many queues as there are ``cpus``, unless the configuration says how many.

    Raises:
        HostError: nobody listens there, or with less than is needed.
    """

    State = VhostUserState

    def __init__(
        self,
        config: VhostUserConfig,
        memory: GuestMemory,
        loop: Loop,
        connect: Connect,
        image: OpenedImage | None = None,
        cpus: int = 1,
    ) -> None:
        self._type = TYPES[config.kind]
        self.kind = config.kind  # type: ignore[misc]
        self.device_id = self._type.device_id  # type: ignore[misc]
        self.class_code = self._type.class_code  # type: ignore[misc]
        self._memory = memory
        back_end = connect(config)
        try:
            #: Queues for requests.
            self._requests = config.queues or self._by_vcpu(back_end, cpus)
            count = self._requests + self._type.more_queues
            super().__init__(config.id, 0, [Virtqueue(memory, _QUEUE_SIZE) for _ in range(count)])
            self._given = config
            self._config = self._open(back_end)
        except BaseException:
            back_end.close()
            raise
        self._image = image
        self.on_back_end: Callable[[str | None], None] = lambda why: None
        self.on_requests_lost: Callable[[], None] = lambda: None
        self._inflight: Inflight | None = None
        #: The queues' positions are known: not while requests may be in flight.
        self._known = True
        self._serving = False
        lacking = TRANSPORT_FEATURES & ~back_end.features
        self._offered = self._offered & ~lacking | back_end.features & self._type.features
        self._can_log = _logs(back_end)
        self._log = Log(memory.regions[-1].end)
        self._drain = Drain(self.queues)
        self._nobody = eventfd.make()
        again = None if config.serves is not None else lambda: connect(config)
        self._link = Link(back_end, again, self, loop, self.lock)

    def _by_vcpu(self, back_end: BackEnd, cpus: int) -> int:
        """Return a queue for each vCPU, as far as a back end of a disk has and the guest may."""
        if not self._type.features & back_end.features & F_MQ:
            return 1
        return max(1, min(cpus, MAX_QUEUES, self._most(back_end)))

    def _most(self, back_end: BackEnd) -> int:
        """Return how many queues a back end has, which is one for requests if it does not say."""
        most = back_end.queues()
        return 1 + self._type.more_queues if most is None else most

    def _open(self, back_end: BackEnd) -> bytes:
        """Give a back end the guest's memory, and return the configuration space.

        Raises:
            HostError: the back end cannot serve this device.
        """
        most = self._most(back_end)
        if most < len(self.queues):
            raise HostError(f"it has {most} queues, and {len(self.queues)} are wanted")
        if not back_end.features & F_VERSION_1:
            raise HostError("it does not know virtio 1 (VIRTIO_F_VERSION_1)")
        if self._memory.fd is None:
            raise HostError("the guest's RAM is not shared")
        regions = [(r.start, r.size, r.host, r.offset) for r in self._memory.regions]
        back_end.set_memory(self._memory.fd, regions)
        return self._type.config(self._given, self._requests, back_end)

    def parts(self) -> Sequence[object]:
        """Return the device, and its image if that is opened and closed."""
        return (self,) if self._image is None else (self, self._image)

    def properties(self) -> Mapping[str, str | int | None]:
        """Return the number of queues, and what the type's configuration space has."""
        return {"queues": self._requests, **self._type.properties(self._config)}

    def counters(self) -> Mapping[str, int]:
        """Return how often a back end was lost."""
        return {"losses": self._link.losses}

    def unmovable(self, into_file: bool) -> str | None:
        """Return why the guest has to stay: what is served, or a back end that cannot log."""
        given = self._given
        if given.kind == "vhost-user-fs":
            return (
                f"'{self.id}' is a share (tag '{given.tag}'), whose open files are this host's; "
                "run the guest without it to migrate or save the guest"
            )
        if isinstance(given.serves, ImageFile) and given.serves.server:
            return (
                f"'{self.id}' is a disk of an NBD server ('{given.serves.path}'), and nothing "
                "keeps two hosts from writing it; make it a file that both hosts reach to migrate "
                "the guest"
            )
        if given.serves is not None and (self._image is None or into_file):
            return (
                f"'{self.id}' is a disk image that a process of this host has open "
                f"('{given.serves.path}'); make it raw (qemu-img convert -O raw) to "
                + ("save the guest" if into_file else "migrate the guest")
            )
        if self._link.back_end is None and given.serves is not None:
            return (
                f"the program behind '{self.id}' has ended, and a VM in its sandbox starts none; "
                "quit the VM, and boot the guest anew"
            )
        if self._link.back_end is None:
            return f"the back end of '{self.id}' is gone; start it again first"
        if not self._can_log:
            return f"the back end of '{self.id}' does not log what it writes (VHOST_F_LOG_ALL)"
        return None

    def why_no_copy(self) -> str | None:
        """Refuse a copy of the guest that finds its disk as the guest went on to write it."""
        if self._offered & F_RO:
            return None
        return (
            f"the guest goes on writing what the back end of '{self.id}' has, and its copy would "
            "find that with another memory"
        )

    # --- VirtioDevice -----------------------------------------------------------------------------
    def config(self) -> bytes:
        """Return the device's configuration, which the guest cannot write."""
        return self._config

    def start(self) -> None:
        """Have the back end serve the queues, now or when there is one."""
        if self.started:
            return
        if not self._enabled():
            raise GuestError("the driver is ready, but set up no queue")
        if self._known:  # a back end goes on from the used index, which the guest can write
            self._drain.check((at, self.queues[at].last_avail) for at in self._enabled())
        self.started = True
        if self._drain.waiting:
            self._drain.end()  # the back end goes on, as a pause came to nothing
        else:
            self._ask(self._begin)

    def stop(self) -> None:
        """Have no more work done, but what is available already."""
        if self.started:
            self.started = False
            if self._serving:
                self._drain.begin(self._enabled())
                self._kick()  # what the guest had no time to notify
                self._drained()

    def stopped(self, timeout: float) -> bool:
        """Wait until what is available is done, at most ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while not self._drained():
            left = until - time.monotonic()
            if left <= 0:
                return self._give_up()
            self._drain.sleep(left)
        return True

    def _drained(self) -> bool:
        """Take the queues back once all is done, and return whether so."""
        with self.lock:
            if self._drain.waiting:
                if not self._drain.is_over():
                    return False
                self._ask(self._take_back)
            return True

    def _take_back(self, back_end: BackEnd) -> None:
        positions = {index: back_end.stop_ring(index) for index in self._enabled()}
        self._serving, self._known = False, True
        self._drain.end()
        for index, position in positions.items():
            self.queues[index].resync_used()
            self.queues[index].last_avail = position
        with self.guarded():
            self._drain.check(positions.items())

    def _give_up(self) -> bool:
        with self.lock:
            hopeless = self._drain.is_hopeless()
            if hopeless:
                self._link.lose("it does not finish its requests")
            return hopeless

    def reset(self) -> None:
        """Forget what was in flight."""
        self._drain.end()
        self._known = True
        self._drop_inflight()

    def vector_changed(self, index: int) -> None:
        """Interrupt by another eventfd for a queue."""
        if self._serving:
            self._ask(lambda back_end: back_end.set_call(index, self._call_fd(index)))

    def close(self) -> None:
        """Give the back end and all else back."""
        with self.lock:
            self._link.close()
            self._drop_inflight()
            self._log.close()
            if self._image is not None:
                self._image.close()
            if self._nobody >= 0:
                os.close(self._nobody)
                self._nobody = -1

    def save(self) -> VhostUserState:
        """Return the (empty) saved state.

        Raises:
            HostError: requests are in flight which a lost back end had taken.
        """
        if not self._known:
            raise HostError(
                f"the back end of '{self.id}' is gone with requests in flight; start it again"
            )
        return VhostUserState()

    def load(self, state: VhostUserState) -> None:
        """Take over a saved state, which is empty."""

    # --- the back end -----------------------------------------------------------------------------
    def _enabled(self) -> list[int]:
        return [index for index, queue in enumerate(self.queues) if queue.enabled]

    def _ask(self, act: Callable[[BackEnd], None]) -> None:
        """Have the back end do something, if there is one, and give up a failing one."""
        back_end = self._link.back_end
        if back_end is not None:
            try:
                back_end.begin()
                act(back_end)
            except HostError as error:
                self._link.lose(str(error))

    def _begin(self, back_end: BackEnd) -> None:
        """Hand the queues over, whose positions are known."""
        self._serving, self._known = True, False  # from here on requests may be in flight
        if self._log.on:
            self._set_log(back_end)
        back_end.set_features(self._features())
        if self._inflight is None:
            self._inflight = back_end.make_inflight(len(self.queues), _QUEUE_SIZE)
        if self._inflight is not None:
            back_end.set_inflight(self._inflight, len(self.queues), _QUEUE_SIZE)
        for index in self._enabled():
            queue = self.queues[index]
            parts = self._parts(queue)
            kick = self.transport.kick_fd(index)
            back_end.start_ring(index, queue.size, queue.last_avail, parts, kick)
            if self._log.on:
                back_end.set_addresses(index, parts, True, queue.used)
            back_end.set_call(index, self._call_fd(index))
        back_end.enable(self._enabled())

    def _kick(self) -> None:
        for index in self._enabled():
            os.eventfd_write(self.transport.kick_fd(index), 1)

    def _call_fd(self, index: int) -> int:
        """Return the eventfd of a queue's interrupt, or one that interrupts nobody.

        libvhost-user gives up where it has none to signal.
        """
        fd = self.transport.queue_fd(index)
        return fd if fd >= 0 else self._nobody

    def _features(self) -> int:
        return self.negotiated | (F_LOG_ALL if self._log.on else 0)

    def _parts(self, queue: Virtqueue) -> tuple[int, int, int]:
        """Return the addresses of descriptors, used and avail ring in this process."""
        places = (queue.desc, queue.used, queue.avail)
        desc, used, avail = (address_of(self._memory.view(place, 1)) for place in places)
        return desc, used, avail

    def lost(self, why: str) -> None:
        """Wait for another back end."""
        self._serving = False
        self._drain.end()
        if not self._known:
            self._known = all(self.queues[index].settle() for index in self._enabled())
        self.on_back_end(why)

    def found(self, back_end: BackEnd) -> None:
        """Have another back end go on.

        Raises:
            HostError: this one cannot do what the guest was offered.
        """
        config = self._open(back_end)
        lacking = self._offered & ~back_end.features
        if lacking:
            raise HostError(f"it lacks the features {lacking:#x}")
        self._can_log = _logs(back_end)
        self._check_log()
        self.on_back_end(None)
        self._set_config(config)
        with self.guarded("back end"):
            if not self._known and not self._find_positions():
                if self.transport.need_reset():
                    self.on_requests_lost()
            elif self.started:
                self._ask(self._begin)
                self._kick()

    def config_changed(self, back_end: BackEnd) -> None:
        """Show the guest what has changed.

        Raises:
            HostError: the back end does not give it.
        """
        self._set_config(self._type.config(self._given, self._requests, back_end))

    def _set_config(self, config: bytes) -> None:
        if config != self._config:
            self._config = config
            self.transport.signal_config()

    def _find_positions(self) -> bool:
        """Find where to go on after a loss: the record knows, or the order of the rings.

        Returns False if nobody knows which requests were in flight.
        """
        found = [self.queues[index].go_on_behind_used() for index in self._enabled()]
        self._known = all(found) or self._inflight is not None
        return self._known

    def _drop_inflight(self) -> None:
        inflight, self._inflight = self._inflight, None
        if inflight is not None:
            os.close(inflight.fd)

    # --- the dirty log ----------------------------------------------------------------------------
    def start_log(self) -> None:
        """Have the back end log what it writes from now on, in the middle of work too."""
        with self.lock:
            self._log.take_both()
            self._log.on = True
            self._apply_log()

    def take_log(self) -> bytes:
        """Have the back end log elsewhere, and return the bits until then."""
        with self.lock:
            if not self._serving:
                return self._log.take_both()
            self._log.swap()
            self._ask(self._set_log)
            return self._log.take_idle()

    def stop_log(self) -> None:
        """Have the back end log no more."""
        with self.lock:
            self._log.on = False
            self._apply_log()

    def _check_log(self) -> None:
        """Refuse a back end whose writes a migration would miss.

        Raises:
            HostError: it cannot log, and has to.
        """
        if self._log.on and not self._can_log:
            raise HostError(
                "it does not log what it writes (VHOST_F_LOG_ALL), while the guest migrates"
            )

    def _set_log(self, back_end: BackEnd) -> None:
        self._check_log()
        back_end.set_log(self._log.fd, self._log.size)

    def _apply_log(self) -> None:
        """Have the back end log, or no longer, if there are queues to serve."""
        if self._serving:
            self._ask(self._set_logging)

    def _set_logging(self, back_end: BackEnd) -> None:
        if self._log.on:
            self._set_log(back_end)
        back_end.set_features(self._features())
        for index in self._enabled():
            queue = self.queues[index]
            back_end.set_addresses(index, self._parts(queue), self._log.on, queue.used)
        back_end.settle()  # what is written from now on is logged


def _logs(back_end: BackEnd) -> bool:
    return bool(back_end.features & F_LOG_ALL and back_end.protocol & P_LOG_SHMFD)
