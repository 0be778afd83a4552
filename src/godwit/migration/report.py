"""What a move did, phase by phase: query-migrate shows it, and the CLI prints it."""

from __future__ import annotations

import time
from typing import Any

import msgspec


class Round(msgspec.Struct, frozen=True):
    """One pass over RAM."""

    pages: int
    zero_pages: int
    ms: float


class Report(msgspec.Struct):
    """A move as its source saw it. Times in ms, from the command on.

    ``status`` is QEMU's MigrationStatus: setup, active, device, completed, failed, cancelled.
    """

    status: str = "setup"
    error: str | None = None
    started: float = msgspec.field(default_factory=time.monotonic)
    ended: float | None = None
    stopped: float | None = None
    rounds: list[Round] = msgspec.field(default_factory=list)
    bytes_sent: int = 0
    ram_total: int = 0
    remaining: int = 0
    downtime_ms: float | None = None
    #: Name of a phase -> ms since the command, at the phase's end.
    setup_phases: dict[str, float] = msgspec.field(default_factory=dict)
    #: Name of a phase -> ms since the guest stopped, at the phase's end.
    stop_phases: dict[str, float] = msgspec.field(default_factory=dict)
    destination_phases: dict[str, float] = msgspec.field(default_factory=dict)
    destination_runstates: list[str] = msgspec.field(default_factory=list)
    #: What was sent after the guest: see :meth:`.forwarder.Forwarder.info`.
    handover: dict[str, Any] | None = None

    def mark(self, phase: str) -> None:
        """A phase ended: of the stop window if the guest is stopped, else of the setup."""
        if self.stopped is None:
            self.setup_phases[phase] = round((time.monotonic() - self.started) * 1000, 3)
        else:
            self.stop_phases[phase] = round((time.monotonic() - self.stopped) * 1000, 3)

    def info(self) -> dict[str, Any]:
        """As query-migrate shows it: QEMU's MigrationInfo members, and our own under ``godwit``."""
        now = self.ended if self.ended is not None else time.monotonic()
        pages = sum(r.pages for r in self.rounds)
        info: dict[str, Any] = {
            "status": self.status,
            "total-time": round((now - self.started) * 1000, 3),
            "ram": {
                "transferred": self.bytes_sent,
                "total": self.ram_total,
                "remaining": self.remaining,
                "normal": pages,
                "duplicate": sum(r.zero_pages for r in self.rounds),
                "dirty-sync-count": len(self.rounds),
                "page-size": 4096,
            },
            "godwit": {
                "rounds": [
                    {"pages": r.pages, "zero-pages": r.zero_pages, "ms": round(r.ms, 3)}
                    for r in self.rounds
                ],
                "setup-phases": self.setup_phases,
                "stop-phases": self.stop_phases,
                "destination-phases": self.destination_phases,
                "destination-runstates": self.destination_runstates,
            },
        }
        if self.handover is not None:
            info["godwit"]["handover"] = self.handover
        if self.downtime_ms is not None:
            info["downtime"] = round(self.downtime_ms, 3)
        if self.error is not None:
            info["error-desc"] = self.error
        return info
