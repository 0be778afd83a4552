"""``python -m benchmarks.guest_memory``: private and shared guest RAM in turns.

Each turn boots a guest, fills a part of its memory for the first time, and migrates the guest to a
VM with RAM of the same sort. In the lab, shared RAM is measured with the kernel's small pages and
with huge ones (``shmem_enabled`` of Documentation/admin-guide/mm/transhuge.rst). A real host's
setting is its owner's, and stays. Prints medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from godwit.client.kvm import why_unusable
from lab import guest, host, kernels
from lab.agent import Agent
from lab.network import Network
from lab.vm import LabVm, vm_folder

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
#: (name, suffix of --memory, shmem_enabled)
_SORTS = (
    ("private", "", "never"),
    ("shared", ",shared=on", "never"),
    ("shared, huge pages", ",shared=on", "advise"),
)
_MAC = "52:54:00:67:77:01"


def measure(kernel: str, initrd: str, suffix: str, memory: int, filled: int) -> dict[str, float]:
    """Boot, fill and migrate one guest; return seconds, milliseconds and megabytes by name."""
    with vm_folder() as folder, Network() as net:
        shape = ["--memory", f"{memory}M{suffix}", "--cpus", "2"]
        uri = f"unix:{folder / 'migration'}"
        target = LabVm(
            "b",
            folder,
            [*shape, "--incoming", uri, "--nic", f"tap={net.b.tap},mac={_MAC}"],
            net.b.netns,
        )
        with target:
            target.qmp.execute("query-status")
            boot = ["--kernel", kernel, "--initrd", initrd, "--append", guest.CMDLINE]
            nic = ["--nic", f"tap={net.a.tap},mac={_MAC}"]
            with LabVm("a", folder, [*shape, *boot, *nic], net.a.netns) as source:
                found = {"boot_s": source.wait_ready(90)}
                with Agent("10.0.0.2", net.client.netns) as agent:
                    agent.ping(30)
                    began = time.monotonic()
                    agent.mem_fill(filled)
                    found["fill_s"] = time.monotonic() - began
                    info = source.migrate(uri)
                    agent.ping(30)
                found["total_ms"] = info["godwit"]["total-ms"]
                found["downtime_ms"] = info["godwit"]["downtime-ms"]
                found["sent_mb"] = info["ram"]["transferred"] / 1e6
    return found


def inside(plan: Path) -> None:
    """Measure all sorts in turns, where KVM works, and write a row for each guest."""
    told = json.loads(plan.read_text())
    sorts = _SORTS if told["emulated"] else _SORTS[:2]
    with Path(told["rows"]).open("a") as rows:
        for repetition in range(told["repetitions"] + 1):  # the first warms up
            for sort, suffix, huge in sorts:
                if told["emulated"]:
                    _HUGE.write_text(huge)
                found = measure(
                    told["kernel"], told["initrd"], suffix, told["memory"], told["filled"]
                )
                print(sort, {key: round(value, 2) for key, value in found.items()}, flush=True)
                if repetition:
                    rows.write(json.dumps({"sort": sort, **found}) + "\n")
                    rows.flush()


def main() -> int:
    """Run the measurement where KVM works, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guest_memory", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")
    parser.add_argument("--memory", type=int, default=512, help="MB; default %(default)s")
    parser.add_argument("--filled", type=int, default=256, help="MB; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        inside(given.inside)
        return 0
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows, plan = out / "guest-memory-rows.jsonl", out / "guest-memory-plan.json"
    rows.write_text("")
    kernel = kernels.get("cloud-6.12")
    told = {
        "rows": str(rows),
        "kernel": str(kernel.vmlinuz),
        "initrd": str(guest.build(kernel)),
        "emulated": why_unusable() is not None,
        "repetitions": given.repetitions,
        "memory": given.memory,
        "filled": given.filled,
    }
    plan.write_text(json.dumps(told))
    argv = [sys.executable, "-m", "benchmarks.guest_memory", "--inside", str(plan)]
    env = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    status = host.run(argv, timeout_s=900, rw=[out], env=env)
    _show([json.loads(line) for line in rows.read_text().splitlines()])
    return status


def _show(rows: list[dict[str, float]]) -> None:
    by_sort: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        by_sort[str(row.pop("sort"))].append(row)
    for sort, found in by_sort.items():
        print(sort)
        for name in found[0]:
            values = [row[name] for row in found]
            print(
                f"  {name:12} {median(values):9.2f}   {min(values):.2f} to {max(values):.2f} "
                f"({len(values)})"
            )


if __name__ == "__main__":
    sys.exit(main())
