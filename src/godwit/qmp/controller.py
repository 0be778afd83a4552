"""What the commands need of a VM. The VM implements it; nothing here knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from godwit.announce.schedule import AnnounceOptions, AnnounceParameters
from godwit.hw.nic.rx_filter_info import RxFilterInfo
from godwit.spec.parameters import ConvergenceParameters
from godwit.spec.runstate import RunStates


class Controller(Protocol):
    """A VM as its operator sees it.

    All methods are called in the event loop's thread and must not wait: what takes time (a move)
    is started, and its end is told by events. Refusals are GodwitErrors, and their text is what
    the operator reads. The run state was looked at before the call, but other threads may have
    changed it since: the table of transitions has the last word.
    """

    #: The schedule of the announcement after a move; replaced as a whole.
    announce_parameters: AnnounceParameters
    #: Its deadline, verification and refreshing; replaced as a whole.
    announce_options: AnnounceOptions
    #: The most a move may send, bytes per second; 0 for no limit.
    max_bandwidth: int
    #: For how long a move may stop the guest, ms.
    downtime_limit: int
    #: Whether frames that reach the old host are sent after a guest, at either end of a move.
    handover: bool
    #: What a move does about a guest that writes faster than the line takes; replaced as a whole.
    convergence: ConvergenceParameters

    @property
    def states(self) -> RunStates:
        """The VM's run state."""

    def stop(self) -> None:
        """Pause a running guest."""

    def cont(self) -> None:
        """Start or resume a guest: from ``prelaunch``, ``prelaunch-migrate`` or ``paused``."""

    def powerdown(self) -> None:
        """Press the power button; what the guest makes of it is its own affair."""

    def quit(self) -> None:
        """End the VM soon, whatever its state; the reply to this command still leaves."""

    def migrate(self, uri: str, insecure: bool) -> None:
        """Start moving the guest to ``uri``.

        Raises:
            ConfigError: the URI is wrong, or leaves this host without ``insecure``.
            StateError: a move is under way, or the guest is dead.
            The rest is told by events: a MIGRATION with status failed, and why in query-migrate.
        """

    def migrate_incoming(self, uri: str, insecure: bool) -> None:
        """Wait for a guest at ``uri``, for a VM that was started with 'defer'.

        Raises:
            ConfigError: the URI is wrong, or is open to others without ``insecure``.
            StateError: the VM waits already.
        """

    def migration_info(self) -> dict[str, object]:
        """The present or last move as query-migrate shows it; empty when there was none."""

    def migrate_cancel(self) -> None:
        """Give up the present move; does nothing when there is none."""

    def announce_self(
        self, parameters: AnnounceParameters, interfaces: Sequence[str] | None, id: str | None
    ) -> None:
        """Announce the guest's NICs now.

        Raises:
            ConfigError: there is no NIC of such a name.
        """

    def announce_info(self) -> list[dict[str, object]]:
        """What became of each NIC's last announcement, as query-announce shows it."""

    def rx_filters(self, name: str | None) -> list[tuple[str, RxFilterInfo]]:
        """(NIC, receive filter) of each NIC, or of the one of that name.

        Raises:
            ConfigError: there is no NIC of such a name.
        """
