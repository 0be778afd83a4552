"""A client of the agent that runs in the lab's guest (guest_files/control.c)."""

import secrets
import select
import socket
import time
from dataclasses import dataclass
from typing import Self

from .errors import AgentError
from .netns import inside

CONTROL, SINK, ECHO, DISCARD, SOURCE = 7000, 7001, 7002, 7003, 7004
"""The agent's ports: control (UDP), numbered packets (UDP); echo, discard and source (TCP)."""

_REPEAT_S = 0.25
#: A guest hangs that is silent for the first time, seconds. One that goes on answering for the
#: second time is given up.
_SILENT_S = 1.0
_HANGS_S = 10.0


@dataclass(frozen=True)
class Flow:
    """The guest's counts of one numbered flow."""

    id: int
    received: int
    duplicates: int
    reordered: int
    max_seq: int
    longest_gap_us: int
    """Longest time between two arrivals, by the guest's clock, in microseconds."""

    def lost(self, sent: int) -> int:
        """Return the number of packets that never arrived, of ``sent``."""
        return sent - (self.received - self.duplicates)


class Agent:
    """A connection to one guest's agent, from a network namespace (None: this process's).

    With a ``device``, frames go by that interface alone, as they have to in a VRF.
    Every request is repeated until an answer comes or the deadline passes (AgentError). The agent
    does a repeated request only once.
    """

    def __init__(
        self, address: str, netns: str | None = None, port: int = CONTROL, device: str = ""
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(netns):
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            if device:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        self._peer = (address, port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ask(self, command: str, timeout_s: float = 10.0) -> str:
        """Send one command, and return the agent's answer.

        Raises:
            AgentError: the agent refused, or did not answer within ``timeout_s`` seconds.
        """
        tag = f"#{secrets.token_hex(8)} ".encode()
        deadline = time.monotonic() + timeout_s
        while (now := time.monotonic()) < deadline:
            try:
                self._socket.sendto(tag + command.encode(), self._peer)
            except OSError:
                pass  # no route or no neighbour yet: the same as a lost packet
            answer = self._receive(tag, min(deadline, now + _REPEAT_S))
            if answer is not None:
                if answer.startswith("error"):
                    raise AgentError(f"the guest's agent to {command!r}: {answer}")
                return answer
        raise AgentError(f"no answer from {self._peer[0]} to {command!r} within {timeout_s:g} s")

    def _receive(self, tag: bytes, until: float) -> str | None:
        while select.select([self._socket], [], [], max(0.0, until - time.monotonic()))[0]:
            try:
                data = self._socket.recv(65536)
            except OSError:
                continue  # an ICMP error for an earlier try
            if data.startswith(tag):
                return data[len(tag) :].decode(errors="replace")
        return None

    def ping(self, timeout_s: float = 10.0) -> None:
        """Wait until the guest's agent answers."""
        self.ask("ping", timeout_s)

    def flows(self) -> dict[int, Flow]:
        """Return the guest's counts since the last reset, by flow id."""
        rows = (Flow(*map(int, line.split())) for line in self.ask("flows").splitlines())
        return {flow.id: flow for flow in rows}

    def reset_flows(self) -> None:
        self.ask("reset-flows")

    def cpus(self) -> int:
        return int(self.ask("cpus"))

    def cpuid(self) -> str:
        """Return what the guest's first CPU answers to CPUID now, a line a leaf."""
        return self.ask("cpuid")

    def clock(self) -> tuple[int, int]:
        """Return the guest's clocks (realtime, monotonic), nanoseconds."""
        real, mono = self.ask("clock").split()
        return int(real), int(mono)

    def mem_start(self, megabytes: int) -> str:
        """Fill ``megabytes`` of memory with a pattern, and return the checksum."""
        return self.ask(f"mem start {megabytes}", 120.0).split()[1]

    def mem_fill(self, megabytes: int) -> None:
        """Have ``megabytes`` of memory in use, unchecked and each page with other contents."""
        self.ask(f"mem fill {megabytes}", 120.0)

    def mem_check(self) -> str:
        """Return the present checksum of the memory that :meth:`mem_start` filled.

        Raises:
            AgentError: the memory changed.
        """
        return self._good(self.ask("mem check", 120.0))

    def hot_start(self, megabytes: int) -> None:
        """Start a thread that writes every page of ``megabytes`` of memory again and again."""
        self.ask(f"hot start {megabytes}", 30.0)

    def hot_check(self) -> int:
        """Return how often the thread has been over the memory.

        Raises:
            AgentError: the thread found a wrong page.
        """
        return int(self._good(self.ask("hot check", 30.0)))

    def hot_stop(self) -> int:
        """End the thread, and return how often the thread was over the memory.

        Raises:
            AgentError: the thread found a wrong page.
        """
        return int(self._good(self.ask("hot stop", 30.0)))

    @staticmethod
    def _good(answer: str) -> str:
        verdict, value = answer.split()
        if verdict != "ok":
            raise AgentError(f"the guest's memory is corrupt: {answer}")
        return value

    def udp_send(self, address: str, port: int, flow: int, rate: int, count: int) -> None:
        """Have the guest send ``count`` numbered packets, ``rate`` a second."""
        self.ask(f"udp-send {address} {port} {flow} {rate} {count}")

    def udp_stop(self) -> dict[int, int]:
        """End the flows of udp_send, and return the packets since the last time, by flow id."""
        rows = (line.split() for line in self.ask("udp-stop").splitlines())
        return {int(flow): int(sent) for flow, sent in rows}

    def sh(self, command: str, timeout_s: float = 30.0) -> str:
        """Run a shell command in the guest, and return the output.

        Raises:
            AgentError: the command failed.
        """
        output, _, last = self.ask(f"sh {command}", timeout_s).rpartition("exit ")
        if last != "0":
            raise AgentError(f"in the guest, {command!r} ended with {last}: {output}")
        return output

    def vsock(self, command: str, timeout_s: float = 60.0) -> str:
        """Have the guest serve or use vsock streams (guest_files/vsock.c); returns the answer.

        Raises:
            AgentError: the command failed.
        """
        return self.ask(f"vsock {command}", timeout_s)

    def join(self, group: str, interface: str = "eth0") -> None:
        """Make the guest a member of a multicast group, whose packets reach its sink."""
        self.ask(f"join {group} {interface}")

    def hang(self, seconds: float) -> None:
        """Have the guest serve only interrupts for ``seconds``, and wait until the hang begins.

        Raises:
            AgentError: the guest goes on answering.
        """
        self.ask(f"hang {seconds}")  # it begins a second after this answer
        deadline = time.monotonic() + _HANGS_S
        while time.monotonic() < deadline:
            try:
                self.ping(_SILENT_S)
            except AgentError:
                return
        raise AgentError(f"the guest still answers {_HANGS_S:g} s after the request to hang")

    def flood(self, interface: str, count: int) -> int:
        """Have the guest send ``count`` gratuitous ARPs, and return how many its kernel took.

        Each is of another MAC, IP address and VLAN.
        """
        return int(self.ask(f"flood {interface} {count}", 120.0))

    def power_off(self) -> None:
        self.ask("poweroff")

    def reboot(self) -> None:
        self.ask("reboot")

    def crash(self) -> None:
        """Have the guest cause a triple fault."""
        self.ask("crash")
