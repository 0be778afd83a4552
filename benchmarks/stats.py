"""Medians, ranges and ratios of samples, as pure functions without files or a clock."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from .disk import WORK
from .plan import BASE, GODWIT, IN_PROCESS, MIGRATIONS, QEMU

Row = Mapping[str, Any]
#: Values of one quantity: VMM -> its samples.
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Spread:
    """The median and range that one VMM reached."""

    median: float
    least: float
    most: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return median and range of the finite values, or None without any."""
    good = sorted(value for value in values if math.isfinite(value))
    return Spread(median(good), good[0], good[-1], len(good)) if good else None


#: Share of the CPU time that other programs may have during a sample.
DISTURBED = 0.15


def with_others(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the samples, each with other programs' CPU share meanwhile (or None) as ``others``."""
    rows = list(rows)
    seen = [tuple(look) for row in rows if row.get("state") == "others" for look in row["seen"]]
    began = 0.0
    found = []
    for row in rows:
        began = row["at"] if row.get("state") == "began" else began
        if row.get("state") == "done":
            shares = [share for at, share in seen if began <= at <= row["at"]]
            others = round(sum(shares) / len(shares), 2) if shares else None
            found.append({**row, "others": others})
    return found


def undisturbed(samples: Iterable[Row]) -> list[Row]:
    """Drop the samples that others disturbed, where the same part of the VMM has better."""
    samples = list(samples)

    def quiet(row: Row) -> bool:
        return (row.get("others") or 0.0) <= DISTURBED

    def kind(row: Row) -> tuple[Any, Any]:
        return row["vmm"], MIGRATIONS.get(row["part"], row["part"])

    good = {kind(row) for row in samples if quiet(row)}
    return [row for row in samples if quiet(row) or kind(row) not in good]


def ratio(over: Spread | None, under: Spread | None) -> float | None:
    """Return the ratio of two medians, or None if one is missing or the divisor is 0."""
    if over is None or under is None or not under.median:
        return None
    return over.median / under.median


def quantities(rows: Iterable[Row]) -> dict[str, Values]:
    """Return the VMMs' values of each quantity by name.

    Units are seconds (boot), MB, MB/s, milliseconds, and MB sent (bytes_...).
    """
    found: dict[str, Values] = defaultdict(lambda: defaultdict(list))
    for row in _done(rows):
        vmm, part = row["vmm"], row["part"]
        if part == "boot":
            found["boot"][vmm].append(row["seconds"])
        elif part == "memory":
            found["vmm_memory"][vmm].append(row["pss_mb"])
            found["vmm_memory_rss"][vmm].append(row["rss_mb"])
        elif part == "network":
            # Also of the in-process backend, which is compared with the same QEMU.
            kind = "in_process" if vmm == IN_PROCESS else "vhost"
            both = (row["out"] + row["in"]) / 2
            found[f"throughput_{kind}"][vmm].append(both / 1e6)
            found[f"throughput_{kind}_to_guest"][vmm].append(row["out"] / 1e6)
            found[f"throughput_{kind}_from_guest"][vmm].append(row["in"] / 1e6)
            found[f"round_trip_{kind}"][vmm].append(row["round_trip_ms"])
        elif part in ("fio", "fio-qcow2"):
            for name, rates in row["fio"].items():
                found[f"{row['guest']}_{name}"][vmm] += [rate / 1e6 for rate in rates]
        elif part in MIGRATIONS:
            for name, value in _of_migration(row):
                found[name][vmm].append(value)
    for name in [name for name in found if "_in_process" in name]:
        with_vhost = found[name.replace("in_process", "vhost")]
        found[name] = {GODWIT: found[name][IN_PROCESS], QEMU: with_vhost[QEMU]}
    return {name: dict(values) for name, values in found.items()}


def _of_migration(row: Row) -> Iterable[tuple[str, float]]:
    load = MIGRATIONS[row["part"]]
    yield f"total_{load}", row["total_ms"]
    yield f"downtime_{load}", row["downtime_ms"]
    if row["pause_ms"] is not None:
        yield f"pause_{load}", row["pause_ms"]
    yield f"bytes_{load}", row["bytes"] / 1e6
    gaps: Mapping[str, float] = row.get("gap_ms", {})
    for flow, gap in gaps.items():
        # The flow matters where all are measured: with the idle guest.
        yield f"gap_{load}", gap
        if load == "idle":
            yield f"gap {flow}", gap
    if load == "2g":
        yield "copy_rate", row["bytes"] / row["total_ms"] / 1e3
    if load == "tcp":
        yield "tcp_while_moving_to_guest", row["out"] / 1e6
        yield "tcp_while_moving_from_guest", row["in"] / 1e6


def ratios(quantities: Mapping[str, Values], under: str = QEMU) -> dict[str, float]:
    """Return Godwit's medians by another's, with the worst flow's as ``gap``.

    Disks are looked at by turns: what counts is the median of both looks' ratios in each turn, as
    the lab may be twice as fast in one turn as in another.
    """
    found = {}
    for name, values in quantities.items():
        ours, theirs = values.get(GODWIT, ()), values.get(under, ())
        if name.startswith(("disk_", "qcow2_")):
            turns = len(ours) == len(theirs) > 0 and all(theirs)
            one = median(a / b for a, b in zip(ours, theirs, strict=True)) if turns else None
        else:
            one = ratio(spread(ours), spread(theirs))
        if one is not None:
            found[name] = one
    gaps = [value for name, value in found.items() if name.startswith("gap ")]
    if gaps:
        found["gap"] = max(gaps)
    return found


@dataclass(frozen=True)
class Mark:
    """The value that a ratio must reach, and its aim for one day."""

    name: str
    must: float
    aim: float
    higher: bool = False

    def holds(self, value: float | None) -> bool:
        """Return whether the value is as good as a must."""
        return value is not None and (value >= self.must if self.higher else value <= self.must)

    def aimed(self, value: float | None) -> bool:
        """Return whether the value is as good as the aim."""
        return value is not None and (value >= self.aim if self.higher else value <= self.aim)


MARKS = (
    Mark("boot", 0.75, 0.6),
    Mark("total_idle", 0.4, 0.25),
    Mark("downtime_idle", 0.7, 0.4),
    Mark("downtime_hot", 0.7, 0.4),
    Mark("total_2g", 0.6, 0.4),
    Mark("gap", 0.6, 0.4),
    Mark("vmm_memory", 0.8, 0.5),
    Mark("throughput_vhost", 0.95, 1.0, higher=True),
    Mark("disk_seq_read", 0.9, 1.0, higher=True),
    Mark("disk_seq_write", 0.9, 1.0, higher=True),
    *(Mark(f"qcow2_{work}", 0.9, 1.0, higher=True) for work in WORK),
)
#: The mark of the copy's rate by the plain socket loop's.
LIMIT = Mark("copy_2g", 0.6, 0.85, higher=True)


def limits(rows: Iterable[Row], quantities: Mapping[str, Values]) -> dict[str, Any]:
    """Return the rates of the 2 GB guest's copy and of the plain socket loop, MB/s."""
    loop = spread(row["rate"] / 1e6 for row in _done(rows) if row["part"] == "limit")
    found: dict[str, Any] = {}
    for vmm in (GODWIT, QEMU):
        copied = spread(quantities.get("copy_rate", {}).get(vmm, ()))
        value = ratio(copied, loop)
        if copied and loop and value is not None:
            name = LIMIT.name if vmm == GODWIT else f"{LIMIT.name}_{vmm}"
            found[name] = {"of": value, "copy": copied.median, "socket_loop": loop.median}
    return found


def lost(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return the packets lost a migration, by flow and direction: medians, and all as ``each``."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in _done(rows):
        for flow, count in row.get("pings_lost", {}).items():
            if MIGRATIONS[row["part"]] == "idle":
                found[f"ping {flow}"][row["vmm"]].append(count)
        for flow, counts in row.get("udp", {}).items():
            found[f"UDP to guest {flow}"][row["vmm"]].append(counts["to_guest"])
            found[f"UDP from guest {flow}"][row["vmm"]].append(counts["from_guest"])
    return {
        name: {**{vmm: median(counts) for vmm, counts in by.items()}, "each": dict(by)}
        for name, by in sorted(found.items())
    }


def phases(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the median length of the phases of Godwit's migrations, in milliseconds.

    The order is load, kind of phase, phase. The reports have each phase's end, the result each
    phase's length.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in _done(rows):
        report: Mapping[str, Any] = row.get("report") or {}
        if row["vmm"] == BASE:
            continue
        for kind in (name for name in report if name.endswith("-phases")):
            ends = sorted(report[kind].items(), key=lambda phase: phase[1])
            for (_, before), (phase, end) in pairwise([("", 0.0), *ends]):
                found[MIGRATIONS[row["part"]]][kind][phase].append(end - before)
        rounds = report.get("rounds", [])
        if rounds and rounds[0]["ms"]:
            rate = rounds[0]["pages"] * 4096 / rounds[0]["ms"] / 1e3
            found[MIGRATIONS[row["part"]]]["first-pass"]["MB/s"].append(rate)
            found[MIGRATIONS[row["part"]]]["first-pass"]["ms"].append(rounds[0]["ms"])
    return {
        load: {
            kind: {phase: round(median(each), 2) for phase, each in by.items()}
            for kind, by in kinds.items()
        }
        for load, kinds in found.items()
    }


def failures(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the failed samples by VMM and part, the labs that died, and the errors."""
    rows = list(rows)
    count: Counter[str] = Counter()
    name = ""
    for row in rows:
        if "part" in row:
            name = f"{row['vmm']} {row['part']}"
            count[name] += {"began": 1, "done": -1, "failed": 0}[row["state"]]
        elif row["state"] == "time is up" and count[name]:
            count[name] -= 1  # a part that was cut off has not failed
    return {
        "samples": {name: number for name, number in count.items() if number},
        "labs_died": sum(row["state"] == "lab died" for row in rows),
        "said": [row["error"] for row in rows if "error" in row],
    }


def _done(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("state") == "done"]
