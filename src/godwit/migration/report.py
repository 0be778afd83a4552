"""The report of a migration, phase by phase, for query-migrate and the CLI."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

#: The longest text that is shown, characters: an error may quote a peer's or a client's.
MAX_TEXT = 1000
#: The most phases and run states of a peer's that are shown, and the longest name, characters.
_MAX_NAMES, _MAX_NAME = 64, 64
#: The largest number of milliseconds that is shown, which any client's JSON can hold: RFC 8259, 6.
_MAX_MS = 2.0**53


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
    #: The share of ``bytes_sent`` that was sent while the guest ran, once it stands still.
    bytes_before_stop: int | None = None
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
            if self.bytes_before_stop is None:
                self.bytes_before_stop = self.bytes_sent
            self.stop_phases[phase] = round((self.now() - self.stopped) * 1000, 3)

    def info(self) -> dict[str, Any]:
        """Return QEMU's MigrationInfo for query-migrate, and finer figures under ``godwit``.

        QEMU's times are whole milliseconds. What came from the peer is bounded here.
        """
        now = self.ended if self.ended is not None else self.now()
        downtime = self.downtime_ms
        expected = None if downtime is not None or self.status == "completed" else self.expected_ms
        setup = None if self.status == "setup" else max(self.setup_phases.values(), default=None)
        fine = _numbers(
            {
                "total-ms": (now - self.started) * 1000,
                "setup-ms": setup,
                "downtime-ms": downtime,
                "expected-downtime-ms": expected,
            }
        )
        info: dict[str, Any] = {"status": self.status, "ram": self._ram()}
        for name, member in _WHOLE.items():
            if name in fine:
                info[member] = round(fine[name])
        if self.throttle:
            info["cpu-throttle-percentage"] = self.throttle
        if self.error is not None:
            info["error-desc"] = _short(self.error, MAX_TEXT)
        info["godwit"] = {
            **fine,
            "rounds": [r.info() for r in self.rounds],
            "setup-phases": self.setup_phases,
            "stop-phases": self.stop_phases,
            "destination-phases": _numbers(self.destination_phases),
            "destination-runstates": _texts(self.destination_runstates),
        }
        if self.handover is not None:
            info["godwit"]["handover"] = self.handover
        return info

    def _ram(self) -> dict[str, Any]:
        """Return QEMU's MigrationStats, of which 7.2 has all as mandatory."""
        pages = sum(r.pages for r in self.rounds)
        # What QEMU measures several times a second, we do once a round; the stop is none.
        last = next((r for r in reversed(self.rounds) if r.dirty_ms), Round(0, 0, 0.0))
        before_stop = self.bytes_before_stop
        precopy = self.bytes_sent if before_stop is None else before_stop
        return {
            "transferred": self.bytes_sent,
            "total": self.ram_total,
            "remaining": self.remaining,
            "normal": pages,
            "normal-bytes": pages * _PAGE,
            "duplicate": sum(r.zero_pages for r in self.rounds),
            "dirty-sync-count": len(self.rounds),
            "dirty-pages-rate": last.dirty_rate,
            "pages-per-second": _per_second(last.pages, last.ms),
            "mbps": round(_per_second(last.bytes * 8, last.ms) / 1e6, 3),
            "page-size": _PAGE,
            "precopy-bytes": precopy,
            "downtime-bytes": self.bytes_sent - precopy,
            **_NOT_HERE,
        }


_PAGE = 4096
#: Members of MigrationStats whose feature Godwit has not.
_NOT_HERE = dict.fromkeys(
    (
        "skipped",
        "postcopy-requests",
        "postcopy-bytes",
        "multifd-bytes",
        "dirty-sync-missed-zero-copy",
    ),
    0,
)
#: A figure's name -> the member of MigrationInfo that has it in whole milliseconds.
_WHOLE = {
    "total-ms": "total-time",
    "setup-ms": "setup-time",
    "downtime-ms": "downtime",
    "expected-downtime-ms": "expected-downtime",
}


def _numbers(named: Mapping[str, float | None]) -> dict[str, float]:
    """Return the finite numbers, with three digits: a peer may send NaN, or infinity."""
    return {
        _short(name, _MAX_NAME): round(value, 3)
        for name, value in list(named.items())[:_MAX_NAMES]
        if value is not None and math.isfinite(value) and abs(value) <= _MAX_MS
    }


def _texts(texts: Sequence[str]) -> list[str]:
    return [_short(text, _MAX_NAME) for text in texts[:_MAX_NAMES]]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
