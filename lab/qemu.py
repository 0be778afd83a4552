"""A QEMU process beside :class:`lab.vm.LabVm`, with which the benchmark compares Godwit.

The program is Debian's qemu-system-x86_64, or another QEMU by its path. Its defaults stay, but for
what has to be alike: KVM, the host's CPU, vhost-net, a tap that exists, kernel, initrd and RAM.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import LabError
from .vm import LabVm

#: The system's QEMU. Another one, or a script that runs one, is a path.
PROGRAM = "qemu-system-x86_64"
_VERSION_S = 60.0


def find(program: str = PROGRAM) -> str:
    """Return the path of a QEMU's program.

    Raises:
        LabError: there is no such program.
    """
    found = shutil.which(program)
    if found is not None:
        return found
    if program == PROGRAM:
        raise LabError(f"{program} is missing: apt-get install qemu-system-x86")
    why = "may not be executed: chmod +x it" if Path(program).exists() else "no such file"
    raise LabError(f"the QEMU to compare with, {program}: {why}")


def version(program: str) -> str:
    """Return the first line that a QEMU prints for ``--version``.

    Raises:
        LabError: the program cannot be run.
    """
    argv = [program, "--version"]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_S,
            check=True,
        )
        return done.stdout.splitlines()[0]
    except subprocess.CalledProcessError as error:
        raise LabError(f"{program} --version: {(error.stderr or '').strip()[-300:]}") from error
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{program} --version: {error}") from error


def arguments(
    memory_mb: int,
    cpus: int,
    tap: str,
    mac: str,
    kernel: Sequence[str] = (),
    incoming: str | None = None,
) -> list[str]:
    """Return QEMU's arguments for a guest.

    ``kernel`` is kernel, initrd and command line, also where the guest comes from elsewhere: QEMU
    holds all three in ROMs, which must be there at both ends.
    """
    argv = ["-machine", "q35", "-m", f"{memory_mb}M", "-smp", str(cpus)]
    argv += ["-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no,vhost=on"]
    argv += ["-device", f"virtio-net-pci,netdev=net0,mac={mac}"]
    for option, value in zip(("-kernel", "-initrd", "-append"), kernel, strict=False):
        argv += [option, value]
    if incoming is not None:
        argv += ["-incoming", incoming]
    return argv


class Qemu(LabVm):
    """A QEMU process with the arguments that :func:`arguments` makes.

    Raises:
        LabError: there is no such program.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: Sequence[str],
        netns: str | None = None,
        program: str = PROGRAM,
    ) -> None:
        self._program = find(program)
        super().__init__(name, folder, arguments, netns)

    def _command(self) -> list[str]:
        argv = [self._program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-accel", "kvm", "-cpu", "host", "-serial", "stdio"]
        return [*argv, "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]

    def start_migration(self, uri: str, insecure: bool = False) -> None:
        """Start a migration with events, which QEMU sends on request alone."""
        events = [{"capability": "events", "state": True}]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": events})
        self.qmp.execute("migrate", {"uri": uri})

    def wait_migration(self, deadline: float = 60.0) -> dict[str, Any]:
        """Wait for the end of the migration that was begun, and return query-migrate's answer."""
        info = super().wait_migration(deadline)
        return {key: value for key, value in info.items() if key != "vfio"}
