"""A guest at a real terminal: raw keys to its shell, and the escape that leaves it."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from vm_bench import Bench

from lab import guest as guest_image
from lab import kernels


class Terminal:
    """``godwit run`` with a pseudo-terminal as its terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        argv = [sys.executable, "-m", "godwit.cli.main", "run", *arguments]
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        self.slave = slave
        self.text = b""

    def wait(self, sought: bytes, deadline: float = 120.0) -> None:
        """Until it is printed, after what was printed before."""
        end = time.monotonic() + deadline
        while sought not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"no {sought!r} in {self.text!r}"
            if select.select([self.master], [], [], left)[0]:
                self.text += os.read(self.master, 4096)
        self.text = self.text.split(sought, 1)[1]

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(bench: Bench) -> Iterator[Terminal]:
    bench.drop_guest()
    image = kernels.cached("cloud-6.12")
    assert image is not None
    terminal = Terminal(
        *("--kernel", str(image.vmlinuz), "--initrd", str(guest_image.build(image))),
        *("--append", f"{guest_image.CMDLINE} godwit.net=off godwit.shell", "--memory", "128M"),
    )
    yield terminal
    terminal.close()


def test_a_shell_in_the_guest_and_the_escape(terminal: Terminal) -> None:
    terminal.wait(b"ctrl-] ends the VM")
    terminal.wait(b"# ")
    terminal.type(b"echo $((6*7)); sleep 1000\r")
    terminal.wait(b"42")
    assert not termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    # ctrl-C is the guest's: it ends the sleep there, and not the VM here.
    terminal.type(b"\x03")
    terminal.wait(b"# ")
    terminal.type(b"echo still $((40+3))\r")
    terminal.wait(b"still 43")
    assert terminal.process.poll() is None
    terminal.type(b"\x1d")
    terminal.wait(b"left the console; the VM ends")
    assert terminal.process.wait(30) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_nothing_typed_or_pasted_is_lost(terminal: Terminal) -> None:
    terminal.wait(b"ctrl-] ends the VM")
    terminal.type(b"echo early $((40+4))\r")  # no driver has the port yet
    terminal.wait(b"early 44")
    lines = [f"{number:08} {'pasted ' * 7}" for number in range(200_000 // 58)]
    terminal.type(b"stty -echo; echo ready; cat > /tmp/pasted; sha256sum /tmp/pasted\r")
    terminal.wait(b"\nready")
    # What a terminal sends for a paste: as much as it takes, at once.
    text = "".join(f"{line}\n" for line in lines).encode()
    terminal.type(text + b"\x04")
    terminal.wait(hashlib.sha256(text).hexdigest().encode(), 300)
