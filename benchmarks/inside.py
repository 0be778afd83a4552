"""``python -m benchmarks.inside PLAN``: the jobs of a plan, where KVM works.

Nothing is judged here. Each sample goes at once into the plan's file of rows, a line of JSON each,
because the emulated host may die at any time. Each job is a child of its own, with a deadline.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from godwit.client.errors import ClientError
from lab import qemu
from lab.errors import LabError
from lab.network import Host, Network
from lab.vm import LabVm, vm_folder

from . import disk, machines, parts, plan
from .machines import Image


class Rows:
    """The file of rows, one for each sample."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **row: Any) -> None:
        """Append a row, and have the row on the disk before anything else happens."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


#: Guests of which each VMM has one at once.
_DISKS = ("disk", "qcow2")
#: Part -> method, where the name of the part is no name of a method.
_METHODS = {"2g": "large", "idle-again": "idle_again"}


def run(job: plan.Job, rates: plan.Rates, image: Image, rows: Rows) -> None:
    """Measure the parts of one job.

    Raises:
        LabError, ClientError: the job cannot go on.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(vm_folder())  # not the shared folder, slow in the lab
        guest: parts.Measured | None = None
        for part in job.parts:
            row = {"guest": job.guest, "vmm": job.vmm, "repetition": job.repetition, "part": part}
            rows.add(state="began", at=time.time(), **row)
            try:
                if part == "limit":
                    sample = parts.limit()
                else:
                    if guest is None:
                        net = stack.enter_context(Network())
                        guest = parts.Measured(job, rates, image, net, folder, stack)
                    sample = getattr(guest, _METHODS.get(part, part))()
            except (LabError, ClientError, OSError, KeyError) as error:
                text = f"{type(error).__name__}: {error}"[-600:]
                printed = guest.printed() if guest is not None else {}
                rows.add(state="failed", error=text, printed=printed, **row)
                raise
            rows.add(state="done", at=time.time(), **row, **sample)
            log(f"{part:8} {_short(sample)}")


def run_disks(job: plan.Job, rates: plan.Rates, image: Image, rows: Rows) -> None:
    """Measure the disks of all VMMs of a job by turns.

    Raises:
        LabError, ClientError: the job cannot go on.
    """
    row = {"guest": job.guest, "repetition": job.repetition, "part": job.parts[0]}
    began = time.time()
    rows.add(state="began", at=began, vmm=job.vmm, **row)
    vms: list[LabVm] = []
    with ExitStack() as stack:
        try:
            net = stack.enter_context(Network())
            turns = disk.Turns(net)
            vmms = (job.vmm, *job.beside)
            taps = [f"disk{number}" for number in range(len(vmms))]
            net.add_taps(net.a, taps)
            for vmm, tap in zip(vmms, taps, strict=True):
                folder = stack.enter_context(vm_folder("/run"))  # a tmpfs
                one = replace(image, disks=disk.make(folder, job.guest == "qcow2"))
                host, memory = replace(net.a, tap=tap), plan.MEMORY_MB[job.guest]
                vm = stack.enter_context(machines.boot(vmm, vmm, folder, host, memory, one))
                vms.append(vm)
                turns.add(vmm, vm, tap, stack)
                machines.settle()
                turns.look(vmm, "rand_read_32", rates.stream_s)  # with cold caches: uncounted
            found = turns.measure(rates.stream_s, job.looks)
        except (LabError, ClientError, OSError, LookupError, ValueError, SubprocessError) as error:
            text = f"{[vm.name for vm in vms]}: {type(error).__name__}: {error}"[-600:]
            printed = {vm.name: vm.console[-1500:] for vm in vms}
            rows.add(state="failed", error=text, printed=printed, vmm=job.vmm, **row)
            raise
    at = time.time()
    for vmm in job.beside:
        rows.add(state="began", at=began, vmm=vmm, **row)
        rows.add(state="done", at=at, vmm=vmm, fio=found[vmm], **row)
    rows.add(state="done", at=at, vmm=job.vmm, fio=found[job.vmm], **row)


def run_apart(job: plan.Job, rates: plan.Rates, image: Image, rows: Rows, deadline: float) -> None:
    """Run the job in a child, killed with all of its processes after ``deadline`` seconds."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        status = 1
        try:
            (run_disks if job.guest in _DISKS else run)(job, rates, image, rows)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + deadline
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.1)
    try:
        os.killpg(child, signal.SIGKILL)  # also what a failed job left behind
    except ProcessLookupError:
        return
    try:
        os.waitpid(child, 0)
        log("no exit in time: given up")
    except ChildProcessError:
        pass


def warm_up(image: Image, vmms: Sequence[str]) -> None:
    """Start a guest with each VMM, unmeasured, so that no sample pays for cold caches.

    The caches are the page cache, and in the emulated lab also the one of translated code.
    """
    for path in (image.kernel, image.initrd):
        Path(path).read_bytes()
    with vm_folder() as folder, Network() as net, ExitStack() as stack:
        hosts: dict[Host, LabVm] = {}
        for number, vmm in enumerate(vmms):
            host = (net.a, net.b)[number % 2]
            before = hosts.get(host)
            if before is not None:  # this VM has the tap
                before.qmp.execute("query-status", deadline=60)
                before.close()
            vm = machines.boot(vmm, vmm, folder, host, 128, image)
            hosts[host] = stack.enter_context(vm)
        for vm in hosts.values():
            vm.qmp.execute("query-status", deadline=60)


def machine(compared: str) -> dict[str, Any]:
    """Return this machine's description, with the version of the QEMU compared ("": none)."""
    cpus = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in cpus.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.version(qemu.find(compared)) if compared else None,
    }


def _short(sample: dict[str, Any]) -> str:
    """Return the numbers of a sample in a line."""
    numbers = {key: value for key, value in sample.items() if isinstance(value, (int, float))}
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


_START = time.monotonic()


def log(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"  [{time.monotonic() - _START:6.1f} s] {text}", flush=True)


def main() -> None:
    """Do the jobs of the plan that the command line names."""
    given = json.loads(Path(sys.argv[1]).read_text())
    rows = Rows(Path(given["rows"]))
    image = Image(given["kernel"], given["initrd"], given["qemu"], given["base"])
    rates = plan.Rates(**given["rates"])
    vmms: list[str] = given["vmms"]
    rows.add(state="machine", **machine(image.qemu if plan.QEMU in vmms else ""))
    warm_up(image, vmms)
    log("warmed up")
    for number, values in enumerate(given["jobs"], given["before"] + 1):
        job = plan.Job.from_json(values)
        measured = " and ".join((job.vmm, *job.beside))
        of = f"{measured}, {job.guest} guest, repetition {job.repetition + 1}"
        log(f"job {number} of {given['in_all']}: {of}")
        run_apart(job, rates, image, rows, plan.DEADLINE_S[job.guest])


if __name__ == "__main__":
    main()
