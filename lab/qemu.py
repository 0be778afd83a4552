"""A QEMU process beside :class:`godwit.client.vm.Vm`: what the benchmark compares Godwit with.

It is Debian's qemu-system-x86_64 with its own defaults, but for what has to be alike: KVM, the
host's CPU, vhost-net, a tap that exists, kernel, initrd and RAM.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from godwit.client.vm import Vm
from godwit.errors import HostError


def arguments(
    memory_mb: int,
    cpus: int,
    tap: str,
    mac: str,
    kernel: Sequence[str] = (),
    incoming: str | None = None,
) -> list[str]:
    """QEMU's arguments for a guest. ``kernel``: kernel, initrd and command line, also where the
    guest comes from elsewhere (QEMU holds them in ROMs, which must be there at both ends)."""
    argv = ["-machine", "q35", "-m", f"{memory_mb}M", "-smp", str(cpus)]
    argv += ["-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no,vhost=on"]
    argv += ["-device", f"virtio-net-pci,netdev=net0,mac={mac}"]
    for option, value in zip(("-kernel", "-initrd", "-append"), kernel, strict=False):
        argv += [option, value]
    if incoming is not None:
        argv += ["-incoming", incoming]
    return argv


class Qemu(Vm):
    """The process; ``arguments`` as :func:`arguments` makes them. Raises HostError without QEMU."""

    def __init__(
        self, name: str, folder: Path, arguments: Sequence[str], netns: str | None = None
    ) -> None:
        found = shutil.which("qemu-system-x86_64")
        if found is None:
            raise HostError("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
        self._program = found
        super().__init__(name, folder, arguments, netns)

    def _command(self) -> list[str]:
        argv = [self._program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-accel", "kvm", "-cpu", "host", "-serial", "stdio"]
        return [*argv, "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]

    def start_move(self, uri: str, insecure: bool = True) -> None:
        """Begin to migrate, with events, which QEMU sends only if asked to."""
        events = [{"capability": "events", "state": True}]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": events})
        self.qmp.execute("migrate", {"uri": uri})

    def wait_move(self, deadline: float = 60.0) -> dict[str, Any]:
        """Wait for the end of the move that was started; query-migrate's answer."""
        info = super().wait_move(deadline)
        return {key: value for key, value in info.items() if key != "vfio"}
