"""Load on the guest's network and its figures: numbered packets, TCP streams, round trips.

The programs are C (host_files): on an emulated CPU Python does not keep up with a thousand packets
a second.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import initramfs
from .agent import DISCARD, SOURCE, Flow
from .errors import LabError
from .netns import entering
from .traffic import Program

_ROUND_TRIP = re.compile(r"time=([\d.]+) ms")
_OUT, _IN = f"out={DISCARD}", f"in={SOURCE}"
BOTH_WAYS, TO_GUEST, FROM_GUEST = (_OUT, _IN), (_OUT,), (_IN,)
#: Port of the client's packet counter, for flows that the guest sends.
PORT = 7010


def receiver() -> Path:
    """Return the program that counts numbered packets, compiled once."""
    return initramfs.program("receiver", [initramfs.DATA / "host_files/receiver.c"])


def bulk() -> Path:
    """Return the program that sends and receives bytes by TCP, compiled once."""
    return initramfs.program("bulk", [initramfs.DATA / "host_files/bulk.c"])


class Receiver(Program):
    """A counter of the numbered packets that the guest sends to the client."""

    def __init__(self, netns: str, folder: Path) -> None:
        super().__init__(netns, [str(receiver()), str(PORT)], folder / "receiver.txt")

    def flows(self) -> dict[int, Flow]:
        """Return the counts by flow id, after :meth:`stop`."""
        rows = (Flow(*map(int, line.split())) for line in self._output.read_text().splitlines())
        return {flow.id: flow for flow in rows}


class Bulk(Program):
    """TCP between client and guest as fast as it goes, until :meth:`stop`."""

    def __init__(
        self, netns: str, folder: Path, address: str, ways: Sequence[str] = BOTH_WAYS
    ) -> None:
        super().__init__(netns, [str(bulk()), address, "0", *ways], folder / "bulk.txt")

    def rates(self) -> dict[str, float]:
        """Return the rates ``out`` (to the guest) and ``in``, bytes a second, after :meth:`stop`.

        Raises:
            LabError: a connection broke.
        """
        if self._process.returncode != 0:
            raise LabError(f"the TCP stream broke: {self._output.read_text()!r}")
        return rates(self._output.read_text())


def throughput(netns: str, address: str, seconds: int, ways: Sequence[str]) -> dict[str, float]:
    """Measure the rates of TCP, ``out`` (to the guest) and ``in``, bytes a second.

    The measurement takes ``seconds``, and begins after a second of traffic.

    Raises:
        LabError: there was no connection, or the connection broke.
    """
    argv = [str(bulk()), address, str(seconds), *ways]
    return rates(_output(netns, argv, seconds + 21))


def round_trips(netns: str, address: str, count: int, interval: float) -> list[float]:
    """Return the round trips of ``count`` pings, one every ``interval`` seconds, in milliseconds.

    Raises:
        LabError: ping failed.
    """
    argv = ["ping", "-n", "-c", str(count), "-i", f"{interval:g}", "-W", "1", address]
    return [float(ms) for ms in _ROUND_TRIP.findall(_output(netns, argv, count * interval + 30))]


def rates(text: str) -> dict[str, float]:
    """Return the rate of each direction that bulk printed, bytes a second."""
    rows = (line.split() for line in text.splitlines())
    return {way: int(amount) * 1e6 / max(1, int(us)) for way, amount, us in rows}


def _output(netns: str, argv: list[str], deadline: float) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline,
            preexec_fn=entering(netns),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{argv[0]}: no exit within {deadline:g} s") from error
    if done.returncode != 0:
        raise LabError(f"{argv[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout
