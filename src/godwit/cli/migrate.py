"""``godwit migrate``: moves a guest by its QMP socket, shows the copy, prints the report."""

from __future__ import annotations

from typing import Any

from godwit.client.qmp import Client
from godwit.errors import MigrationError

_DONE = ("completed", "failed", "cancelled")


def move(qmp: str, uri: str, insecure: bool) -> int:
    """Move the guest behind ``qmp`` to ``uri``; 0 when it has arrived.

    Raises:
        GodwitError: it was refused or failed; the guest is where it was.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Client.connect(qmp) as client, Progress(*columns, console=console) as progress:
        client.execute("migrate", {"uri": uri, "insecure": insecure})
        task = progress.add_task("setup", total=None)
        while True:
            info = client.execute("query-migrate")
            ram = info.get("ram", {})
            progress.update(
                task,
                description=_doing(info),
                completed=ram.get("transferred", 0),
                total=ram.get("transferred", 0) + ram.get("remaining", 0) or None,
            )
            if info["status"] in _DONE:
                break
            client.wait_any("MIGRATION", 0.1)  # or look at the progress again
    if info["status"] != "completed":
        raise MigrationError(f"{info['status']}: {info.get('error-desc', 'no reason given')}")
    console.print(_table(info))
    return 0


def _doing(info: dict[str, Any]) -> str:
    """The status, and while RAM is copied what stands in the way of the end."""
    rate = info.get("ram", {}).get("dirty-pages-rate", 0)
    if info["status"] != "active" or not rate:
        return str(info["status"])
    text = f"active, {rate} pages/s get dirty"
    if "cpu-throttle-percentage" in info:
        text += f", vCPUs throttled by {info['cpu-throttle-percentage']} %"
    return text


def _table(info: dict[str, Any]) -> Any:
    from rich.table import Table

    own = info["godwit"]
    table = Table("what", "value", title="the move", title_justify="left")
    table.add_row("total time", f"{info['total-time']:.0f} ms")
    if "downtime" in info:  # a guest in a file is not running yet
        table.add_row("downtime", f"{info['downtime']:.1f} ms")
    table.add_row("sent", f"{info['ram']['transferred'] / 1e6:.1f} MB")
    table.add_row("rounds (pages)", ", ".join(str(number["pages"]) for number in own["rounds"]))
    throttles = [number.get("cpu-throttle-percentage", 0) for number in own["rounds"]]
    if any(throttles):
        table.add_row("vCPUs throttled", f"up to {max(throttles)} %")
    for side, key in (("stop, source", "stop-phases"), ("stop, destination", "destination-phases")):
        if own[key]:
            phases = ", ".join(f"{name} {ms:.1f}" for name, ms in own[key].items())
            table.add_row(side, f"{phases} ms")
    if own["destination-runstates"]:
        table.add_row("destination's states", " > ".join(own["destination-runstates"]))
    return table
