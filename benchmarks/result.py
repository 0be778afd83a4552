"""The content of ``bench.json``, from the rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import plan, show, stats


def judge(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``bench.json`` for rows taken with ``settings``."""
    all_rows, samples = rows, stats.with_others(rows)
    rows = [dict(row) for row in stats.undisturbed(samples)]
    quantities = stats.quantities(rows)
    ratios = stats.ratios(quantities)
    limits = stats.limits(rows, quantities)
    medians = {
        name: {
            vmm: asdict(spread)
            for vmm in (plan.GODWIT, plan.QEMU, plan.BASE)
            if (spread := stats.spread(values.get(vmm, ()))) is not None
        }
        for name, values in quantities.items()
    }
    machines = [_plain(row) for row in all_rows if row.get("state") == "machine"]
    marks = {mark.name: _judged(mark, ratios.get(mark.name)) for mark in stats.MARKS}
    limit = limits.get(stats.LIMIT.name, {}).get("of")
    marks[stats.LIMIT.name] = _judged(stats.LIMIT, limit)
    return {
        "machine": machines[-1] if machines else {},
        "settings": settings,
        "ratios": ratios,
        "ratios_base": stats.ratios(quantities, plan.BASE),
        "limits": limits,
        "marks": marks,
        "medians": medians,
        "lost": stats.lost(rows),
        "phases": stats.phases(rows),
        "failures": stats.failures(all_rows),
        "disturbed": sum((row["others"] or 0.0) > stats.DISTURBED for row in samples),
        "samples": samples,
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "state"}


def _judged(mark: stats.Mark, value: float | None) -> dict[str, Any]:
    return {
        "value": value,
        "must": mark.must,
        "aim": mark.aim,
        "higher": mark.higher,
        "holds": mark.holds(value),
        "aimed": mark.aimed(value),
    }


def keep(result: dict[str, Any], out: Path) -> None:
    """Write ``bench.json`` and ``bench.svg`` into ``out``."""
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    show.draw(result, out / "bench.svg")
