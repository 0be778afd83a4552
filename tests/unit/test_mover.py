"""What ``godwit migrate`` says while it waits, and in the end."""

from __future__ import annotations

from godwit.cli.migrate import _doing, _table
from godwit.migration.report import Report, Round


def _report() -> Report:
    report = Report(now=time.monotonic, status="active", expected_ms=900.0)
    report.rounds.append(Round(1000, 0, 500.0, 4_100_000, 600, 400.0, 0))
    return report


def test_what_it_does() -> None:
    assert _doing({"status": "setup"}) == "setup"
    assert _doing(Report(now=time.monotonic, status="active").info()) == "active"
    report = _report()
    assert _doing(report.info()) == "active, 1500 pages/s get dirty"
    report.throttle = 20
    assert _doing(report.info()) == "active, 1500 pages/s get dirty, vCPUs throttled by 20 %"
    report.status = "device"
    assert _doing(report.info()) == "device"


def test_the_table_names_the_throttle_if_there_was_one() -> None:
    report = _report()
    report.status, report.downtime_ms = "completed", 170.0
    rows = [list(column.cells) for column in _table(report.info()).columns]
    assert "vCPUs throttled" not in rows[0]
    report.rounds.append(Round(600, 0, 300.0, 2_460_000, 10, 300.0, 30))
    report.rounds.append(Round(10, 0, 0.0))
    rows = [list(column.cells) for column in _table(report.info()).columns]
    assert rows[1][rows[0].index("vCPUs throttled")] == "up to 30 %"
    assert rows[1][rows[0].index("rounds (pages)")] == "1000, 600, 10"
