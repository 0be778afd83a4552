"""``python -m benchmarks.soak``: many migrations under load, and the faults in them.

Each migration carries numbered packets (1,000 a second to each of three networks), a TCP stream, a
hash chain that a thread of the guest writes through its memory, timers, and readings of its clocks.
The emulated lab dies or breaks a guest now and then (docs/decisions/0010-the-labs-faults.md):
another lab goes on, and each break is shown, for a person to find whose fault it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from godwit.client.kvm import why_unusable
from lab import guest, host, kernels, traffic
from lab.errors import LabCrashed, LabError, LabTimeout

from . import plan
from .__main__ import log, note, read

_LEAST_S = 60.0


def main() -> int:
    """Run the soak that the command line asks for, and return 0 if no migration had a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--moves", type=int, default=30, help="migrations; default %(default)s")
    parser.add_argument("--cpus", type=int, default=2, help="the guest's; default %(default)s")
    parser.add_argument(
        "--vmm", choices=[plan.GODWIT, plan.QEMU], default=plan.GODWIT, help="whose faults to count"
    )
    parser.add_argument("--rate", type=int, default=1000, help="packets a second and flow")
    parser.add_argument("--idle", action="store_true", help="no memory or timer load in the guest")
    parser.add_argument("--nic", default="", help="more of the NIC's keys: vhost=off")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds that it may take")
    parser.add_argument("--out", type=Path, default=Path("out"))
    given = parser.parse_args()
    if given.vmm == plan.QEMU and given.nic:
        parser.error("--nic is Godwit's: leave it out with --vmm qemu")
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows_file = out / "soak-rows.jsonl"
    rows_file.write_text("")
    _migrate(given, out, rows_file)
    return _judge(read(rows_file), out)


def _migrate(given: argparse.Namespace, out: Path, rows_file: Path) -> None:
    kernel = kernels.get("cloud-6.12")
    emulated = why_unusable() is not None
    traffic.sender()
    job: dict[str, Any] = {
        "vmm": given.vmm,
        "rows": str(rows_file),
        "kernel": str(kernel.vmlinuz),
        "initrd": str(guest.build(kernel)),
        "cpus": given.cpus,
        "rate": given.rate,
        "idle": given.idle,
        "nic": f",{given.nic}" if given.nic else "",
        "all_flows": not emulated,
    }
    end = time.monotonic() + given.budget
    while True:
        done = [row for row in read(rows_file) if row["state"] == "moved"]
        job["moves"] = given.moves - len(done)
        remaining = end - time.monotonic()
        if job["moves"] <= 0 or remaining < _LEAST_S:
            return
        path = out / "soak-plan.json"
        path.write_text(json.dumps(job))
        argv = [sys.executable, "-m", "benchmarks.soak_inside", str(path)]
        env = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        try:
            host.run(argv, timeout_s=remaining, rw=[out], env=env, log=log)
        except LabCrashed as error:
            log(f"the lab died; another one goes on ({error})")
            note(rows_file, state="lab died", error=str(error))
        except LabTimeout:
            log("the time is up; allow more with --budget")
            return


def _judge(rows: list[dict[str, Any]], out: Path) -> int:
    migrated = [row for row in rows if row["state"] == "moved"]
    sums = {
        key: sum(row[key] for row in migrated)
        for key in ("sent", "lost", "duplicates", "reordered")
    }
    wrong = [
        row
        for row in migrated
        if row["lost"] or row["duplicates"] or row["reordered"] or row["log"]
        or not (row["stream"] and row["memory"])
        or not row["handover"].get("over", True)
        or max(map(abs, row["clock_ms"])) > row["clock_error_ms"] + 0.5
    ]  # fmt: skip
    result = {
        "moves": len(migrated),
        "moves_of_each_flow": dict(Counter(flow for row in migrated for flow in row["flows"])),
        **sums,
        "moves_with_a_fault": len(wrong),
        "downtime_ms": median([row["downtime_ms"] for row in migrated]) if migrated else None,
        "forwarded": sum(row["handover"].get("packets", 0) for row in migrated),
        "clock_ms": max((max(map(abs, row["clock_ms"])) for row in migrated), default=None),
        "clock_error_ms": max((row["clock_error_ms"] for row in migrated), default=None),
        "labs_died": sum(row["state"] == "lab died" for row in rows),
        "guests_broke": sum(row["state"] == "broke" for row in rows),
    }
    (out / "soak.json").write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    for name, value in result.items():
        log(f"{name:20} {value}")
    for row in rows:
        if row["state"] == "broke":
            log(f"broke: {row['error']}")
    return 0 if migrated and not wrong else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        print(f"soak: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
