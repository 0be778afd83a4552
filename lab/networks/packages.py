"""Debian packages that are downloaded and unpacked into the cache, and not installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import LabError
from ..kernels import cache_dir, cache_lock

#: memtest86+ would put itself into this machine's boot menu.
PACKAGES = ("memtest86+",)


def unpacked(package: str, needs: bool = False) -> Path:
    """Return the root of an unpacked package, downloaded first if the cache has none.

    With ``needs``, the packages that the package needs and this machine lacks are in there, too.

    Raises:
        LabError: apt cannot provide the package.
    """
    target = cache_dir() / "packages" / package
    if target.exists():
        return target
    with cache_lock():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{package}-") as scratch:
            work = Path(scratch)
            work.chmod(0o777)  # apt downloads as user _apt where it can
            if needs:
                (work / "partial").mkdir()
                argv = ["apt-get", "-qq", "-y", "--no-install-recommends", "--download-only"]
                argv += ["-o", f"Dir::Cache::archives={work}", "install", package]
            else:
                argv = ["apt-get", "-qq", "download", package]
            _run(argv, work)
            for archive in work.glob("*.deb"):
                _run(["dpkg-deb", "-x", str(archive), str(work / "root")], work)
            shutil.rmtree(target, ignore_errors=True)
            (work / "root").rename(target)
    return target


def _run(argv: list[str], cwd: Path) -> None:
    try:
        subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is missing: this needs Debian 12 or newer") from error
    except subprocess.CalledProcessError as error:
        raise LabError(f"{' '.join(argv)}: {error.stderr.strip()[-400:]}") from error
