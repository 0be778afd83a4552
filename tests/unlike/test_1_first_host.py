"""On the first host: guests with different CPUs are saved, for the other host to take.

``scripts/unlike-hosts`` runs this file and ``test_2_second_host.py``, each on a host of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vm_bench import Bench

from lab.emulator import MARKER

#: The lab hides CMPXCHG16B (docs/decisions/0010-the-labs-faults.md).
OFF = ",cx16=off" if os.environ.get(MARKER) else ""


@pytest.mark.parametrize("name", ["host", "x86-64-v2", "x86-64-v3"])
def test_a_guest_is_saved(bench: Bench, between: Path, name: str) -> None:
    guest = bench.boot("--cpu", name if name == "host" else f"{name}{OFF}", deadline=180.0)
    (between / f"{name}.cpuid").write_text(guest.agent.cpuid())
    saved = bench.folder / name  # where the VM, which is no root's any more, may write
    guest.vm.start_migration(f"file:{saved}")
    info = guest.vm.wait_migration(120.0)
    assert info["status"] == "completed", info
    assert guest.vm.quit() == 0
    shutil.move(saved, between / name)


def test_the_first_host_is_described(between: Path) -> None:
    command = [sys.executable, "-m", "godwit.cli.main", "cpu", "describe"]
    with (between / "first.json").open("wb") as file:
        subprocess.run(command, stdout=file, check=True)
