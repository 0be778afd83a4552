"""The distribution as its users get it: the wheel, and an empty environment with it and msgspec."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_DEADLINE_S = 180.0


def build(folder: Path) -> Path:
    """Build the wheel of this tree into ``folder``, and return its path. No network is used."""
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    _run(argv)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment at ``folder``, and return the folder of its programs.

    msgspec, the only dependency, is lent by this environment: what else is here is not seen there.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    argv += ["--python", str(programs / "python"), "install", "--quiet", "--no-index", "--no-deps"]
    _run([*argv, str(wheel)])
    (site,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("platlib")).glob("msgspec*"):
        (site / path.name).symlink_to(path)
    return programs


def _run(argv: list[str]) -> None:
    done = subprocess.run(
        argv, cwd=_ROOT, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
