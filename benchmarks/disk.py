"""fio in the guest, from a stock Debian image, on a disk whose image is in the host's memory."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import debian
from lab.agent import Agent
from lab.errors import LabError

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
#: How often each is measured in one boot: its rate depends on which memory fio happens to get.
_LOOKS = 3
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


def measure(agent: Agent, seconds: float) -> dict[str, list[float]]:
    """Return the rates of all :data:`WORK`, bytes a second, of some looks by turns.

    Each look takes half of ``seconds``.
    """
    agent.sh("modprobe virtio_blk; modprobe ext4; mkdir -p /mnt; mount -o ro /dev/vda /mnt", 60)
    agent.sh("mount --bind /dev /mnt/dev")
    found: dict[str, list[float]] = {name: [] for name in WORK}
    for name in [*WORK] * _LOOKS:
        work, block, depth = WORK[name]
        command = (
            f"{_FIO} --name={name} --filename=/dev/vdb --rw={work} --bs={block} --iodepth={depth} "
            f"--norandommap --time_based --runtime={seconds * 500:.0f}ms --ramp_time=500ms"
        )
        fields = agent.sh(command, seconds + 60).strip().splitlines()[-1].split(";")
        kind = work.removeprefix("rand")
        if fields[0] != "3" or fields[4] != "0":
            raise LabError(f"fio ended with an error: {fields[:6]}")
        found[name].append(float(fields[_FIELDS[kind]]) * 1024)
    return found
