"""The report of a migration as query-migrate shows it: QEMU's integers, and bounded in all."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from godwit.cli.migrate import rows, table
from godwit.migration.report import MAX_TEXT, Report, Round
from qmp_schema_reader import Reader
from test_qmp_commands import Vm, run
from test_qmp_schema import _fits

_BIG = [float("nan"), float("inf"), float("-inf"), 1e308, -1e308]


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _report() -> tuple[Report, _Clock]:
    """A migration that is over, step by step."""
    clock = _Clock()
    report = Report(now=clock, ram_total=256 << 20)
    clock.now += 0.0123
    report.phase("welcomed")
    report.status = "active"
    report.bytes_sent = 5_000_000
    report.rounds.append(Round(1000, 7, 500.4, 4_900_000, 600, 400.0, 20))
    report.expected_ms, report.throttle = 250.6, 20
    return report, clock


def _complete(report: Report, clock: _Clock) -> None:
    report.stopped, report.throttle = clock.now, 0
    clock.now += 0.0054
    report.phase("vcpus-stopped")
    report.rounds.append(Round(10, 0, 0.0))
    report.bytes_sent += 100_000
    report.status, report.downtime_ms, report.ended = "completed", 31.6, clock.now
    report.destination_phases = {"loaded": 1.5, "vcpus-started": 2.25}
    report.destination_runstates = ["inmigrate", "running"]


def _shown(report: Report) -> Any:
    """The report as a QMP client reads it."""
    return json.loads(msgspec.json.encode(report.info()))


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(run(Vm(), "query-qmp-schema"))


def test_qemus_times_are_whole_milliseconds_and_ours_are_finer() -> None:
    report, clock = _report()
    info = _shown(report)
    assert (info["setup-time"], info["expected-downtime"]) == (12, 251)
    assert info["cpu-throttle-percentage"] == 20
    assert "downtime" not in info
    _complete(report, clock)
    info = _shown(report)
    assert (info["total-time"], info["downtime"], info["setup-time"]) == (18, 32, 12)
    assert {"expected-downtime", "cpu-throttle-percentage"} & set(info) == set()
    own = info["godwit"]
    assert (own["total-ms"], own["setup-ms"], own["downtime-ms"]) == (17.7, 12.3, 31.6)
    for name in ("total-time", "downtime", "setup-time"):
        assert type(info[name]) is int
    assert all(type(value) is int for name, value in info["ram"].items() if name != "mbps")


def test_all_that_was_sent_was_sent_before_the_stop_or_after() -> None:
    report, clock = _report()
    ram = _shown(report)["ram"]
    assert (ram["precopy-bytes"], ram["downtime-bytes"]) == (5_000_000, 0)
    _complete(report, clock)
    ram = _shown(report)["ram"]
    assert (ram["precopy-bytes"], ram["downtime-bytes"]) == (5_000_000, 100_000)
    assert ram["transferred"] == 5_100_000
    assert (ram["normal"], ram["normal-bytes"], ram["duplicate"]) == (1010, 1010 * 4096, 7)


def test_each_stage_fits_the_schema(reader: Reader) -> None:
    kind = reader.by_name["query-migrate"]["ret-type"]
    assert _fits(_shown(Report(now=_Clock())), kind, reader)
    report, clock = _report()
    assert _fits(_shown(report), kind, reader)
    _complete(report, clock)
    report.error = "none"
    report.handover = {"packets": 1, "old-paths": [{}]}
    assert _fits(_shown(report), kind, reader)


@pytest.mark.parametrize("number", _BIG)
def test_numbers_of_a_peers_that_are_none_are_left_out(number: float) -> None:
    report, clock = _report()
    _complete(report, clock)
    report.destination_phases = {"loaded": number, "vcpus-started": 2.25}
    report.downtime_ms = report.expected_ms = number
    info = _shown(report)
    assert info["godwit"]["destination-phases"] == {"vcpus-started": 2.25}
    assert "downtime" not in info
    assert "downtime-ms" not in info["godwit"]
    assert table(rows(info))


def test_texts_of_a_peers_or_a_clients_are_cut() -> None:
    report, clock = _report()
    _complete(report, clock)
    report.error = "x" * 10**6
    report.destination_runstates = ["y" * 10**6] * 1000
    report.destination_phases = {f"{number}" + "z" * 10**6: 1.0 for number in range(70)}
    info = _shown(report)
    assert len(info["error-desc"]) == MAX_TEXT
    assert len(json.dumps(info)) < 20_000
    assert math.isfinite(sum(info["godwit"]["destination-phases"].values()))
