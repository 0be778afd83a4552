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
{first}
before = set()
{imports}
print(*sorted(set(sys.modules) - before))
"""


def loaded(*modules: str) -> set[str]:
    """What a fresh interpreter loads for ``modules``; lean is imported before the heavy ones."""
    heavy = set(modules) - {"godwit.cli", "godwit.terminal"}
    script = _LOADED.format(
        first="import godwit.lean" if heavy else "",
        imports="\n".join(f"import {module}" for module in modules),
    )
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


def test_a_guest_is_on_its_way_before_its_devices_are_imported() -> None:
    # The list of what it waits for: terminal imports all the rest after the head start.
    found = {name for name in loaded("godwit.cli", "godwit.terminal") if "godwit" in name}
    rooms = {name.split(".")[1] for name in found if "." in name}
    assert rooms == {
        *("board", "cli", "config", "errors", "hw", "kvm", "loop", "machine_types"),
        *("terminal", "vcpu"),
    }
    hardware = {name.split(".")[2] for name in found if name.startswith("godwit.hw.")}
    assert hardware == {"acpi", "aml", "bus", "console", "layout", "linuxboot", "memory"}


def test_a_guest_boots_without_the_code_for_moving_it() -> None:
    # vmm imports it when the guest is on its way.
    found = loaded("godwit.cli", "godwit.terminal", "godwit.vmm")
    assert not {name for name in found if name.startswith(("godwit.migration", "godwit.lab"))}


def test_a_guest_boots_without_the_code_for_other_nics() -> None:
    assert "godwit.nic.e1000.nic" not in loaded("godwit.cli", "godwit.terminal", "godwit.vmm")


def test_the_check_sees_what_is_loaded() -> None:
    assert "dataclasses" in loaded("godwit.lab.addresses")
