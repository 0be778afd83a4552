"""The events: names, and which of them a transition of the run state causes.

STOP, RESUME, RESET, SHUTDOWN and MIGRATION are QEMU's (qapi/run-state.json, qapi/migration.json).
RUN_STATE is Godwit's own, with ``{"from", "to"}``, sent for each transition before the others:
clients take events they do not know as they come, so it needs no prefix.
"""

from __future__ import annotations

from enum import StrEnum

from godwit.spec.runstate import LIVE, RunState

STOP = "STOP"
RESUME = "RESUME"
RESET = "RESET"
SHUTDOWN = "SHUTDOWN"
MIGRATION = "MIGRATION"
RUN_STATE = "RUN_STATE"
NIC_RX_FILTER_CHANGED = "NIC_RX_FILTER_CHANGED"

Event = tuple[str, dict[str, object]]


class Reason(StrEnum):
    """Why a VM shuts down or is reset: QEMU's ShutdownCause, those that happen here."""

    HOST_ERROR = "host-error"
    HOST_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"
    HOST_UI = "host-ui"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"

    @property
    def by_guest(self) -> bool:
        """Whether the guest wanted it so."""
        return self.value.startswith("guest-")


def shutdown(reason: Reason) -> Event:
    """The VM is about to end."""
    return SHUTDOWN, {"guest": reason.by_guest, "reason": reason.value}


def migration(status: str) -> Event:
    """A move has come to ``status``: setup, active, device, completed, failed, cancelled."""
    return MIGRATION, {"status": status}


def rx_filter_changed(nic: str) -> Event:
    """A guest changed a NIC's receive filter; once until query-rx-filter (qapi/net.json)."""
    return NIC_RX_FILTER_CHANGED, {"name": nic, "path": f"/machine/{nic}"}


def of_transition(old: RunState, new: RunState) -> list[Event]:
    """What clients hear of a transition, in order."""
    events: list[Event] = [(RUN_STATE, {"from": old.value, "to": new.value})]
    if new in LIVE:
        events.append((RESUME, {}))
    elif old in LIVE and new is RunState.PRELAUNCH:
        # A reboot: QEMU tells of the reset, not of the instant that the vCPUs stand still.
        events.append((RESET, {"guest": True, "reason": Reason.GUEST_RESET.value}))
    elif old in LIVE:
        events.append((STOP, {}))
    return events
