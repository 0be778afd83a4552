"""``godwit migrate`` and ``godwit save``, by the guest's QMP socket, with progress and report."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, Self, TextIO

from godwit.client.qmp import Client, Event, VmGone
from godwit.errors import MigrationError

from .printable import printable

_DONE = ("completed", "failed", "cancelled")
_LOOK_S = 0.1
_BAR = 24


def migrate(qmp: str, uri: str, insecure: bool) -> int:
    """Migrate the guest behind ``qmp`` to ``uri``, and return 0 once the guest has arrived.

    Raises:
        GodwitError: the migration was refused or failed; the guest is where it was.
    """
    with Client.connect(qmp) as client:
        client.execute("migrate", {"uri": uri, "insecure": insecure})
        info = _follow(client)
    _judge(info)
    return 0


def save(qmp: str, file: str, keep_running: bool, compress: str | None) -> int:
    """Have the guest behind ``qmp`` saved in a file, and return 0 once the file is whole.

    Raises:
        GodwitError: the save was refused or failed; the guest is where it was.
    """
    arguments: dict[str, object] = {"path": os.path.abspath(file), "keep-running": keep_running}
    if compress is not None:
        arguments["compress"] = compress
    with Client.connect(qmp) as client:
        client.execute("godwit-save", arguments)
        info = _follow(client, ends=not keep_running)
    _judge(info)
    return 0


def _follow(client: Client, ends: bool = False) -> dict[str, Any]:
    """Show the progress, and return the last report. The VM ``ends`` by itself after success."""
    info: dict[str, Any] = {}
    seen: list[Event] = []
    with Progress(sys.stderr) as progress:
        try:
            while info.get("status") not in _DONE:
                info = client.execute("query-migrate")
                progress.show(doing(info))
                if info["status"] not in _DONE:  # look at it again then, or before
                    event = client.wait_any("MIGRATION", _LOOK_S)
                    seen += [event] if event is not None else []
        except VmGone:
            seen += [event for event in client.events() if event["event"] == "MIGRATION"]
            if not ends or not seen or seen[-1]["data"].get("status") != "completed":
                raise
            info["status"] = "completed"
    return info


def _judge(info: dict[str, Any]) -> None:
    if info["status"] != "completed":
        raise MigrationError(f"{info['status']}: {info.get('error-desc', 'no reason given')}")
    for line in table(rows(info)):
        print(line)


class Progress:
    """One line of a terminal, written anew each time and gone with the block, or else nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shows = stream.isatty()
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._width:
            self._write("")
            self._stream.write("\r")
            self._stream.flush()

    def show(self, text: str) -> None:
        """Replace the line by ``text``."""
        if self._shows:
            # In the last column a terminal may wrap, and \r would not come back to the line.
            self._write(text[: max(1, shutil.get_terminal_size().columns - 1)])

    def _write(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)


def doing(info: dict[str, Any]) -> str:
    """Return the progress of the copy, and while RAM is copied, dirty pages and throttle."""
    ram = info.get("ram", {})
    sent, left = ram.get("transferred", 0), ram.get("remaining", 0)
    text = printable(info["status"])
    if sent + left:
        full = _BAR * sent // (sent + left)
        text += f" [{'#' * full}{'.' * (_BAR - full)}] {sent / 1e6:.1f} MB"
    if ram.get("mbps"):
        text += f", {ram['mbps'] / 8:.0f} MB/s"
    if info["status"] == "active" and ram.get("dirty-pages-rate"):
        text += f", {ram['dirty-pages-rate']} pages/s get dirty"
        if "cpu-throttle-percentage" in info:
            text += f", vCPUs throttled by {info['cpu-throttle-percentage']} %"
    return text


def rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the report as names and values."""
    own = info["godwit"]
    found = [("total time", f"{own['total-ms']:.0f} ms")]
    if "downtime-ms" in own:  # a guest in a file is not running yet
        found.append(("downtime", f"{own['downtime-ms']:.1f} ms"))
    found.append(("sent", f"{info['ram']['transferred'] / 1e6:.1f} MB"))
    found.append(("rounds (pages)", ", ".join(str(number["pages"]) for number in own["rounds"])))
    throttles = [number.get("cpu-throttle-percentage", 0) for number in own["rounds"]]
    if any(throttles):
        found.append(("vCPUs throttled", f"up to {max(throttles)} %"))
    for side, key in (("stop, source", "stop-phases"), ("stop, destination", "destination-phases")):
        if own[key]:
            phases = ", ".join(f"{name} {ms:.1f}" for name, ms in own[key].items())
            found.append((side, f"{phases} ms"))
    if own["destination-runstates"]:
        found.append(("destination's states", " > ".join(own["destination-runstates"])))
    return found


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the rows as printable lines, with the values below each other."""
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {printable(value)}" for name, value in rows]
