"""Traffic between the lab's client and its guest, by stock programs where there are any.

Pings are iputils' ``ping``; the capture is ``tcpdump``'s; numbered UDP packets come from
``host_files/sender.c``, and the guest counts them.
"""

from __future__ import annotations

import itertools
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from . import initramfs
from .addresses import LANS
from .agent import ECHO, SINK
from .errors import LabError
from .netns import entering, inside


@dataclass(frozen=True)
class Flow:
    """A flow to the guest, of one network and family."""

    id: int
    network: str
    vlan: int
    family: str  # "ipv4" or "ipv6"
    guest: str
    client: str


FLOWS = tuple(
    Flow(2 * index + (family == "ipv6"), lan.name, lan.vlan, family, guest, client)
    for index, lan in enumerate(LANS)
    for family, guest, client in zip(("ipv4", "ipv6"), lan.guest, lan.client, strict=True)
)

_REPLY = re.compile(rb"^\[(\d+\.\d+)\].* bytes from .*seq=(\d+) ", re.MULTILINE)
_SUMMARY = re.compile(rb"(\d+) packets transmitted, (\d+) received")


_ANNOUNCES = "arp or rarp or (ip6 and (ip6[40] == 135 or ip6[40] == 136))"
#: tcpdump's filter for frames that may announce or ask: ARP, RARP and neighbour discovery, with up
#: to two tags. (Each 'vlan' shifts the offsets behind it by four bytes.)
ANNOUNCING = f"{_ANNOUNCES} or (vlan and ({_ANNOUNCES} or (vlan and ({_ANNOUNCES}))))"


def sender() -> Path:
    """Return the program that sends numbered packets, compiled once."""
    return initramfs.program("sender", [initramfs.DATA / "host_files/sender.c"])


class Program:
    """A child process in a namespace, its output in a file."""

    def __init__(self, netns: str, argv: list[str], output: Path) -> None:
        self._output = output
        with output.open("wb") as stream:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=entering(netns),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> bytes:
        """End the child as ctrl-c would, and return the output."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
        return self._output.read_bytes()


@dataclass(frozen=True)
class Answers:
    """The answers that a ping received."""

    sent: int
    received: int
    #: Realtime of each answer, seconds, with its sequence number.
    times: list[tuple[float, int]]

    def gap_ms(self, since: float, until: float) -> float:
        """Return the longest time between two answers, in milliseconds, or 0 for fewer than two.

        The later of the two came after ``since``, the earlier before ``until`` (realtime, seconds).
        """
        gaps = [
            later - earlier
            for (earlier, _), (later, _) in zip(self.times, self.times[1:], strict=False)
            if later > since and earlier < until
        ]
        return max(gaps, default=0.0) * 1000

    def dark_s(self, since: float, until: float) -> float:
        """Return the longest time without an answer between two times (realtime), in seconds."""
        times = [since, *(at for at, _ in self.times if since < at < until), until]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


class Ping(Program):
    """A ``ping`` of one flow, an echo request every ``interval`` seconds."""

    def __init__(self, netns: str, flow: Flow, folder: Path, interval: float = 0.01) -> None:
        self.flow = flow
        argv = ["ping", "-D", "-n", "-i", f"{interval:g}", flow.guest]
        super().__init__(netns, argv, folder / f"ping-{flow.id}.txt")

    def answers(self) -> Answers:
        """Return the answers so far, which are complete after :meth:`stop`."""
        text = self._output.read_bytes()
        times = [(float(at), int(number)) for at, number in _REPLY.findall(text)]
        summary = _SUMMARY.search(text)
        sent = int(summary[1]) if summary else (times[-1][1] if times else 0)
        return Answers(sent, len(times), times)

    def wait_answer(self, since: float, deadline: float = 30.0) -> float:
        """Wait for an answer later than ``since``, and return its time (both realtime, seconds).

        Raises:
            LabError: no answer came in ``deadline`` seconds.
        """
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            # The tail is enough, and leaves a slow machine free for the guest.
            with self._output.open("rb") as stream:
                stream.seek(max(0, self._output.stat().st_size - 4096))
                found = _REPLY.findall(stream.read())
            if found and float(found[-1][0]) > since:
                return float(found[-1][0])
            time.sleep(0.02)  # ping writes to a file: there is no event to wait for
        raise LabError(f"{self.flow.network}, {self.flow.family}: no answer in {deadline:g} s")


class Capture(Program):
    """A ``tcpdump`` on an interface of a namespace, into a file.

    A ``direction`` of ``in`` or ``out`` takes only the frames that the interface receives or sends.
    """

    def __init__(
        self, netns: str, interface: str, path: Path, expression: str = "", direction: str = "inout"
    ) -> None:
        self.path = path
        # Without immediate mode the frames of the last second are lost at the end.
        argv = ["tcpdump", "-i", interface, "-U", "--immediate-mode", "-n", "-s", "128"]
        argv += ["-Q", direction, "-w", str(path), *([expression] if expression else [])]
        super().__init__(netns, argv, path.with_suffix(".log"))
        end = time.monotonic() + 20
        while b"listening on" not in self._output.read_bytes():
            if time.monotonic() > end or self._process.poll() is not None:
                raise LabError(f"tcpdump does not start: {self._output.read_bytes()!r}")
            time.sleep(0.01)  # tcpdump reports this on its output and nowhere else


class Sender(Program):
    """A sender of numbered UDP packets to the guest, ``rate`` a second on each given flow."""

    def __init__(
        self, netns: str, folder: Path, rate: int = 100, flows: Sequence[Flow] = FLOWS
    ) -> None:
        argv = [str(sender()), str(rate), str(SINK)]
        argv += [f"{flow.id}={flow.guest}" for flow in flows]
        super().__init__(netns, argv, folder / "sender.txt")

    def counts(self) -> dict[int, int]:
        """Return the packets sent by flow id, after :meth:`stop`."""
        lines = self._output.read_text().split()
        return {int(flow): int(sent) for flow, _, sent in (line.partition("=") for line in lines)}


class Stream:
    """A TCP connection to the guest's echo port."""

    def __init__(self, netns: str, address: str) -> None:
        with inside(netns):
            self._sock = socket.create_connection((address, ECHO), 10)
        self._sock.settimeout(30)

    def exchange(self, size: int = 65536) -> bool:
        """Send ``size`` bytes, and return whether the same came back."""
        data = bytes(index * 7 & 0xFF for index in range(size))
        try:
            self._sock.sendall(data)
            got = bytearray()
            while len(got) < size:
                part = self._sock.recv(size - len(got))
                if not part:
                    return False
                got += part
        except OSError:
            return False
        return bytes(got) == data

    def close(self) -> None:
        """Close the TCP connection to the guest."""
        self._sock.close()
