"""The events: one table of names, meanings and data, and builders for those that need some thought.

STOP, RESUME, RESET, SHUTDOWN, POWERDOWN, MIGRATION, NIC_RX_FILTER_CHANGED and BLOCK_IO_ERROR are
QEMU's (qapi/run-state.json, migration.json, net.json, block-core.json); the others are Godwit's
own. Clients take events they do not know as they come, so the own ones need no prefix.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from .runstate import LIVE, RunState

#: An event and its data, ready to be sent.
Message = tuple["Event", dict[str, object]]


class Event(StrEnum):
    """Every event: its name, its meaning, and the members of its data.

    Attributes:
        meaning: one line for people.
        members: the names of the members, all of which are always there.
    """

    meaning: str
    members: tuple[str, ...]

    def __new__(cls, name: str, meaning: str, *members: str) -> Self:
        self = str.__new__(cls, name)
        self._value_ = name
        self.meaning = meaning
        self.members = members
        return self

    RUN_STATE = "RUN_STATE", "the run state changed; before the events below", "from", "to"
    STOP = "STOP", "the guest stands still"
    RESUME = "RESUME", "the guest runs"
    RESET = "RESET", "the guest reboots", "guest", "reason"
    SHUTDOWN = "SHUTDOWN", "the VM is about to end", "guest", "reason"
    MIGRATION = "MIGRATION", "a migration has come to a status", "status"
    NIC_RX_FILTER_CHANGED = (
        "NIC_RX_FILTER_CHANGED",
        "the guest changed a NIC's filter or MAC; once until query-rx-filter",
        *("name", "path"),
    )
    NIC_TAP_LOST = (
        "NIC_TAP_LOST",
        "a NIC's tap was deleted: the guest runs on, and has no network until it moves",
        *("nic", "tap"),
    )
    NIC_OPENED = (
        "NIC_OPENED",
        "a copy of a guest (--clone) uses an address of its own on the NIC, and is announced",
        *("nic", "mac"),
    )
    NIC_TAP_ANEW = (
        "NIC_TAP_ANEW",
        "an interface has the name of a tap that was lost; the NIC is not attached to it",
        *("nic", "tap"),
    )
    GUEST_PANICKED = (
        "GUEST_PANICKED",
        "the guest reported a panic, and what is done: exit, pause, reboot or run",
        "action",
    )
    GUEST_CRASHLOADED = (
        "GUEST_CRASHLOADED",
        "the guest reported a panic, and goes on in a kernel that saves a dump",
        "action",
    )
    GUEST_ERROR = (
        "GUEST_ERROR",
        "the guest broke a device's rules: the device stopped, and needs a reset by its driver; "
        "so many more were not reported since the last",
        *("device", "message", "suppressed"),
    )
    BLOCK_IO_ERROR = (
        "BLOCK_IO_ERROR",
        "a disk met an error of the host's; the guest is told, or the VM stops until its cont",
        *("device", "operation", "action", "nospace", "reason"),
    )
    BACK_END_LOST = (
        "BACK_END_LOST",
        "the process that served a device is gone; the device waits for another at its socket",
        *("device", "why"),
    )
    BACK_END_BACK = "BACK_END_BACK", "a process serves the device again", "device"
    BACK_END_REQUESTS_LOST = (
        "BACK_END_REQUESTS_LOST",
        "the process that served a device was lost with requests of the guest's, of which it kept "
        "no record: the device stopped, and needs a reset by its driver",
        "device",
    )
    POWERDOWN = "POWERDOWN", "the power button was pressed, which the guest may ignore"
    EVENTS_LOST = (
        "EVENTS_LOST",
        "so many events of one kind were left out for this client, which did not read in time",
        *("event", "count"),
    )
    ANNOUNCE_STARTED = (
        "ANNOUNCE_STARTED",
        "an announcement has begun",
        *("id", "nics", "rounds"),
    )
    ANNOUNCE_HELD = "ANNOUNCE_HELD", "the NIC's port is not ready", "nic", "cause"
    ANNOUNCE_ACKED = (
        "ANNOUNCE_ACKED",
        "the guest acknowledged for the first time, so long after the request",
        *("nic", "ms"),
    )
    ANNOUNCE_SEEN = (
        "ANNOUNCE_SEEN",
        "the guest announced an address for the first time in this announcement",
        *("nic", "mac", "vlans", "ip", "kind", "ms"),
    )
    ANNOUNCE_TIMEOUT = (
        "ANNOUNCE_TIMEOUT",
        "no acknowledgement came in time, for the first or second time",
        *("nic", "asked"),
    )
    ANNOUNCE_HOST = (
        "ANNOUNCE_HOST",
        "the host announced in the guest's name",
        *("nic", "round", "frames", "why"),
    )
    ANNOUNCE_VERIFIED = "ANNOUNCE_VERIFIED", "the network knows where the guest is", "nic", "ms"
    ANNOUNCE_UNVERIFIED = (
        "ANNOUNCE_UNVERIFIED",
        "a warning: the network was not found to know, and nothing more is tried",
        *("nic", "what"),
    )
    ANNOUNCE_UNPROVED = (
        "ANNOUNCE_UNPROVED",
        "a warning: no answer showed that the network passes the guest's frames; no more is tried",
        *("nic", "what"),
    )
    ANNOUNCE_FAILED = (
        "ANNOUNCE_FAILED",
        "a round failed in part; with an empty 'nic', the announcement itself",
        *("nic", "round", "cause"),
    )

    def of(self, **data: object) -> Message:
        """Return this event with its data.

        Raises:
            TypeError: the members are not those of the table.
        """
        if set(data) != set(self.members):
            raise TypeError(f"{self} has {', '.join(self.members)}; not {', '.join(data)}")
        return self, data


class MigrationStatus(StrEnum):
    """The statuses of QEMU's MigrationStatus (qapi/migration.json) that a migration has here."""

    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Reason(StrEnum):
    """The reasons for a shutdown or reset: those of QEMU's ShutdownCause that happen here."""

    HOST_ERROR = "host-error"
    HOST_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"

    @property
    def by_guest(self) -> bool:
        """Return whether the guest wanted it so."""
        return self.value.startswith("guest-")


#: The type of each member, by its name, for query-qmp-schema; the others are text.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("asked", "count", "frames", "round", "rounds", "suppressed"), int),
    **dict.fromkeys(("from", "to"), RunState),
    **dict.fromkeys(("nics", "what"), list[str]),
    "guest": bool,
    "nospace": bool,
    "ip": str | None,
    "ms": float,
    "reason": Reason,
    "status": MigrationStatus,
    "vlans": list[dict[str, int]],
}


def type_of(event: Event, member: str) -> Any:
    """Return the type of a member of an event's data."""
    if event is Event.BLOCK_IO_ERROR and member == "reason":
        return str  # the host's words, as in QEMU
    return _TYPES.get(member, str)


def shutdown(reason: Reason) -> Message:
    """Return the event of a VM that is about to end."""
    return Event.SHUTDOWN.of(guest=reason.by_guest, reason=reason.value)


def migration(status: str) -> Message:
    """Return the event of a status: setup, active, device, completed, failed or cancelled."""
    return Event.MIGRATION.of(status=status)


def rx_filter_changed(nic: str) -> Message:
    """Return the event of a receive filter a guest changed."""
    return Event.NIC_RX_FILTER_CHANGED.of(name=nic, path=f"/machine/{nic}")


def guest_reset() -> Message:
    """Return the event of a reboot at the guest's request."""
    return Event.RESET.of(guest=True, reason=Reason.GUEST_RESET.value)


def of_transition(old: RunState, new: RunState) -> list[Message]:
    """Return the events a transition of the run state causes, in order."""
    events = [Event.RUN_STATE.of(**{"from": old.value, "to": new.value})]
    if new in LIVE:
        events.append(Event.RESUME.of())
    elif old in LIVE and new is RunState.PRELAUNCH:
        # A reboot: QEMU reports the reset, not the instant that the vCPUs stand still.
        events.append(guest_reset())
    elif old in LIVE:
        events.append(Event.STOP.of())
    return events
