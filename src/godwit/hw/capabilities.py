"""The capabilities that some devices have, each a class of its own.

A machine finds them by ``machine.devices.having(Capability)``. The object that has a capability is
the device, or one of its :meth:`.device.Device.parts` (a virtio device behind its transport, a
backend).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, NamedTuple

import msgspec

from godwit.spec.saved import U64


class LogsDirtyPages(ABC):
    """A part that writes guest memory behind both KVM's and the VMM's back."""

    @abstractmethod
    def start_log(self) -> None:
        """Log written pages from now on, also in the middle of traffic."""

    @abstractmethod
    def take_log(self) -> bytes:
        """Return the bitmap since the last call: a bit per 4 KiB page, little endian."""

    @abstractmethod
    def stop_log(self) -> None:
        """Log no more written pages."""


class Negotiates(ABC):
    """A part whose features the guest chooses from."""

    @property
    @abstractmethod
    def offered(self) -> int:
        """Feature bits the guest may use."""

    @property
    @abstractmethod
    def negotiated(self) -> int:
        """Feature bits the guest uses now."""


_Queue = Annotated[int, msgspec.Meta(ge=0, lt=64)]


class SetupHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parts of a device's state that seldom change, and take the kernel long to set up.

    A source sends the hints before the guest stops, so that its destination has the set-up in place
    by then. Hints are a guess: the state that comes in the downtime counts, and what differs from
    the hints is set up anew.
    """

    #: Guest address of BAR 0; 0: not mapped.
    bar: Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
    #: Queues that are notified.
    queues: Annotated[list[_Queue], msgspec.Meta(max_length=64)]
    #: The MSI-X table.
    table: Annotated[bytes, msgspec.Meta(max_length=16 * 64)]
    #: Feature bits that the guest uses.
    features: U64


class HasSetupHints(ABC):
    """A part whose set-up is slow enough to be begun before a guest arrives."""

    @abstractmethod
    def hints(self) -> SetupHints:
        """Return what a destination may set up before this device stops, from any thread."""

    @abstractmethod
    def prepare(self, hints: SetupHints) -> None:
        """Set up what a device like that needs, while paused.

        Hints are a guess of the source's: :meth:`Device.load` counts. What the kernel refuses is
        left out.
        """


class Renews(ABC):
    """A part by which a guest learns that it is a copy: it was restored from a file."""

    @abstractmethod
    def renew(self) -> None:
        """Notify the guest, while paused, after :meth:`Device.load`."""


class OwnsHostState(ABC):
    """A part with what one VM alone may have, as an image's lock: it goes over with the guest.

    A cold boot acquires it. A source releases it right before COMMIT, a destination acquires it at
    COMMIT, and a source whose guest stays acquires it again.

    Attributes:
        last: to give it up and take it back has effects of its own, so all others come first.
    """

    last = False

    @abstractmethod
    def sync(self) -> None:
        """Do ahead what would make :meth:`release` long, while the guest runs or is paused."""

    @abstractmethod
    def release(self) -> None:
        """Give it up, while paused: the guest may run elsewhere. Releasing twice is harmless.

        Raises:
            HostError: what the guest was promised to be kept is not: it has to go on here.
        """

    @abstractmethod
    def acquire(self) -> None:
        """Take it, while paused, before the guest runs here. Acquiring twice is harmless.

        Raises:
            HostError: another has it; the message names what, and the remedy.
        """


class ChecksKept(ABC):
    """A part that must be as it was when the guest was saved into a file."""

    @abstractmethod
    def check_kept(self) -> None:
        """Refuse a guest that comes from a file, after :meth:`Device.load`, if it does not fit.

        Raises:
            HostError: going on would harm what the guest keeps here; the message has the remedy.
        """


class HasFile(ABC):
    """A part whose content is a file of the host's, which nothing may replace meanwhile."""

    @abstractmethod
    def is_file(self, device: int, inode: int) -> bool:
        """Return whether the file is this one: the numbers of its file system and its inode."""


class IoError(NamedTuple):
    """An error of the host's that a device met while it did what the guest wanted."""

    device: str
    #: read or write
    operation: str
    #: What is done: the error is reported to the guest, or the VM stops.
    action: str
    nospace: bool
    reason: str


class ReportsIoErrors(ABC):
    """A part that meets errors of the host's, for which the VM may have to stop."""

    #: Called with each error, under the device's lock, from any thread.
    on_io_error: Callable[[IoError], None]


class ReservesAhead(ABC):
    """A part that can be sure before the guest stops of what it will acquire, as a guest's CID."""

    @abstractmethod
    def follow(self, properties: Mapping[str, str | int | None]) -> None:
        """Take over from the source's properties what the configuration here leaves open."""

    @abstractmethod
    def reserve(self, same_host: bool) -> None:
        """Make sure of a later :meth:`OwnsHostState.acquire`.

        With ``same_host`` the source runs on this very kernel, and is the holder until the release.

        Raises:
            HostError: another has it; the message names what, and the remedy.
        """


class Relocatable(ABC):
    """A part some of whose surroundings stay behind when the guest comes from elsewhere."""

    @abstractmethod
    def relocated(self) -> None:
        """Have the guest learn so when it runs next, while paused, after :meth:`Device.load`."""


class HasIdentity(ABC):
    """A part with an identity on the host or in the network, which a copy of a guest cannot share.

    Attributes:
        identity: the names of the properties in which a copy differs.
    """

    identity: ClassVar[frozenset[str]]

    def be_copy(self) -> None:
        """Keep the identity that is configured here, whatever the saved one: before the load.

        Raises:
            StreamError: the part cannot be a copy's.
        """


class RefusesCopies(ABC):
    """A part of which two guests may be worse off than one: of the guest itself, and of a copy."""

    @abstractmethod
    def why_no_copy(self) -> str | None:
        """Return why no snapshot may be taken of a guest that runs on, or None if one may."""


class HasBackEnd(ABC):
    """A part whose work another process does, which may end and come back."""

    #: Called with the reason when the process is lost, and with None once it is back, from any
    #: thread and perhaps under the device's lock.
    on_back_end: Callable[[str | None], None]
    #: Called likewise when another is there, and nobody knows which requests were in flight: the
    #: device has stopped, and needs a reset by its driver.
    on_requests_lost: Callable[[], None]


class Unmovable(ABC):
    """A part that may tie its guest to this host."""

    @abstractmethod
    def unmovable(self, into_file: bool) -> str | None:
        """Return why the guest cannot migrate, or be saved ``into_file``, and the remedy."""


class Counts(ABC):
    """A part that counts what it does."""

    @abstractmethod
    def counters(self) -> Mapping[str, int]:
        """Return the counters since the device was made, from any thread."""
