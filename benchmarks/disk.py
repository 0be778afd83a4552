"""fio in guests, from a stock Debian image, on disks whose images are in the host's memory.

All VMMs' guests are there at once, and one alone runs, for one look: a rate of the lab varies by
two within minutes, and so would a ratio of rates that were looked at one after the other.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lab import debian
from lab.addresses import LANS
from lab.agent import Agent
from lab.errors import LabError
from lab.network import Network, batch
from lab.vm import LabVm

_SIZE_MB = 256
#: What fio does -> its arguments.
WORK = {
    "seq_read": ("read", "1m", 4),
    "seq_write": ("write", "1m", 4),
    "rand_read_1": ("randread", "4k", 1),
    "rand_read_32": ("randread", "4k", 32),
    "rand_write_1": ("randwrite", "4k", 1),
    "rand_write_32": ("randwrite", "4k", 32),
}
#: Fields of fio's terse output, version 3, from 0: bandwidth in KiB/s of reads, of writes.
_FIELDS = {"read": 6, "write": 47}
#: States of a bridge's port (linux/if_bridge.h).
_DISABLED, _FORWARDING = 0, 3
_FIO = "chroot /mnt fio --minimal --terse-version=3 --thread --direct=1 --ioengine=libaio"


@dataclass(frozen=True)
class Disk:
    """An image, and how a VMM gives it to its guest."""

    path: Path
    readonly: bool = False
    format: str = "raw"

    def godwit(self) -> list[str]:
        return ["--disk", f"path={self.path}{',readonly' if self.readonly else ''}"]

    def qemu(self, number: int) -> list[str]:
        drive = f"file={self.path},if=none,id=disk{number},format={self.format},cache=writeback"
        drive += f",readonly={'on' if self.readonly else 'off'}"
        return ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{number}"]


def make(folder: Path, qcow2: bool) -> tuple[Disk, Disk]:
    """Return the disks of a guest: the system with fio, and a filled one in ``folder``.

    Godwit has a ``qcow2`` image served by qemu-storage-daemon.

    Raises:
        LabError: the system's image was not built.
    """
    system = debian.cached()
    if system is None:
        raise LabError("no Debian image in the cache: make setup")
    path = folder / "data.raw"
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(_SIZE_MB):
            file.write(block)
    if qcow2:
        raw, path = path, folder / "data.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, path], check=True)
        raw.unlink()
    return Disk(system.disk, readonly=True), Disk(path, format="qcow2" if qcow2 else "raw")


class Turns:
    """Guests of several VMMs with a disk each, of which one alone runs in :meth:`look`."""

    def __init__(self, net: Network) -> None:
        self._net = net
        self._vms: dict[str, tuple[LabVm, str]] = {}
        self._agent: Agent | None = None

    def add(self, vmm: str, vm: LabVm, tap: str, stack: ExitStack) -> None:
        """Take a guest that boots at ``tap`` of the first host, and runs until its first look."""
        # The bridge is not to remember at which of them their one address was last.
        batch("bridge", self._net.a.netns, [f"link set dev {tap} learning off"])
        vm.wait_ready(90)
        if self._agent is None:
            self._agent = stack.enter_context(Agent(LANS[0].guest[0], self._net.client.netns))
        self._agent.ping(30)
        self._agent.sh("modprobe virtio_blk; modprobe ext4; mkdir -p /mnt", 60)
        self._agent.sh("mount -o ro /dev/vda /mnt; mount --bind /dev /mnt/dev", 60)
        self._vms[vmm] = vm, tap

    def measure(self, seconds: float, looks: int) -> dict[str, dict[str, list[float]]]:
        """Return the rates of all :data:`WORK` by VMM, bytes a second, of looks by turns."""
        found = {vmm: {name: list[float]() for name in WORK} for vmm in self._vms}
        for turn in range(looks):
            for name in WORK:
                for vmm in sorted(self._vms, reverse=turn % 2 == 1):
                    found[vmm][name].append(self.look(vmm, name, seconds))
        return found

    def look(self, vmm: str, name: str, seconds: float) -> float:
        """Return the rate of one work, bytes a second, in half of ``seconds``.

        Raises:
            LabError: fio failed.
        """
        assert self._agent is not None
        work, block, depth = WORK[name]
        command = (
            f"{_FIO} --name={name} --filename=/dev/vdb --rw={work} --bs={block} --iodepth={depth} "
            f"--norandommap --time_based --runtime={seconds * 500:.0f}ms --ramp_time=500ms"
        )
        vm, tap = self._vms[vmm]
        self._set_port(tap, _FORWARDING)
        vm.qmp.execute("cont")
        self._agent.ping(30)
        fields = self._agent.sh(command, seconds + 60).strip().splitlines()[-1].split(";")
        self._stop(vmm)
        kind = work.removeprefix("rand")
        if fields[0] != "3" or fields[4] != "0":
            raise LabError(f"fio ended with an error: {fields[:6]}")
        return float(fields[_FIELDS[kind]]) * 1024

    def _stop(self, vmm: str) -> None:
        """Stop a guest, to which nothing comes meanwhile: they have one address."""
        vm, tap = self._vms[vmm]
        vm.qmp.execute("stop")
        self._set_port(tap, _DISABLED)

    def _set_port(self, tap: str, state: int) -> None:
        batch("bridge", self._net.a.netns, [f"link set dev {tap} state {state}"])
