"""The wheel: the package alone, which runs with msgspec and nothing else."""

from __future__ import annotations

import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from godwit import __version__
from godwit.client.kvm import why_unusable
from tests import wheel

#: What the tests' own environment would lend to the wheel's program.
_EMPTY = {"PATH": "/usr/bin:/bin"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.install(built, tmp_path_factory.mktemp("empty") / "env")


def _run(programs: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [programs / argv[0], *argv[1:]],
        cwd=programs,
        env=_EMPTY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_holds_the_package_and_nothing_else(built: Path) -> None:
    assert built.name == f"godwit_vmm-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(built).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "godwit",
        f"godwit_vmm-{__version__}.dist-info",
    }
    rooms = {name.split("/")[1] for name in names if name.startswith("godwit/")}
    assert {"cli", "client", "vm", "machine", "py.typed"} <= rooms
    assert not rooms & {"lab", "testing", "tests", "fakes", "benchmarks"}
    assert not [name for name in names if name.endswith((".c", ".h", ".pyc"))]


def test_it_needs_msgspec_alone(built: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
    assert metadata["Name"] == "godwit-vmm"
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert [need.partition(">")[0] for need in needs] == ["msgspec"]


def test_the_environment_is_empty(programs: Path) -> None:
    for module in ("lab", "benchmarks", "tests", "rich", "qemu.qmp", "pytest"):
        done = _run(programs, "python", "-c", f"import {module}")
        assert "ModuleNotFoundError" in done.stderr, module


def test_all_of_it_is_importable_there(programs: Path) -> None:
    script = (
        "import importlib, pkgutil, godwit\n"
        "for found in pkgutil.walk_packages(godwit.__path__, 'godwit.'):\n"
        "    importlib.import_module(found.name)\n"
    )
    done = _run(programs, "python", "-c", script)
    assert done.returncode == 0, done.stderr


def test_the_command_runs_there(programs: Path, tmp_path: Path) -> None:
    assert _run(programs, "godwit", "--version").stdout == f"godwit {__version__}\n"
    assert "--incoming" in _run(programs, "godwit", "run", "--help").stdout
    done = _run(programs, "godwit", "migrate", "--qmp", f"{tmp_path}/none", "unix:/there")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"godwit: no VM answers on {tmp_path}/none: ")


def test_a_guest_without_a_kernel_is_refused(programs: Path, tmp_path: Path) -> None:
    done = _run(programs, "godwit", "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("godwit: nothing to run; give --kernel to boot")
    none = f"{tmp_path}/none"
    done = _run(programs, "godwit", "run", "--kernel", none, "--console", "none")
    assert (done.returncode, done.stdout) == (1, "")
    # KVM is asked first; tests/vm/test_wheel.py has the kernel's error wherever this runs.
    why = why_unusable()
    assert done.stderr.startswith("godwit: ")
    assert (none if why is None else why) in done.stderr
    assert done.stderr.count("\n") == 1
