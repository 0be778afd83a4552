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
    """What a new interpreter loads for ``modules``; lean is imported before the heavy ones."""
    heavy = set(modules) - {"godwit.cli.main", "godwit.cli.run"}
    script = _LOADED.format(
        first="import godwit.cli.fast_import" if heavy else "",
        imports="\n".join(f"import {module}" for module in modules),
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules",
    [
        ("godwit.cli.main",),
        ("godwit.cli.main", "godwit.cli.run", "godwit.vm.vm"),
        ("godwit.vm.vm", "godwit.migration.source", "godwit.migration.destination"),
        ("godwit.client.qmp", "godwit.client.kvm"),
        ("godwit.cli.main", "godwit.cli.migrate"),
    ],
    ids=["command line", "run", "move", "client", "migrate"],
)
def test_nothing_heavy_is_loaded(modules: tuple[str, ...]) -> None:
    found = loaded(*modules)
    assert set(modules) <= found
    assert found & HEAVY == set()


def test_a_guest_is_on_its_way_before_its_devices_are_imported() -> None:
    # The list of what it waits for: terminal imports all the rest after the early start.
    found = {name for name in loaded("godwit.cli.main", "godwit.cli.run") if "godwit" in name}
    modules = {name.removeprefix("godwit.") for name in found if name.count(".") > 1}
    assert {name for name in modules if not name.startswith(("host.", "spec."))} == {
        *("cli.keyboard", "cli.main", "cli.run", "cli.sandbox", "machine.board", "machine.vcpu"),
        *("hw.acpi", "hw.aml", "hw.boot", "hw.bus", "hw.console", "hw.layout", "hw.memory"),
        "hw.smbios",
    }
    assert {name for name in modules if name.startswith(("host.", "spec."))} == {
        *("host.ioctl", "host.kvm", "host.loop", "host.memory"),
        *("host.sandbox", "host.sandbox.landlock", "host.sandbox.privileges"),
        *("spec.back_ends", "spec.config", "spec.machine_types", "spec.restore", "spec.values"),
        *("host.kvm.abi", "host.kvm.cpuid", "host.kvm.handles", "host.kvm.probe"),
    }


def test_a_guest_boots_without_the_code_for_moving_it() -> None:
    # vmm imports it when the guest is on its way.
    found = loaded("godwit.cli.main", "godwit.cli.run", "godwit.vm.vm")
    assert not {name for name in found if name.startswith(("godwit.migration", "lab"))}


def test_a_guest_boots_without_the_code_for_other_nics() -> None:
    assert "godwit.hw.nic.e1000.nic" not in loaded(
        "godwit.cli.main", "godwit.cli.run", "godwit.vm.vm"
    )


def test_the_check_sees_what_is_loaded() -> None:
    assert "dataclasses" in loaded("lab.addresses")
