"""Client of the agent that runs in the lab's guest (guest_files/control.c)."""

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
#: A guest that is silent for so long, s, hangs; it is given up as one that does not after so long.
_SILENT_S = 1.0
_HANGS_S = 10.0


@dataclass(frozen=True)
class Flow:
    """What the guest counted of one numbered flow."""

    id: int
    received: int
    duplicates: int
    reordered: int
    max_seq: int
    longest_gap_us: int
    """Longest time between two arrivals, by the guest's clock."""

    def lost(self, sent: int) -> int:
        """Packets that never arrived, of so many sent."""
        return sent - (self.received - self.duplicates)


class Agent:
    """One guest's agent, reached at an address from a network namespace (None: this one).

    Every request is repeated until it is answered or its deadline passes (AgentError); the agent
    does a repeated request only once.
    """

    def __init__(self, address: str, netns: str | None = None, port: int = CONTROL) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(netns):
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._peer = (address, port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ask(self, command: str, timeout_s: float = 10.0) -> str:
        """The answer to one command. Raises AgentError."""
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
        """Returns once the agent answers."""
        self.ask("ping", timeout_s)

    def flows(self) -> dict[int, Flow]:
        """What was counted since the last reset, by flow id."""
        rows = (Flow(*map(int, line.split())) for line in self.ask("flows").splitlines())
        return {flow.id: flow for flow in rows}

    def reset_flows(self) -> None:
        self.ask("reset-flows")

    def cpus(self) -> int:
        return int(self.ask("cpus"))

    def clock(self) -> tuple[int, int]:
        """(realtime, monotonic), ns."""
        real, mono = self.ask("clock").split()
        return int(real), int(mono)

    def mem_start(self, megabytes: int) -> str:
        """Fill so much memory with a pattern; its checksum."""
        return self.ask(f"mem start {megabytes}", 120.0).split()[1]

    def mem_fill(self, megabytes: int) -> None:
        """Have so much memory in use, each page with other contents; nothing checks it."""
        self.ask(f"mem fill {megabytes}", 120.0)

    def mem_check(self) -> str:
        """The checksum of that memory now. Raises AgentError if it changed."""
        return self._good(self.ask("mem check", 120.0))

    def hot_start(self, megabytes: int) -> None:
        """Start a thread that writes every page of so much memory, again and again."""
        self.ask(f"hot start {megabytes}", 30.0)

    def hot_check(self) -> int:
        """Passes over the memory so far. Raises AgentError if a page was found wrong."""
        return int(self._good(self.ask("hot check", 30.0)))

    def hot_stop(self) -> int:
        """As hot_check, and end the thread."""
        return int(self._good(self.ask("hot stop", 30.0)))

    @staticmethod
    def _good(answer: str) -> str:
        verdict, value = answer.split()
        if verdict != "ok":
            raise AgentError(f"the guest's memory is corrupt: {answer}")
        return value

    def udp_send(self, address: str, port: int, flow: int, rate: int, count: int) -> None:
        """Let the guest send so many numbered packets, ``rate`` a second."""
        self.ask(f"udp-send {address} {port} {flow} {rate} {count}")

    def udp_stop(self) -> dict[int, int]:
        """End the flows of udp_send: flow id -> packets that the guest sent since the last time."""
        rows = (line.split() for line in self.ask("udp-stop").splitlines())
        return {int(flow): int(sent) for flow, sent in rows}

    def sh(self, command: str, timeout_s: float = 30.0) -> str:
        """Output of a shell command in the guest. Raises AgentError if it fails."""
        output, _, last = self.ask(f"sh {command}", timeout_s).rpartition("exit ")
        if last != "0":
            raise AgentError(f"in the guest, {command!r} ended with {last}: {output}")
        return output

    def hang(self, seconds: float) -> None:
        """Have the guest serve nothing but interrupts for so long; returns once it does.

        Raises:
            AgentError: it goes on answering.
        """
        self.ask(f"hang {seconds}")  # it begins a second after this answer
        deadline = time.monotonic() + _HANGS_S
        while time.monotonic() < deadline:
            try:
                self.ping(_SILENT_S)
            except AgentError:
                return
        raise AgentError(f"the guest still answers {_HANGS_S:g} s after it was told to hang")

    def flood(self, interface: str, count: int) -> int:
        """Send so many gratuitous ARPs, each of another MAC, IP and VLAN; how many were taken."""
        return int(self.ask(f"flood {interface} {count}", 120.0))

    def power_off(self) -> None:
        self.ask("poweroff")

    def reboot(self) -> None:
        self.ask("reboot")

    def crash(self) -> None:
        """Triple fault."""
        self.ask("crash")
