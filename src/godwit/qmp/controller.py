"""The VM as the commands need it, feature by feature, for the VM to implement.

All methods are called in the event loop's thread and do not wait for a peer: a migration is
started, and its end is reported by events. ``stop`` waits for vCPUs and devices, bounded. Refusals
are GodwitErrors, and their text is what the operator reads. The run state was looked at before the
call, but other threads may have changed it since: the table of transitions decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from godwit.hw.nic.nic import RxFilterInfo
from godwit.spec.parameters import AnnounceParameters, MigrationParameters
from godwit.spec.runstate import RunStates


class VmController(Protocol):
    """The VM's life, and the guest's, in an operator's hands."""

    @property
    def states(self) -> RunStates:
        """The run state of the VM, with its history."""

    def stop(self) -> None:
        """Pause a guest that runs."""

    def cont(self) -> None:
        """Start or resume a guest: from ``prelaunch``, ``prelaunch-migrate`` or ``paused``."""

    def powerdown(self) -> None:
        """Press the power button, which the guest may ignore."""

    def vcpu_threads(self) -> list[int]:
        """Return the thread's id of each vCPU, as the kernel has it."""

    def ram_size(self) -> int:
        """Return the size of the guest's RAM in bytes."""

    def quit(self) -> None:
        """End the VM soon, whatever its state, but after the reply to this command."""


class MigrationController(Protocol):
    """The guest's migrations, in and out, and their parameters."""

    #: The operator's parameters; replaced as a whole.
    parameters: MigrationParameters

    def migrate(self, uri: str, insecure: bool) -> None:
        """Start the guest's migration to ``uri``.

        Raises:
            ConfigError: the URI is wrong, or leaves this host without ``insecure``.
            StateError: a migration is under way, or the guest is dead.
            The rest is reported by events: a MIGRATION with status failed, and why in
                query-migrate.
        """

    def migrate_incoming(self, uri: str, insecure: bool) -> None:
        """Wait for a guest at ``uri``, for a VM that was started with 'defer'.

        Raises:
            ConfigError: the URI is wrong, or is open to others without ``insecure``.
            StateError: the VM waits already.
        """

    def save(self, path: str, keep_running: bool, compress: str) -> None:
        """Start a save of the guest into the file at ``path``, with or without a compression.

        Raises:
            ConfigError: the path is wrong, or there is no such compression.
            StateError: a migration is under way, the guest is dead, or a device may be in no
                snapshot of a guest that runs on.
            The rest is reported by events, as of a migration.
        """

    def migration_info(self) -> dict[str, object]:
        """Return the present or last migration as query-migrate shows it, empty if none was."""

    def migrate_cancel(self) -> None:
        """Give up the present migration, if there is one."""


class AnnounceController(Protocol):
    """The announcements of the guest to its networks."""

    #: The operator's parameters; replaced as a whole.
    parameters: MigrationParameters

    def announce_self(
        self, parameters: AnnounceParameters, interfaces: Sequence[str] | None, id: str | None
    ) -> None:
        """Announce the guest's NICs now.

        Raises:
            ConfigError: there is no NIC of such a name.
        """

    def announce_info(self) -> list[dict[str, object]]:
        """Return what became of each NIC's last announcement, as query-announce shows it."""


class NetworkController(Protocol):
    """The guest's NICs, as its driver set them."""

    def rx_filters(self, name: str | None) -> list[tuple[str, RxFilterInfo]]:
        """Return (NIC, receive filter) of each NIC, or of the one of that name.

        Raises:
            ConfigError: there is no NIC of such a name.
        """


#: (id, kind, counters, properties) of a device, where counters and properties may be none.
DeviceView = tuple[str, str, Mapping[str, int], Mapping[str, str | int | None]]


class DeviceController(Protocol):
    """The part of the VM that knows the machine's devices."""

    def devices(self) -> list[DeviceView]:
        """Return all devices, in the order in which they were made."""


class Controller(
    VmController,
    MigrationController,
    AnnounceController,
    NetworkController,
    DeviceController,
    Protocol,
):
    """A VM as its operator sees it."""
