"""The benchmark's constants: the measured parts, their repetitions and their loads.

A **job** is one guest of one VMM; its **parts** are measured one after the other, each a sample. A
job of disks has a guest of each VMM, and a sample of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

GODWIT, QEMU = "godwit", "qemu"
#: Another checkout of Godwit.
BASE = "base"
#: Godwit with ``vhost=off``: its own process carries the frames.
IN_PROCESS = "godwit-in-process"

#: Guests by name -> RAM, MB.
MEMORY_MB = {"small": 128, "hot": 512, "large": 2048, "in-process": 128, "disk": 256, "qcow2": 256}
#: Their parts, in order. All but boot, memory, network and limit are migrations.
PARTS = {
    "small": ("boot", "memory", "network", "idle", "idle-again", "udp", "tcp"),
    "hot": ("hot",),
    "large": ("2g", "limit"),
    "in-process": ("network",),
    "disk": ("fio",),
    "qcow2": ("fio-qcow2",),
}
#: Part that migrates -> the load. An idle guest migrates twice, with pings in two networks one
#: after the other, or each network's gap would have one sample or two.
MIGRATIONS = {
    "idle": "idle",
    "idle-again": "idle",
    "udp": "udp",
    "tcp": "tcp",
    "hot": "hot",
    "2g": "2g",
}
#: Time that a job may take in the emulated lab, seconds: twice the usual.
DEADLINE_S = {"small": 140, "hot": 60, "large": 110, "in-process": 60, "disk": 500, "qcow2": 500}

CPUS = 2
HOT_MB = 64
POPULATED_MB = 1536
LIMIT_MB = 512
#: A part that failed so often is given up.
ATTEMPTS = 2
#: Repetitions of the disk's part, which takes its time.
DISK_REPETITIONS = 2
NETWORKS = ("untagged", "vlan100", "vlan200")


@dataclass(frozen=True)
class Rates:
    """The rates of the measured guests' traffic."""

    ping_interval: float = 0.005
    """Seconds between two pings of a flow."""
    udp_rate: int = 1000
    """Numbered packets a second, of each flow and in each direction."""
    networks_at_once: int = 3
    """Networks with pings, or numbered flows, in one migration (the repetitions take turns)."""
    families_at_once: int = 2
    """Address families of the numbered flows."""
    stream_s: int = 5
    """Length of a measurement of throughput, of the network's or of a disk's, seconds."""
    round_trips: int = 500


#: The emulated lab's two CPUs saturate under six flows, and nothing else would be measured.
LAB = Rates(networks_at_once=1, stream_s=2, round_trips=150)


@dataclass(frozen=True)
class Job:
    """One guest with the parts to measure."""

    guest: str
    vmm: str
    repetition: int
    parts: tuple[str, ...]
    beside: tuple[str, ...] = ()
    """VMMs whose guests are measured with this one's, by turns."""
    looks: int = 4
    """Turns: a disk's rate depends on which memory fio happens to get."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, **{key: tuple(values[key]) for key in ("parts", "beside")}})


def jobs(repetitions: int, compared: Sequence[str] = (QEMU,)) -> list[Job]:
    """Return all jobs, in turns of the VMMs, where each repetition begins with another VMM.

    Disks take turns within a job.
    """
    found = []
    for number in range(repetitions):
        for guest in ("small", "hot", "large"):
            parts = PARTS[guest]
            if number >= len(NETWORKS):  # each network had its numbered flows by then
                parts = tuple(part for part in parts if part != "udp")
            found += _turns(guest, number, parts, compared)
        if number < DISK_REPETITIONS:
            for guest in ("disk", "qcow2"):
                found.append(Job(guest, GODWIT, number, PARTS[guest], tuple(compared)))
        if number % 3 == 0 and QEMU in compared:  # held against its vhost-net
            found.append(Job("in-process", IN_PROCESS, number, PARTS["in-process"]))
    return found


def quick_jobs(compared: Sequence[str] = (QEMU,)) -> list[Job]:
    """Return each job once, first the parts with a mark, then the others if time is left."""
    found = _turns("small", 0, ("boot", "memory", "network", "idle"), compared)
    for guest in ("large", "hot"):
        found += _turns(guest, 0, PARTS[guest], compared)
    found += _turns("small", 0, ("udp", "tcp"), compared)
    return [*found, Job("disk", GODWIT, 0, PARTS["disk"], tuple(compared), looks=2)]


def _turns(guest: str, number: int, parts: tuple[str, ...], compared: Sequence[str]) -> list[Job]:
    vmms = (GODWIT, *compared)
    first = number % len(vmms)
    # The limit is measured beside Godwit's migration: it is the socket's, not a VMM's.
    others = tuple(part for part in parts if part != "limit")
    return [
        Job(guest, vmm, number, parts if vmm == GODWIT else others)
        for vmm in (*vmms[first:], *vmms[:first])
    ]


def only_parts(planned: list[Job], parts: Sequence[str]) -> list[Job]:
    """Return the jobs with these parts alone, and none without any."""
    chosen = [replace(job, parts=tuple(p for p in job.parts if p in parts)) for job in planned]
    return [job for job in chosen if job.parts]


def _keys(job: Job, part: str) -> list[tuple[str, str, int, str]]:
    """Return what tells the samples of a part, the job's own first."""
    return [(job.guest, vmm, job.repetition, part) for vmm in (job.vmm, *job.beside)]


def left(planned: list[Job], rows: list[dict[str, Any]]) -> list[Job]:
    """Return the jobs with the parts alone that neither have a sample nor failed too often.

    A part that began and has no end (its lab died) counts as failed, but not one that the time cut
    off.
    """
    began: dict[tuple[str, str, int, str], int] = {}
    good = set()
    key = ("", "", 0, "")
    for row in rows:
        if row["state"] == "time is up":
            began[key] = began.get(key, 0) - 1
        if "part" in row:
            key = (row["guest"], row["vmm"], row["repetition"], row["part"])
            began[key] = began.get(key, 0) + (row["state"] == "began")
            if row["state"] == "done":
                good.add(key)
    found = []
    for job in planned:
        parts = tuple(
            part
            for part in job.parts
            if not good.issuperset(keys := _keys(job, part)) and began.get(keys[0], 0) < ATTEMPTS
        )
        if parts:
            found.append(replace(job, parts=parts))
    return found
