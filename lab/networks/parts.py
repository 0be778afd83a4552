"""Parts of the networks: namespaces, daemons in the foreground, and waiting for their answers."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import LabError
from ..netns import entering, inside
from ..network import PREFIX, TAP_QUEUE, batch, sysctl
from ..traffic import Program

#: How long a daemon may take for a step, seconds, on an emulated CPU.
STEP_S = 30.0
_COMMAND_S = 60.0


@contextmanager
def namespaces(*names: str) -> Iterator[list[str]]:
    """Make a namespace for each name, and remove all of them at the block's end.

    Their kernel settings are the defaults, but for duplicate address detection and router
    solicitations, which are off.
    """
    own = [f"{PREFIX}{os.getpid()}-{name}" for name in names]
    try:
        batch("ip", None, [f"netns add {name}" for name in own])
        for name in own:
            with inside(name):
                for key in ("accept_dad", "accept_ra", "router_solicitations"):
                    for scope in ("default", "all"):
                        sysctl(f"net/ipv6/conf/{scope}/{key}", "0")
        for name in own:
            batch("ip", name, ["link set lo up"])
        yield own
    finally:
        for name in own:
            if Path(f"/run/netns/{name}").exists():
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def forward(netns: str) -> None:
    """Have a namespace route IPv4 and IPv6."""
    with inside(netns):
        sysctl("net/ipv4/ip_forward", "1")
        sysctl("net/ipv6/conf/all/forwarding", "1")


def tap(name: str) -> list[str]:
    """Return the ``ip`` commands that make a guest's tap."""
    return [
        f"tuntap add {name} mode tap vnet_hdr",
        f"link set {name} txqueuelen {TAP_QUEUE} up",
    ]


class Daemon(Program):
    """A program that runs in the foreground of a namespace until the block's end."""

    def __init__(self, netns: str, argv: Sequence[str], log: Path, name: str = "") -> None:
        super().__init__(netns, list(argv), log)
        self.name = name or Path(argv[0]).name

    def check(self) -> None:
        """Raise an error if the program has exited.

        Raises:
            LabError: the program has exited.
        """
        status = self._process.poll()
        if status is not None:
            text = self._output.read_text(errors="replace")[-500:]
            raise LabError(f"{self.name} exited with {status}: {text}")


def ask(netns: str | None, argv: Sequence[str]) -> str:
    """Run a command in a namespace, and return the output.

    Raises:
        LabError: the command is missing, fails or takes too long.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            preexec_fn=entering(netns) if netns else None,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{argv[0]}: {error}; run scripts/setup") from error
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def wait(what: str, condition: Callable[[], bool], deadline: float = STEP_S) -> None:
    """Ask until ``condition`` holds.

    Raises:
        LabError: ``condition`` does not hold within ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {deadline:g} s")
        time.sleep(0.1)  # what is asked for has no event of its own
