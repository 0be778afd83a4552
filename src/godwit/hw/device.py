"""The device interface: one lifecycle for all devices, and the capabilities that some have.

A device is made with its :class:`Slot`, so that a half-made one does not exist. A machine drives
all of its devices the same way (:mod:`godwit.machine.machine`), and finds those that can do more by
``machine.devices.having(Capability)``. A capability is a class of its own; the object that has the
capability is the device, or one of its :meth:`Device.parts` (a virtio device behind its transport,
a backend).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, TypeVar

import msgspec

from godwit.errors import GuestError, HostError, StateError, StreamError
from godwit.host.kvm.handles import Vm
from godwit.host.loop import Loop
from godwit.spec import saved
from godwit.spec.machine_types import MachineType
from godwit.spec.saved import U64

from .irq import IntxLines, Routes
from .memory import GuestMemory

if TYPE_CHECKING:
    from .pci import PciBus

_FIRST_BAR = 0xE000_0000
_BAR_STRIDE = 1 << 20  # space for any device's BAR, aligned to its size
#: I/O BARs: ports above all that a PC has by tradition.
_FIRST_PORT, _PORT_STRIDE = 0xC000, 0x100

#: Receives a device's id and the rule that the guest broke.
OnGuestError = Callable[[str, str], None]


class Slot(NamedTuple):
    """All a device is made from beside its configuration."""

    memory: GuestMemory
    vm: Vm
    routes: Routes
    intx: IntxLines
    pci: PciBus
    loop: Loop
    machine: MachineType
    #: The device's number on the PCI bus, for a device that is plugged in there.
    number: int
    on_guest_error: OnGuestError

    @property
    def bar(self) -> int:
        """The guest address where firmware would put BAR 0."""
        return _FIRST_BAR + (self.number - 1) * _BAR_STRIDE

    @property
    def port(self) -> int:
        """The port where firmware would put an I/O BAR."""
        return _FIRST_PORT + (self.number - 1) * _PORT_STRIDE


class Device(ABC):
    """A device of the machine. vCPUs run only between :meth:`resume` and :meth:`pause`.

    Attributes:
        kind: the device's name in the registry, the stream and error texts.
        id: the device's own name within its machine.
        version: version of :attr:`State`.
        State: the type of the saved state.
    """

    kind: ClassVar[str]
    id: str
    version: ClassVar[int] = 1
    State: ClassVar[Any]

    def properties(self) -> Mapping[str, str | int | None]:
        """Return what the guest sees of the configuration, and a destination must have alike."""
        return {}

    def parts(self) -> Sequence[object]:
        """Return the objects in which capabilities are looked for."""
        return (self,)

    def resume(self) -> None:
        """Serve the guest: its vCPUs are about to run."""

    def pause(self) -> None:
        """Begin to stop serving: the vCPUs have stopped. Work in flight may go on."""

    def paused(self, timeout: float) -> bool:
        """Wait until no work is in flight, at most ``timeout`` seconds, and return whether so.

        Called after :meth:`pause` without any lock, so that workers can finish.
        """
        return True

    @abstractmethod
    def reset(self) -> None:
        """Return to the state after power-on, while paused."""

    @abstractmethod
    def save(self) -> msgspec.Struct:
        """Return the saved state, a :attr:`State`, while paused."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Take over a saved state, a :attr:`State`, while paused.

        Raises:
            StreamError: the device cannot be in the state; the message names the field.
        """

    def close(self) -> None:
        """Give the host's resources back, while paused. Closing twice is harmless."""


@contextmanager
def guarded(report: Callable[[str], None], where: str = "") -> Iterator[None]:
    """Report a guest error that is raised inside, and go on behind the block."""
    try:
        yield
    except GuestError as error:
        report(f"{where}: {error}" if where else str(error))


# --- capabilities --------------------------------------------------------------------------------
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
    """

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
        """Keep the identity that is configured here, whatever the saved one: before the load."""


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


# --- all devices of a machine --------------------------------------------------------------------
#: A device's id or kind in a stream.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class DeviceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device's saved state in a stream, whose ``state`` the kind's own type decodes."""

    id: Name
    kind: Name
    version: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    state: msgspec.Raw


_Capability = TypeVar("_Capability")


class Devices:
    """The devices of a machine, in the order in which they were made."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}
        self._found: dict[Any, list[Any]] = {}

    def add(self, device: Device) -> None:
        """Add a device, whose id is new."""
        assert device.id not in self._devices
        self._devices[device.id] = device
        self._found.clear()

    def __iter__(self) -> Iterator[Device]:
        return iter(self._devices.values())

    def having(self, capability: type[_Capability]) -> list[_Capability]:
        """Return the parts that have a capability, in the devices' order."""
        if capability not in self._found:
            self._found[capability] = [
                part for device in self for part in device.parts() if isinstance(part, capability)
            ]
        return self._found[capability]

    def part(self, device: Device, capability: type[_Capability]) -> _Capability | None:
        """Return the part of a device that has a capability, or None if no part has."""
        return next((part for part in device.parts() if isinstance(part, capability)), None)

    # --- what one VM alone may have ---------------------------------------------------------------
    def acquire(self) -> None:
        """Take what one VM alone may have, or nothing of it.

        Raises:
            HostError: another has it; the message names the device.
        """
        taken: list[OwnsHostState] = []
        for device in self:
            part = self.part(device, OwnsHostState)
            if part is None:
                continue
            try:
                part.acquire()
            except HostError as error:
                for other in taken:
                    other.release()
                raise HostError(f"device '{device.id}': {error}") from error
            taken.append(part)

    def release(self) -> None:
        """Give up what one VM alone may have, while paused.

        Raises:
            HostError: a device cannot; the message names the device, and the guest has to go on.
        """
        for device in self:
            part = self.part(device, OwnsHostState)
            if part is not None:
                try:
                    part.release()
                except HostError as error:
                    raise HostError(f"device '{device.id}': {error}") from error

    def check_copy(self) -> None:
        """Check that a guest that runs on can be in a snapshot as well.

        Raises:
            StateError: a device refuses; the message names the device and why.
        """
        for device in self:
            part = self.part(device, RefusesCopies)
            why = part.why_no_copy() if part is not None else None
            if why is not None:
                raise StateError(
                    f"device '{device.id}': {why}; save the guest without keep-running"
                )

    # --- one lifecycle ----------------------------------------------------------------------------
    def resume(self) -> None:
        """Resume all of the devices."""
        for device in self:
            device.resume()

    def pause(self, timeout: float) -> Device | None:
        """Pause all devices within ``timeout`` seconds, and return the first that is late.

        All begin to stop before any is waited for: one's work may be another's.
        """
        for device in self:
            device.pause()
        return next((device for device in self if not device.paused(timeout)), None)

    def reset(self) -> None:
        """Reset all of the devices."""
        for device in self:
            device.reset()

    def save(self) -> list[DeviceState]:
        """Return the states of all devices."""
        return [
            DeviceState(
                device.id, device.kind, device.version, msgspec.Raw(saved.encode(device.save()))
            )
            for device in self
        ]

    def decode(self, states: Iterable[DeviceState]) -> list[Any]:
        """Return the states of exactly these devices, decoded, in the devices' order.

        Raises:
            StreamError: a device is missing, unknown, there twice, of another kind or version, or
                has a state its kind cannot have; the message names the device.
        """
        given = list(states)
        by_id = {state.id: state for state in given}
        if len(by_id) != len(given):
            raise StreamError("devices: one is there twice")
        unknown = sorted(by_id.keys() - self._devices.keys())
        if unknown:
            raise StreamError(f"devices: {', '.join(map(repr, unknown))} not known here")
        return [self._decode(device, by_id.get(device.id)) for device in self]

    def _decode(self, device: Device, state: DeviceState | None) -> Any:
        if state is None:
            raise StreamError(f"device '{device.id}': missing in the stream")
        for what, theirs, ours in (
            ("kind", state.kind, device.kind),
            ("version", state.version, device.version),
        ):
            if theirs != ours:
                raise StreamError(
                    f"device '{device.id}': {what} {theirs} in the stream, {ours} here"
                )
        try:
            return saved.decode(state.state, device.State)
        except StreamError as error:
            raise StreamError(f"device '{device.id}': {error}") from error

    def load(self, states: Iterable[Any]) -> None:
        """Give all devices the states that :meth:`decode` returned.

        Raises:
            StreamError: a device cannot be in its state; the message names both.
        """
        for device, state in zip(self, states, strict=True):
            try:
                device.load(state)
            except StreamError as error:
                raise StreamError(f"device '{device.id}': {error}") from error
