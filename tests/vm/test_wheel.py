"""The wheel in an empty environment: ``godwit run`` boots a guest with msgspec and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from vm_bench import Bench, Watched

from lab import guest as guest_image
from lab import kernels
from lab.agent import Agent
from lab.network import Host
from lab.scenario import MAC
from tests import wheel

#: Without PYTHONPATH, by which this tree would take the wheel's place.
_ENV = {"PATH": os.environ["PATH"]}


class Installed(Watched):
    """A VM of the wheel's ``godwit``."""

    def __init__(self, programs: Path, folder: Path, argv: list[str], host: Host, tap: str) -> None:
        self._programs = programs
        super().__init__("installed", folder, argv, host, tap, env=_ENV)

    def _command(self) -> list[str]:
        return [str(self._programs / "godwit"), "run", "--qmp", str(self.qmp_path)]


@pytest.mark.timeout(360)
def test_the_wheels_command_boots_a_guest(bench: Bench) -> None:
    kernel = kernels.get("cloud-6.12")
    bench.drop_guest()
    host = bench.net.a
    tap = bench.free_tap(host)
    with TemporaryDirectory(prefix="godwit-") as name:  # /run may be noexec
        folder = Path(name)
        programs = wheel.install(wheel.build(folder), folder / "env")

        done = subprocess.run(
            [programs / "godwit", "run", "--kernel", folder / "none"],
            env=_ENV,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert str(folder / "none") in done.stderr

        argv = ["--kernel", str(kernel.vmlinuz), "--initrd", str(guest_image.build(kernel))]
        argv += ["--append", guest_image.CMDLINE, "--memory", "128M", "--cpus", "2"]
        argv += ["--nic", f"tap={tap},mac={MAC}"]
        vm = Installed(programs, bench.folder, argv, host, tap)
        bench.vms.append(vm)
        vm.wait_ready(120)
        assert vm.status() == "running"
        with Agent("10.0.0.2", bench.net.client.netns) as agent:
            agent.ping(60)
            assert agent.cpus() == 2
            bench.answers()
            agent.power_off()
        assert vm.wait(90) == 0
        (event,) = vm.news("SHUTDOWN")
        assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
