"""arpwatch on a segment: an independent judge of who has which IPv4 address."""

from __future__ import annotations

from pathlib import Path

from ..netns import inside
from .parts import Daemon, wait

#: What arpwatch reports when an address that it knows is another MAC's (arpwatch(8)).
_CHANGES = ("changed ethernet address", "flip flop", "reused old ethernet address")


class ArpWatch(Daemon):
    """An arpwatch in a namespace, which knows nothing at first."""

    def __init__(self, netns: str, interface: str, folder: Path) -> None:
        database = folder / f"arpwatch-{interface}.dat"
        database.write_text("")
        # -d: in the foreground, reports on standard error and not by mail.
        argv = ["arpwatch", "-d", "-N", "-i", interface, "-f", str(database)]
        before = _packet_sockets(netns)
        super().__init__(netns, argv, folder / f"arpwatch-{interface}.log")
        wait("arpwatch listens", lambda: _packet_sockets(netns) > before)

    def changes(self) -> list[str]:
        """Return the changes so far, as :func:`changes` does.

        Raises:
            LabError: arpwatch has exited.
        """
        self.check()
        return changes(self._output.read_text(errors="replace"))


def changes(text: str) -> list[str]:
    """Return the changes in arpwatch's reports, in order: the address, the kind, the new MAC."""
    found = []
    kind = address = ""
    for line in text.splitlines():
        name, _, value = line.strip().partition(": ")
        if name == "Subject":
            kind = next((change for change in _CHANGES if value.startswith(change)), "")
        elif name == "ip address":
            address = value.strip()
        elif name == "ethernet address" and kind:
            found.append(f"{address} {kind} {_padded(value.strip())}")
    return found


def _padded(mac: str) -> str:
    """Return a MAC with two digits for each byte: arpwatch leaves zeros out."""
    return ":".join(part.zfill(2) for part in mac.split(":"))


def _packet_sockets(netns: str) -> int:
    """Return the number of AF_PACKET sockets in a namespace."""
    with inside(netns):
        return len(Path("/proc/thread-self/net/packet").read_text().splitlines()) - 1
