"""The report of a migration, phase by phase, for query-migrate and the CLI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


class Round(msgspec.Struct, frozen=True):
    """One round over RAM, and the guest's writes meanwhile."""

    pages: int
    zero_pages: int
    ms: float
    bytes: int = 0
    #: Pages that were found dirty at the round's end.
    dirty: int = 0
    #: The time in which pages became dirty, ms: from one look at the dirty log to the next.
    dirty_ms: float = 0.0
    #: The vCPUs' throttle during the round, percent.
    throttle: int = 0

    @property
    def dirty_rate(self) -> int:
        """Pages the guest made dirty, per second, where a page counts once a round."""
        return _per_second(self.dirty, self.dirty_ms)

    def info(self) -> dict[str, Any]:
        """Return the round as query-migrate shows it."""
        info = {"pages": self.pages, "zero-pages": self.zero_pages, "ms": round(self.ms, 3)}
        if self.dirty_ms:  # not the last: the guest stood still
            info |= {"dirty-pages": self.dirty, "dirty-pages-rate": self.dirty_rate}
            info |= {"cpu-throttle-percentage": self.throttle}
        return info


def _per_second(amount: float, ms: float) -> int:
    return round(amount * 1000 / ms) if ms > 0 else 0


class Report(msgspec.Struct):
    """A migration as its source saw it. Times in ms, from the command on.

    ``status`` is QEMU's MigrationStatus: setup, active, device, completed, failed, cancelled.
    """

    #: The migration's clock, seconds.
    now: Callable[[], float]
    ram_total: int = 0
    status: str = "setup"
    error: str | None = None
    ended: float | None = None
    stopped: float | None = None
    rounds: list[Round] = msgspec.field(default_factory=list)
    bytes_sent: int = 0
    remaining: int = 0
    #: The vCPUs' throttle now, percent.
    throttle: int = 0
    expected_ms: float | None = None
    downtime_ms: float | None = None
    #: Name of a phase -> ms since the command, at the phase's end.
    setup_phases: dict[str, float] = msgspec.field(default_factory=dict)
    #: Name of a phase -> ms since the guest stopped, at the phase's end.
    stop_phases: dict[str, float] = msgspec.field(default_factory=dict)
    destination_phases: dict[str, float] = msgspec.field(default_factory=dict)
    destination_runstates: list[str] = msgspec.field(default_factory=list)
    #: The packets that were sent after the guest: see :meth:`.packets.source.PacketSource.info`.
    handover: dict[str, Any] | None = None
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.now()

    def phase(self, phase: str) -> None:
        """Note a phase's end: of the downtime if the guest is stopped, else of the setup."""
        if self.stopped is None:
            self.setup_phases[phase] = round((self.now() - self.started) * 1000, 3)
        else:
            self.stop_phases[phase] = round((self.now() - self.stopped) * 1000, 3)

    def info(self) -> dict[str, Any]:
        """Return QEMU's MigrationInfo for query-migrate, and our own members under ``godwit``."""
        now = self.ended if self.ended is not None else self.now()
        pages = sum(r.pages for r in self.rounds)
        # What QEMU measures several times a second, we do once a round; the stop is none.
        last = next((r for r in reversed(self.rounds) if r.dirty_ms), Round(0, 0, 0.0))
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
                "dirty-pages-rate": last.dirty_rate,
                "pages-per-second": _per_second(last.pages, last.ms),
                "mbps": round(_per_second(last.bytes * 8, last.ms) / 1e6, 3),
                "page-size": 4096,
            },
            "godwit": {
                "rounds": [r.info() for r in self.rounds],
                "setup-phases": self.setup_phases,
                "stop-phases": self.stop_phases,
                "destination-phases": self.destination_phases,
                "destination-runstates": self.destination_runstates,
            },
        }
        if self.handover is not None:
            info["godwit"]["handover"] = self.handover
        if self.throttle:
            info["cpu-throttle-percentage"] = self.throttle
        if self.downtime_ms is not None:
            info["downtime"] = round(self.downtime_ms, 3)
        elif self.expected_ms is not None and self.status != "completed":
            info["expected-downtime"] = round(self.expected_ms, 3)
        if self.error is not None:
            info["error-desc"] = self.error
        return info
