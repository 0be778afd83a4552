"""``python -m lab demo``: run the scenario where KVM works, judge, show and keep the result."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import guest, host, kernels
from .errors import LabError
from .judge import Announcement, announcements
from .scenario import MAC
from .traffic import FLOWS, Flow, sender

if TYPE_CHECKING:
    from rich.console import Console

_TIME_LIMIT_S = 240.0
_KINDS = {"ipv4": "GARP", "ipv6": "NA"}


def run(out: Path, log: Callable[[str], None]) -> int:
    """Run and judge the scenario, keep the result in ``out``, and return 0 if everything held.

    Raises:
        LabError: the scenario could not be run to its end.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "scenario.json"
    raw.unlink(missing_ok=True)
    kernel = kernels.get("cloud-6.12")
    initrd = guest.build(kernel)
    sender()  # compiled here, where there is a cache to keep it in
    argv = [sys.executable, "-m", "lab.scenario"]
    argv += [str(out), str(kernel.vmlinuz), str(initrd)]
    status = host.run(argv, timeout_s=_TIME_LIMIT_S, rw=[out], log=log)
    if status or not raw.exists():
        raise LabError(f"the scenario exited with status {status}: see its output above")
    observed = json.loads(raw.read_text())
    result = judge(observed, announcements(out / "client.pcap", MAC))
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    _draw(observed, result, out / "demo.svg")
    log(f"kept: {out / 'demo.json'}, {out / 'demo.svg'}, {out / 'client.pcap'}")
    return 0 if result["passed"] else 1


def judge(observed: dict[str, Any], frames: list[Announcement]) -> dict[str, Any]:
    """Return the demo's result: the observations, the verdict, and the broken rules."""
    migrations = observed["moves"]
    faults: list[str] = []
    flows = []
    for flow, seen in zip(FLOWS, observed["flows"], strict=True):
        flows.append(_flow(flow, seen, migrations, frames))
        if not flows[-1]["recovered"]:
            faults.append(f"{flow.network}, {flow.family}: did not recover")
        for number, migration in enumerate(migrations, 1):
            if not [f for f in _after(migration, frames) if _announces_for(f, flow)]:
                faults.append(f"migration {number}: no {_KINDS[flow.family]} on {flow.network}")
    faults += _rules(migrations, frames)
    if not all(observed["tcp"]):
        faults.append("the TCP connection broke")
    if not observed["memory"]:
        faults.append("the guest's memory changed")
    return {
        "passed": not faults,
        "faults": faults,
        "boot_s": observed["boot_s"],
        "flows": flows,
        "migrations": [
            {
                "total_ms": migration["source"]["godwit"]["total-ms"],
                "downtime_ms": migration["source"]["godwit"].get("downtime-ms"),
                "bytes": migration["source"]["ram"]["transferred"],
                "ack_ms": migration["ack_ms"],
                "runstates": {
                    "source": migration["source_runstates"],
                    "destination": migration["destination"]["runstates"],
                },
                "rounds": migration["source"]["godwit"]["rounds"],
                "stop_phases": migration["source"]["godwit"]["stop-phases"],
                "destination_phases": migration["destination"]["destination-phases"],
            }
            for migration in migrations
        ],
    }


def _flow(
    flow: Flow, seen: dict[str, Any], migrations: list[dict[str, Any]], frames: list[Announcement]
) -> dict[str, Any]:
    answers: list[float] = seen["answers"]
    outages, first = [], []
    for migration in migrations:
        gaps = [
            later - earlier
            for earlier, later in itertools.pairwise(answers)
            if later > migration["began"] and earlier < migration["ended"]
        ]
        outages.append(round(max(gaps, default=float("inf")) * 1000, 1))
        first.append(next((f for f in _after(migration, frames) if _announces_for(f, flow)), None))
    worst = max(outages)
    return {
        "network": flow.network,
        "family": flow.family,
        "outage_ms": worst,
        "outages_ms": outages,
        "lost": seen["ping_sent"] - seen["ping_received"],
        "udp_sent": seen["udp_sent"],
        "udp_lost": seen["udp_sent"] - seen["udp_received"],
        "udp_duplicates": seen["udp_duplicates"],
        "udp_reordered": seen["udp_reordered"],
        "recovered": bool(answers) and answers[-1] > migrations[-1]["resumed"] and worst < 10_000,
        "announced_by": [f"{f.sender}, {f.kind}" if f else None for f in first],
        "first_announcement_ms": [
            round((f.at - migration["resumed"]) * 1000, 1) if f else None
            for f, migration in zip(first, migrations, strict=True)
        ],
    }


def _after(migration: dict[str, Any], frames: list[Announcement]) -> list[Announcement]:
    """Return the announcements from a migration's beginning to its end."""
    return [f for f in frames if migration["began"] <= f.at <= migration["ended"]]


def _announces_for(frame: Announcement, flow: Flow) -> bool:
    """Return whether a frame announces a flow's guest address."""
    same = frame.kind == _KINDS[flow.family] and frame.address == flow.guest
    return frame.vlan == flow.vlan and same


def _rules(migrations: list[dict[str, Any]], frames: list[Announcement]) -> list[str]:
    """Return the faults against the announcement's rules."""
    faults = []
    for number, migration in enumerate(migrations, 1):
        early = [f for f in _after(migration, frames) if f.at < migration["resumed"] - _EARLY_S]
        if early:
            faults.append(f"migration {number}: {len(early)} announcements before the guest ran")
        by_host = [f for f in _after(migration, frames) if f.sender == "host"]
        if any(f.kind != "RARP" or f.vlan for f in by_host):  # a round begins with an untagged RARP
            faults.append(f"migration {number}: the host announced, though the guest did")
        states = migration["destination"]["runstates"]
        if states[-2:] != ["prelaunch-migrate", "running"]:
            faults.append(f"migration {number}: the destination went through {states}")
    ends = [migration["ended"] for migration in migrations]
    for f in frames:
        during = any(migration["began"] <= f.at <= migration["ended"] for migration in migrations)
        if not during and ends[0] < f.at:
            faults.append(f"a {f.kind} on VLAN {f.vlan} without a migration")
    return faults


#: RESUME is stamped after the vCPUs were let go: a guest may be quicker than its event, seconds.
_EARLY_S = 0.05


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # A VM's words are no markup of ours, and move no cursor.
    console = Console(width=120, markup=False)
    table = Table(
        "network", "family", "outage, ms", "pings lost", "UDP lost", "first announcement", "ms",
        title="what the client saw (two migrations)", title_justify="left",
    )  # fmt: skip
    for flow in result["flows"]:
        table.add_row(
            flow["network"],
            flow["family"],
            " / ".join(str(ms) for ms in flow["outages_ms"]),
            str(flow["lost"]),
            f"{flow['udp_lost']} of {flow['udp_sent']}",
            " / ".join(str(who) for who in flow["announced_by"]),
            " / ".join(str(ms) for ms in flow["first_announcement_ms"]),
        )
    console.print(table)
    for number, migration in enumerate(result["migrations"], 1):
        _line(
            console,
            f"migration {number}: ack {migration['ack_ms']:.1f} ms after the resume, downtime "
            f"{migration['downtime_ms']:.1f} ms, total {migration['total_ms']:.0f} ms, "
            f"{migration['bytes'] / 1e6:.1f} MB",
        )
        for side, states in migration["runstates"].items():
            _line(console, f"  {side}: {' > '.join(states)}")
    for fault in result["faults"]:
        _line(console, f"FAULT {fault}", style="red")
    passed = result["passed"]
    _line(console, "passed" if passed else "failed", style="green" if passed else "red")


def _line(console: Console, text: str, style: str | None = None) -> None:
    """Print one line, with a question mark for each control character."""
    console.print("".join(one if one.isprintable() else "?" for one in text), style=style)


def _draw(observed: dict[str, Any], result: dict[str, Any], path: Path) -> None:
    """Draw the timeline of each migration: each flow's answers, the stop, the announcements."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    migrations = observed["moves"]
    figure, axes = pyplot.subplots(
        len(migrations), 1, figsize=(10, 3.2 * len(migrations)), squeeze=False
    )
    for number, (axis, migration, shown) in enumerate(
        zip(axes[:, 0], migrations, result["migrations"], strict=True), 1
    ):
        zero = migration["resumed"]
        for row, (flow, seen) in enumerate(zip(FLOWS, observed["flows"], strict=True)):
            times = [(at - zero) * 1000 for at in seen["answers"] if -0.6 < at - zero < 0.6]
            axis.plot(times, [row] * len(times), "|", color="tab:blue", markersize=9)
            first = result["flows"][row]["first_announcement_ms"][number - 1]
            if first is not None:
                axis.plot([first], [row], "^", color="tab:red", markersize=7)
            axis.text(-595, row + 0.18, f"{flow.network} {flow.family}", fontsize=7)
        axis.axvspan(-(shown["downtime_ms"] or 0), 0, color="tab:gray", alpha=0.3)
        axis.axvline(migration["ack_ms"] or 0, color="tab:green", linestyle="--")
        axis.set_yticks([])
        axis.set_xlim(-600, 600)
        axis.set_title(
            f"migration {number}: answers (|), stopped (grey), first announcement (triangle), "
            "ack (dashed)",
            fontsize=8,
        )
        axis.set_xlabel("ms after the resume", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
