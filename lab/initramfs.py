"""Building blocks of the lab's two initramfs images: cpio, kernel modules, static C programs."""

import hashlib
import lzma
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .errors import LabError
from .kernels import Kernel, cache_dir

#: Files of this package that end up inside the images.
DATA = Path(__file__).parent

#: The end of a signed module.
_SIGNED = b"~Module signature appended~\n"


class Archive:
    """A newc cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def _entry(
        self, name: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(path), 0)
        self._out += b"070701" + b"".join(b"%08X" % value for value in fields) + path
        self._out += bytes(-len(self._out) % 4)
        self._out += data
        self._out += bytes(-len(self._out) % 4)

    def directory(self, *names: str) -> None:
        for name in names:
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """Add ``/dev/console``, which the kernel opens for init before devtmpfs is mounted."""
        self._entry("dev/console", stat.S_IFCHR | 0o600, rdev=(5, 1))

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return bytes(self._out)


def load_orders(kernel: Kernel, names: Iterable[str]) -> dict[str, list[Path]]:
    """Return the files to load for each named module, in order, its own last.

    The list is empty for a module that is built in or that the kernel lacks: kernels differ in
    what is built in, and a caller that needs the function reports its lack better.
    """
    orders: dict[str, list[Path]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        module, _, needs = line.partition(":")
        # modules.dep lists the needs of a module so that the last has to be loaded first.
        paths = [kernel.modules / path for path in (*reversed(needs.split()), module)]
        orders[_stem(paths[-1])] = paths
    return {name: orders.get(name, []) for name in names}


def _stem(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def unpacked_name(path: Path) -> str:
    """Return the file name of an uncompressed module."""
    return path.name.removesuffix(".xz")


def unpacked(path: Path, *, signed: bool = True) -> bytes:
    """Return a module without its compression and, unless ``signed``, without its signature."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    if not signed and data.endswith(_SIGNED):
        # struct module_signature (include/linux/module_signature.h): its last field is the length.
        end = len(data) - len(_SIGNED)
        data = data[: end - 12 - int.from_bytes(data[end - 4 : end], "big")]
    return data


def busybox() -> bytes:
    """Return the static busybox of this machine.

    Raises:
        LabError: busybox is missing, or not static.
    """
    found = shutil.which("busybox")
    if found is None:
        raise LabError("busybox is missing: apt-get install busybox-static (or make setup)")
    data = Path(found).read_bytes()
    if b"ld-linux" in data[:4096]:
        raise LabError("busybox is not static: apt-get install busybox-static (or make setup)")
    return data


def compiled(name: str, sources: Sequence[Path]) -> bytes:
    """Return the bytes of a C program that :func:`program` compiles, for an archive."""
    return program(name, sources).read_bytes()


def program(name: str, sources: Sequence[Path]) -> Path:
    """Return the C program as a static executable, compiled once per content of its sources.

    Raises:
        LabError: gcc is missing, or refused the sources.
    """

    def build(target: Path) -> None:
        argv = ["gcc", "-Os", "-static", "-s", "-Wall", "-Wextra", "-pthread", "-o", str(target)]
        argv += [str(source) for source in sources if source.suffix == ".c"]
        try:
            subprocess.run(argv, check=True, capture_output=True)
        except FileNotFoundError as error:
            raise LabError("gcc is missing: apt-get install gcc libc6-dev") from error
        except subprocess.CalledProcessError as error:
            raise LabError(f"gcc, {name}: {error.stderr.decode(errors='replace')}") from error

    key = digest(*(source.read_bytes() for source in sources))
    return cached_file(f"bin/{name}-{key}", build)


def digest(*parts: bytes) -> str:
    """Return a short name for contents."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:16]


def cached_file(name: str, build: Callable[[Path], None]) -> Path:
    """Return the file of a name in the cache, which ``build`` makes as a whole if it is missing."""
    target = cache_dir() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            build(scratch)
            scratch.rename(target)
        finally:
            scratch.unlink(missing_ok=True)
    return target
