"""Debian's stock kernels, downloaded and unpacked into a cache, not installed.

A kernel is found through Debian's meta package (``linux-image-6.12-amd64`` and its like), which
depends on the package of the current build, so a new point release needs no change here. Once
unpacked, a kernel is used without asking apt again: a second run needs no network.
"""

import fcntl
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import LabError

#: Name -> Debian 12 meta package. The cloud kernels are the guests a user meets. The full one has
#: the lab host's 9p, and an e1000 driver.
META_PACKAGES = {
    "cloud-6.1": "linux-image-cloud-amd64",
    "cloud-6.12": "linux-image-6.12-cloud-amd64",
    "full-6.12": "linux-image-6.12-amd64",
}

Log = Callable[[str], None]


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel in the cache."""

    name: str
    release: str
    vmlinuz: Path
    modules: Path
    """``.../lib/modules/RELEASE``, with ``modules.dep``."""


def cache_dir() -> Path:
    """Return ``$GODWIT_CACHE``, else ``$XDG_CACHE_HOME/godwit``, else ``~/.cache/godwit``."""
    named = os.environ.get("GODWIT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "godwit"


@contextmanager
def cache_lock() -> Iterator[None]:
    """Lock the cache while something is added, so that two runs do not build the same."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(name: str) -> Kernel | None:
    """Return the kernel if it is unpacked already, else None.

    Raises:
        LabError: the name is unknown.
    """
    if name not in META_PACKAGES:
        raise LabError(f"unknown kernel {name!r}: choose one of {', '.join(META_PACKAGES)}")
    root = cache_dir() / "kernels" / name
    found = sorted(root.glob("boot/vmlinuz-*"))
    if not found:
        return None
    release = found[-1].name.removeprefix("vmlinuz-")
    modules = root / "lib/modules" / release
    if not (modules / "modules.dep").exists():
        return None
    return Kernel(name, release, found[-1], modules)


def get(name: str, log: Log = lambda _: None) -> Kernel:
    """Return the named kernel, downloaded and unpacked first if need be.

    Raises:
        LabError: the name is unknown, or apt cannot provide the kernel.
    """
    kernel = cached(name)
    if kernel is None:
        with cache_lock():
            kernel = cached(name) or _fetch(name, log)
    return kernel


#: Decompressors by the payload's first bytes (Documentation/arch/x86/boot.rst, payload_offset).
_PAYLOADS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4", b"\x1f\x8b": "gzip"}


def uncompressed(kernel: Kernel) -> Path:
    """Return the kernel's ELF image, unpacked once, or the bzImage where no program unpacks it.

    QEMU enters the image through its PVH note: an emulated CPU needs more than a second to unpack
    a bzImage.
    """
    target = kernel.vmlinuz.with_name(f"vmlinux-{kernel.release}")
    if target.exists():
        return target
    image = kernel.vmlinuz.read_bytes()
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    for magic, program in _PAYLOADS.items():
        if payload.startswith(magic) and shutil.which(program):
            # The payload's last four bytes are its unpacked length, which the tools grumble about.
            argv = [program, "-dc"]
            done = subprocess.run(argv, input=payload[:-4], capture_output=True, check=False)
            if done.returncode == 0 and done.stdout.startswith(b"\x7fELF"):
                scratch = target.with_name(f".{target.name}.{os.getpid()}")
                scratch.write_bytes(done.stdout)
                scratch.rename(target)
                return target
    return kernel.vmlinuz


def _run(argv: Sequence[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise LabError(
            f"{argv[0]} is missing: kernels come from Debian's archive, so this needs Debian 12 "
            "or newer (or put an unpacked kernel package into the cache by hand)"
        ) from error
    except subprocess.CalledProcessError as error:
        raise LabError(f"{' '.join(argv)} failed: {error.stderr.strip()[-400:]}") from error
    return done.stdout


def _image_package(meta: str) -> str | None:
    """Return the current build's package that a meta package names (None: apt has no lists)."""
    found = re.search(r"Depends: (linux-image-\S*\d\S*)", _run(["apt-cache", "depends", meta]))
    return found.group(1) if found else None


def _fetch(name: str, log: Log) -> Kernel:
    meta = META_PACKAGES[name]
    try:
        package = _image_package(meta)
    except LabError:
        package = None
    if package is None:
        log("apt-get update: the package lists do not name the kernel yet")
        _run(["apt-get", "-qq", "update"])
        package = _image_package(meta)
    if package is None:
        raise LabError(f"Debian's archive offers no {meta}: add bookworm's main and security")
    parent = cache_dir() / "kernels"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as scratch:
        work = Path(scratch)
        work.chmod(0o777)  # apt downloads as user _apt where it can
        log(f"downloading {package}")
        try:
            _run(["apt-get", "-qq", "download", package], cwd=work)
        except LabError:  # lists older than the archive's last point release
            _run(["apt-get", "-qq", "update"])
            package = _image_package(meta) or package
            _run(["apt-get", "-qq", "download", package], cwd=work)
        log(f"unpacking {package}")
        root = work / "root"
        _run(["dpkg-deb", "-x", str(next(work.glob("*.deb"))), str(root)])
        if not (root / "lib").exists():  # merged /usr: depmod looks below lib
            (root / "lib").symlink_to("usr/lib")
        _run(["depmod", "-b", str(root), next(root.glob("lib/modules/*")).name])
        target = parent / name
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
    kernel = cached(name)
    if kernel is None:
        raise LabError(f"{package} holds no boot/vmlinuz-* with its modules")
    return kernel
