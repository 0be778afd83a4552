"""All devices of a machine: found by capability, driven as one, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec

from godwit.errors import HostError, StateError, StreamError
from godwit.spec import saved

from .capabilities import OwnsHostState, RefusesCopies
from .device import Device

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
        #: The parts whose last acquire or release was an acquire.
        self._held: set[OwnsHostState] = set()

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
        taken: list[tuple[Device, OwnsHostState]] = []
        for device, part in self._owners():
            try:
                part.acquire()
            except HostError as error:
                problems = "".join(f"; {problem}" for problem in self._give_back(taken))
                raise HostError(f"device '{device.id}': {error}{problems}") from error
            if part not in self._held:
                taken.append((device, part))
                self._held.add(part)

    def _owners(self) -> list[tuple[Device, OwnsHostState]]:
        """Return the devices that have what one VM alone may have, in the order of taking it."""
        found = ((device, self.part(device, OwnsHostState)) for device in self)
        owners = [(device, part) for device, part in found if part is not None]
        return sorted(owners, key=lambda owner: owner[1].last)

    def _give_back(self, taken: Iterable[tuple[Device, OwnsHostState]]) -> list[str]:
        """Give up parts, the others as well if one cannot be, and return the errors."""
        problems = []
        for device, part in taken:
            try:
                self._release(device, part)
            except HostError as problem:
                problems.append(f"and then {problem}")
        return problems

    def _release(self, device: Device, part: OwnsHostState) -> None:
        try:
            part.release()
        except HostError as error:
            raise HostError(f"device '{device.id}': {error}") from error
        self._held.discard(part)

    def release(self) -> None:
        """Give up what one VM alone may have, while paused.

        Raises:
            HostError: a device cannot; the message names the device, and the guest has to go on.
        """
        for device, part in self._owners():
            self._release(device, part)

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
