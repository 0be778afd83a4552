"""Nothing heavy is imported on the way to a running guest: on a slow host each library costs more
than all of Godwit does. (import-linter checks the same for Godwit's own lines; this counts what
libraries bring along as well.)"""

import subprocess
import sys

import pytest

HEAVY = {
    "asyncio",
    "dataclasses",
    "hashlib",
    "inspect",
    "typing_extensions",
    "logging",
    "matplotlib",
    "pyroute2",
    "qemu.qmp",
    "rich",
    "scapy",
    "ssl",
    "subprocess",
}

_LOADED = """
import sys
import godwit.lean
before = set()
{imports}
print(*sorted(set(sys.modules) - before))
"""


def loaded(*modules: str) -> set[str]:
    """What a fresh interpreter loads for ``modules``."""
    script = _LOADED.format(imports="\n".join(f"import {module}" for module in modules))
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules",
    [
        ("godwit.cli",),
        ("godwit.cli", "godwit.terminal", "godwit.vmm"),
        ("godwit.vmm", "godwit.migration.source", "godwit.migration.destination"),
    ],
    ids=["command line", "run", "move"],
)
def test_nothing_heavy_is_loaded(modules: tuple[str, ...]) -> None:
    found = loaded(*modules)
    assert set(modules) <= found
    assert found & HEAVY == set()


def test_a_guest_boots_without_the_code_for_moving_it() -> None:
    # vmm imports it when the guest is on its way.
    found = loaded("godwit.cli", "godwit.terminal", "godwit.vmm")
    assert not {name for name in found if name.startswith(("godwit.migration", "godwit.lab"))}


def test_a_guest_boots_without_the_code_for_other_nics() -> None:
    assert "godwit.nic.e1000.nic" not in loaded("godwit.cli", "godwit.terminal", "godwit.vmm")


def test_the_check_sees_what_is_loaded() -> None:
    assert "dataclasses" in loaded("godwit.lab.addresses")
