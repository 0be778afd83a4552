"""Debian programs for the lab's guest, with their libraries.

The kernel unpacks initramfs archives that stand one behind another in one file
(Documentation/driver-api/early-userspace/buffer-format.rst): the guest's own comes first, and is
not made bigger for the guests that need no such program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from .. import guest, initramfs
from ..agent import Agent
from ..errors import LabError
from ..kernels import Kernel

#: The guest's programs by the image's name; more than one name, for a small guest each.
IMAGES = {"keepalived": ("keepalived",), "radvd": ("radvd",)}
#: radvd looks up the user that it runs as.
_PASSWD = b"root:x:0:0:root:/:/bin/busybox\n"


def build(kernel: Kernel, name: str) -> Path:
    """Return the guest's initramfs with an image's programs, built if the cache has none.

    Raises:
        LabError: a program is missing.
    """
    files = {path: path for path in with_libraries(_found(one) for one in IMAGES[name])}
    return image(kernel, name, files)


def image(kernel: Kernel, name: str, files: Mapping[Path, Path]) -> Path:
    """Return the guest's initramfs with files behind it, built if the cache has none.

    ``files`` has the place in this machine for each place in the guest.
    """
    own = guest.build(kernel)
    facts = [
        (str(place), source.stat().st_size, source.stat().st_mtime_ns)
        for place, source in files.items()
    ]
    key = initramfs.digest(own.name.encode(), _PASSWD, repr(facts).encode())

    def write(target: Path) -> None:
        archive = initramfs.Archive()
        for folder in _folders([*files, Path("/etc/x"), Path("/run/x"), Path("/var/run/x")]):
            archive.directory(folder)
        archive.file("etc/passwd", _PASSWD)
        for place, source in files.items():
            archive.file(str(place).lstrip("/"), source.read_bytes(), 0o755)
        target.write_bytes(own.read_bytes() + archive.finish())

    return initramfs.cached_file(f"images/guest-{name}-{key}.cpio", write)


def prepare(agent: Agent) -> None:
    """Give eth0 the flags of an interface that ``ip link set up`` brought up.

    The guest's own init sets no flag but UP. Routing programs use no interface without MULTICAST.
    """
    agent.sh("ip link set eth0 multicast on")


def _found(program: str) -> Path:
    path = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise LabError(f"{program} is missing: run scripts/setup")
    return Path(path)


def with_libraries(programs: Iterable[Path], library_path: str = "") -> list[Path]:
    """Return the programs and the libraries that the dynamic linker finds for them (ldd(1)).

    Raises:
        LabError: a library is missing.
    """
    found: dict[Path, None] = {}
    env = {**os.environ, "LD_LIBRARY_PATH": library_path}
    for program in programs:
        found[program] = None
        argv = ["ldd", str(program)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if "not found" in line:
                raise LabError(f"{program}: {line.strip()}; run scripts/setup")
            words = [word for word in line.split() if word.startswith("/")]
            found.update(dict.fromkeys(map(Path, words)))
    return list(found)


def _folders(paths: Iterable[Path]) -> list[str]:
    """Return the folders of the paths, the outer ones first, without those of the guest's own."""
    found: dict[str, None] = {}
    for path in paths:
        parents = PurePosixPath(str(path).lstrip("/")).parents
        found.update(dict.fromkeys(str(parent) for parent in reversed(parents)))
    return [folder for folder in found if folder not in (".", "bin", "lib")]
