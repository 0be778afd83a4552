"""``python -m benchmarks``: measure, judge, show and keep, as ``make bench`` does.

The measuring is done where KVM works (inside.py), and all else here, where nothing is emulated.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from godwit.client.kvm import why_unusable
from lab import guest, host, kernels, load, qemu, traffic
from lab.errors import LabCrashed, LabError, LabTimeout

from . import machines, plan, result, show
from .others import Others

#: A run's time, seconds. A lab that is cut off leaves its samples.
BUDGET_S, QUICK_BUDGET_S = 2100.0, 340.0
#: Labs that a run may use up: their emulated CPU has faults
#: (docs/decisions/0010-the-labs-faults.md).
LABS = 8
#: Memory for two guests of 2 GB with 1.5 GB in use, and their host.
LAB_MEMORY_MB = 6144
#: Memory that this machine needs beside the lab's.
_SPARE_MB = 1024
#: A lab with less time left measures nothing, seconds.
_LEAST_S = 30.0


def main() -> int:
    """Run the benchmark that the command line asks for, and return the exit status."""
    arguments = _parser().parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows_file = out / "bench-rows.jsonl"
    emulated = why_unusable() is not None
    rates = plan.LAB if emulated else plan.Rates()
    asked = {name: getattr(arguments, name) for name in asdict(rates)}
    rates = replace(rates, **{name: value for name, value in asked.items() if value is not None})
    if not arguments.again:
        if not (arguments.resume and rows_file.exists()):
            rows_file.write_text("")
        quick = arguments.quick
        repetitions = 1 if quick else arguments.repetitions
        compared = Compared.of(arguments)
        vmms = compared.vmms
        planned = plan.quick_jobs(vmms) if quick else plan.jobs(repetitions, vmms)
        if arguments.only:
            planned = [job for job in planned if job.guest in arguments.only]
        if arguments.part:
            planned = plan.only_parts(planned, arguments.part)
        if _free_mb() < LAB_MEMORY_MB + _SPARE_MB:
            log(
                f"the 2 GB guests are left out, which need {LAB_MEMORY_MB + _SPARE_MB} MB of memory"
            )
            planned = [job for job in planned if job.guest != "large"]
        budget = arguments.budget or (QUICK_BUDGET_S if quick else BUDGET_S)
        measure(planned, compared, rates, out, rows_file, budget)
        known = settings(rates, emulated, repetitions, quick)
        note(rows_file, state="settings", settings={**known, **compared.settings()})
    rows = read(rows_file)
    given = [row["settings"] for row in rows if row.get("state") == "settings"]
    judged = result.judge(rows, given[-1] if given else {})
    result.keep(judged, out)
    show.table(judged)
    log(f"kept: {out / 'bench.json'}, {out / 'bench.svg'}")
    return 0 if judged["ratios"] or judged["ratios_base"] else 1


@dataclass(frozen=True)
class Compared:
    """The VMMs beside this Godwit in the order of their turns, and their paths."""

    vmms: tuple[str, ...]
    qemu: str
    base: str

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Compared:
        """Return the VMMs that the command line asks for, without QEMU beside another Godwit.

        Raises:
            LabError: there is no such program, or no such checkout.
        """
        vmms: tuple[str, ...] = ()
        program, tree = qemu.PROGRAM, ""
        if arguments.base is not None:
            machines.base_module(arguments.base)
            vmms, tree = (plan.BASE,), str(arguments.base.absolute())
        if arguments.base is None or arguments.qemu is not None:
            vmms += (plan.QEMU,)
            program = str(Path(qemu.find(arguments.qemu or qemu.PROGRAM)).absolute())
        return cls(vmms, program, tree)

    def settings(self) -> dict[str, Any]:
        """Return the settings that name the VMMs (QEMU's version is with the machine's)."""
        base = _commit(self.base) if self.base else None
        return {"compared": self.vmms, "base_commit": base}


def _commit(tree: str) -> str:
    argv = ["git", "-C", tree, "describe", "--always", "--dirty"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()


def settings(rates: plan.Rates, emulated: bool, repetitions: int, quick: bool) -> dict[str, Any]:
    """Return the settings of the samples, by which two results can be compared."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit("."),
        "emulated": emulated,
        "quick": quick,
        "repetitions": repetitions,
        "rates": asdict(rates),
        "full_rates": rates == plan.Rates(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where results go")
    parser.add_argument("--quick", action="store_true", help="once instead of five times")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")
    parser.add_argument("--only", action="append", choices=list(plan.PARTS), help="these guests")
    parts = sorted({part for parts in plan.PARTS.values() for part in parts})
    parser.add_argument("--part", action="append", choices=parts, help="these parts")
    parser.add_argument("--qemu", metavar="PATH", help="the QEMU to compare with; may be a script")
    parser.add_argument(
        "--base",
        metavar="PATH",
        type=Path,
        help="another checkout of Godwit to compare with; QEMU is left out without --qemu",
    )
    parser.add_argument("--budget", type=float, help="seconds that measuring may take")
    for name, default in asdict(plan.Rates()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), help=f"default {default}; the lab has less")
    parser.add_argument(
        "--resume", action="store_true", help="go on with what the last run had no time for"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure nothing: judge the last run's samples"
    )
    return parser


def measure(
    planned: list[plan.Job],
    compared: Compared,
    rates: plan.Rates,
    out: Path,
    rows_file: Path,
    budget: float,
) -> None:
    """Do all jobs in up to ``LABS`` labs, which add their samples to ``rows_file``."""
    kernel = kernels.get("cloud-6.12")
    given: dict[str, Any] = {
        "rows": str(rows_file),
        "kernel": str(kernel.vmlinuz),
        "initrd": str(guest.build(kernel)),
        "rates": asdict(rates),
        "in_all": len(planned),
        "vmms": [plan.GODWIT, *compared.vmms],
        "qemu": compared.qemu,
        "base": compared.base,
    }
    if compared.base:  # as setup does for this tree: the lab cannot keep the byte code
        compileall.compile_dir(Path(compared.base) / "src", quiet=2)
    for program in (traffic.sender, load.receiver, load.bulk):
        program()  # compiled here, where there is a cache to keep the programs in
    memory_mb = LAB_MEMORY_MB if [job for job in planned if job.guest == "large"] else 4096
    end = time.monotonic() + budget
    for _ in range(LABS):
        jobs = plan.left(planned, read(rows_file))
        remaining = end - time.monotonic()
        if not jobs or remaining < _LEAST_S:
            return
        given["jobs"] = [job.to_json() for job in jobs]
        given["before"] = len(planned) - len(jobs)
        path = out / "bench-plan.json"
        path.write_text(json.dumps(given))
        argv = [sys.executable, "-m", "benchmarks.inside", str(path)]
        env = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        others = Others()
        try:
            with others:
                host.run(argv, timeout_s=remaining, memory_mb=memory_mb, rw=[out], env=env, log=log)
        except LabCrashed as error:
            log(f"the lab died; another one goes on ({error})")
            note(rows_file, state="lab died", error=str(error))
        except LabTimeout as error:
            log(f"the time is up; go on with --resume ({error})")
            note(rows_file, state="time is up")
        finally:
            if why_unusable() is not None:  # on KVM the guests are no children of ours
                note(rows_file, state="others", seen=others.seen)


def _free_mb() -> int:
    """Return the memory that this machine still has, MB."""
    (line,) = (
        line
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return int(line.split()[1]) >> 10


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows so far, without half a row or zeros that a lab's death left."""
    rows = []
    for line in path.read_text(errors="replace").replace("\0", "").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def note(path: Path, **row: Any) -> None:
    """Add a row to the file, from outside the lab."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(row) + "\n")


def log(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
