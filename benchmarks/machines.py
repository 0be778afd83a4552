"""The compared VMMs behind one face: a guest that boots, and a process that can receive one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import guest, qemu
from lab.errors import LabError
from lab.network import Host
from lab.vm import LabVm

from .disk import Disk
from .plan import BASE, CPUS, IN_PROCESS, QEMU

MAC = "52:54:00:67:77:01"
_ENDS = ("completed", "failed", "cancelled")
#: A look at the VMM's events costs the guest time, where the CPU is emulated, seconds. The times
#: that are kept are the VMM's own stamps, and do not depend on the look.
_LOOK_S = 0.1
#: Both copy as fast as they can: QEMU's own default is 128 MiB/s.
_UNLIMITED = 1 << 40
#: Idle share of the CPU time from which a start's work is over.
_IDLE = 0.8
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Image:
    """The kernel and initrd that guests boot, and the programs that Godwit is compared with."""

    kernel: str
    initrd: str
    qemu: str = qemu.PROGRAM
    base: str = ""
    """Another checkout of Godwit."""
    disks: tuple[Disk, ...] = ()

    @property
    def boot(self) -> tuple[str, str, str]:
        return self.kernel, self.initrd, guest.CMDLINE


def base_module(tree: Path) -> str:
    """Return the module that is the command ``godwit`` in a checkout, which may be an older one.

    Raises:
        LabError: the tree is no checkout of Godwit.
    """
    for file, module in (("cli/main.py", "godwit.cli.main"), ("cli.py", "godwit.cli")):
        if (tree / "src/godwit" / file).exists():
            return module
    raise LabError(f"the tree to compare with, {tree}: no src/godwit/cli/main.py and no cli.py")


class Base(LabVm):
    """A VM of another checkout of Godwit, under this one's client."""

    def __init__(
        self, name: str, folder: Path, arguments: Sequence[str], netns: str | None, tree: Path
    ) -> None:
        self._module = base_module(tree)
        env = {**os.environ, "PYTHONPATH": str(tree / "src")}
        super().__init__(name, folder, arguments, netns, env)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", self._module, "run", "--qmp", str(self.qmp_path)]


@dataclass(frozen=True)
class Migrated:
    """A migration's outcome, ``began`` and ``resumed`` realtime in seconds, other times in ms."""

    began: float
    resumed: float
    pause: float | None
    """From the source's STOP event to the destination's RESUME."""
    info: dict[str, Any]


def boot(vmm: str, name: str, folder: Path, host: Host, memory_mb: int, image: Image) -> LabVm:
    """Start a process that boots a guest."""
    if vmm == QEMU:
        argv = qemu.arguments(memory_mb, CPUS, host.tap, MAC, image.boot)
        argv += [word for number, disk in enumerate(image.disks) for word in disk.qemu(number)]
        return qemu.Qemu(name, folder, argv, host.netns, image.qemu)
    argv = ["--kernel", image.kernel, "--initrd", image.initrd, "--append", guest.CMDLINE]
    argv += [word for disk in image.disks for word in disk.godwit()]
    return _godwit(vmm, name, folder, argv, host, memory_mb, image)


def await_guest(
    vmm: str, name: str, folder: Path, host: Host, memory_mb: int, image: Image
) -> tuple[LabVm, str]:
    """Start a process that waits for a guest, and return the process and its URI."""
    socket = folder / f"{name}.migration"
    socket.unlink(missing_ok=True)
    uri = f"unix:{socket}"
    if vmm == QEMU:
        argv = qemu.arguments(memory_mb, CPUS, host.tap, MAC, image.boot, uri)
        return qemu.Qemu(name, folder, argv, host.netns, image.qemu), uri
    return _godwit(vmm, name, folder, ["--incoming", uri], host, memory_mb, image), uri


def _godwit(
    vmm: str, name: str, folder: Path, first: list[str], host: Host, memory_mb: int, image: Image
) -> LabVm:
    nic = f"tap={host.tap},mac={MAC}"
    if vmm == IN_PROCESS:
        nic += ",vhost=off"
    shared = ",shared=on" if any(disk.format != "raw" for disk in image.disks) else ""
    argv = [*first, "--memory", f"{memory_mb}M{shared}", "--cpus", str(CPUS), "--nic", nic]
    if vmm == BASE:
        return Base(name, folder, argv, host.netns, Path(image.base))
    return LabVm(name, folder, argv, host.netns)


def migrate(source: LabVm, target: LabVm, uri: str, deadline: float = 90.0) -> Migrated:
    """Migrate the guest, and wait until the target runs.

    Raises:
        LabError: the migration failed, or did not end within ``deadline`` seconds.
    """
    if isinstance(source, qemu.Qemu):
        source.qmp.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})
    source.qmp.events()
    target.qmp.events()
    began = time.time()
    source.start_migration(uri)
    seen: list[Event] = []
    end = time.monotonic() + deadline
    while not [event for event in seen if _is_end(event)]:
        if time.monotonic() > end or not source.alive:
            raise LabError(f"the migration did not end within {deadline:g} s")
        time.sleep(_LOOK_S)
        seen += source.qmp.events()
    info = dict(source.qmp.execute("query-migrate"))
    if info["status"] != "completed":
        raise LabError(f"the migration ended as {info['status']}: {info.get('error-desc', '')}")
    resumed = stamp(target.qmp.wait_event("RESUME", 30))
    stops = [stamp(event) for event in seen if event["event"] == "STOP"]
    pause = (resumed - stops[-1]) * 1000 if stops else None
    return Migrated(began, resumed, pause, info)


def _is_end(event: Event) -> bool:
    return event["event"] == "MIGRATION" and event["data"]["status"] in _ENDS


def stamp(event: Event) -> float:
    """Return the time of an event, realtime in seconds."""
    at = event["timestamp"]
    return float(at["seconds"] + at["microseconds"] / 1e6)


def settle(limit: int = 8) -> float:
    """Wait until the CPUs are idle, at most ``limit`` seconds, and return the idle share (0 to 1).

    After a boot or a start the host still has work, which on two slow CPUs would be measured.
    """
    idle = 0.0
    for _ in range(limit):
        before = _cpu_times()
        time.sleep(1)
        spent = [b - a for a, b in zip(before, _cpu_times(), strict=True)]
        idle = spent[3] / max(1, sum(spent))  # proc_stat(5): user, nice, system, idle
        if idle > _IDLE:
            break
    return round(idle, 2)


def _cpu_times() -> list[int]:
    """Return the CPU times of the CPUs that may be used (the lab has one that stands aside)."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    with open("/proc/stat") as file:
        lines = [line.split() for line in file]
    times = [map(int, words[1:9]) for words in lines if words[0] in ours]
    return [sum(column) for column in zip(*times, strict=True)]
