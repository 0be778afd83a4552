"""The emulated host: QEMU's AMD machine with SVM, and the command that starts QEMU.

The host boots Debian's full kernel with this machine's own files as its root: read only over 9p,
with a scratch layer on top that is gone afterwards. A job directory carries what to run in and the
exit status out. Inside, host_files/init and host_files/init2 do the rest.
"""

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import initramfs, kernels
from .errors import LabError

KERNEL = "full-6.12"
#: The CPU of the emulated host, one of QEMU's models of AMD CPUs.
CPU = "EPYC"
#: Modules loaded in three streams side by side. (The cloud kernel lacks 9p.)
MODULES = {
    "root": ("9pnet_virtio", "9p", "overlay"),
    "kvm": ("kvm_amd",),
    "net": ("vhost_net", "vhost_vsock", "tun", "veth", "bridge", "8021q"),
}
MARKER = "GODWIT_LAB"
"""Environment variable set for commands inside the emulated host."""

_QBOOT = Path("/usr/share/qemu/qboot.rom")
# rcu_expedited: tearing down bridges and namespaces waits for grace periods, which are slow here.
# isolcpus: no task runs on the first CPU (see qemu_argv).
# oops=panic, panic=-1 and -no-reboot: a kernel that breaks ends QEMU at once, without a result.
_CMDLINE = (
    "console=ttyS0 quiet loglevel=4 mitigations=off nokaslr tsc=reliable no_timer_check "
    "nowatchdog random.trust_cpu=on rcupdate.rcu_expedited=1 audit=0 apparmor=0 oops=panic "
    "panic=-1 cryptomgr.notests isolcpus=0"
)


@contextmanager
def job(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str], rw: Sequence[Path], first: str = ""
) -> Iterator[Path]:
    """Make the directory that the emulated host shares for one command.

    ``first`` is shell code that runs before the command.
    """
    given = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.environ.get("HOME", "/root"),
        "TERM": os.environ.get("TERM", "dumb"),
        "GODWIT_CACHE": str(kernels.cache_dir()),
        **env,
        MARKER: "1",
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in given.items())
    with tempfile.TemporaryDirectory(prefix="godwit-lab-") as name:
        directory = Path(name)
        (directory / "job").write_text(
            f"{first}{exports}cd {shlex.quote(str(cwd))} || exit 126\nexec {shlex.join(argv)}\n"
        )
        mounts = "".join(f"rw{i} {path.absolute()}\n" for i, path in enumerate(rw))
        (directory / "mounts").write_text(mounts)
        (directory / "modules").write_text(f"{kernels.get(KERNEL).modules}\n")
        shutil.copy(initramfs.DATA / "host_files/init2", directory)
        yield directory


def qemu_argv(
    directory: Path, rw: Sequence[Path], cpus: int, memory_mb: int, cpu: str = CPU
) -> list[str]:
    """Return QEMU's command line for a job, but for the device of its input and output.

    ``cpu``: the model of the emulated CPUs, and more of QEMU's features for them.

    Raises:
        LabError: QEMU is missing.
    """
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise LabError("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
    kernel = kernels.get(KERNEL)
    command = [program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-machine", "q35,hpet=off,smbus=off", "-accel", "tcg,thread=multi,tb-size=512"]
    # Without CMPXCHG16B: before QEMU 8.0, TCG leaves stale flags behind it (its helper reads a
    # condition-code state that was not written back), so that bits of a pointer could become TF, NT
    # or VM in the flags that an exit saves. Every slab allocation runs through it: guests crashed.
    command += ["-cpu", f"{cpu},+svm,+npt,-monitor,-cx16"]
    # One CPU more than asked for, the first, which runs no guest: whenever any CPU restores its
    # FPU, TCG clears a bit of the first one's flags, and may undo a change of its global interrupt
    # flag meanwhile (docs/decisions/0010-the-labs-faults.md).
    command += ["-smp", str(cpus + 1), "-m", f"{memory_mb}M"]
    command += ["-kernel", str(kernels.uncompressed(kernel)), "-initrd", str(_image(kernel))]
    if _QBOOT.exists():  # starts a kernel 0.2 s sooner than SeaBIOS
        command += ["-bios", str(_QBOOT)]
    command += ["-append", _CMDLINE, "-serial", f"file:{directory}/console.log"]
    command += ["-monitor", f"unix:{directory}/monitor,server=on,wait=off"]
    command += ["-device", "isa-debug-exit", "-device", "virtio-serial-pci"]
    shares = [("root", Path("/"), ",readonly=on"), ("job", directory, "")]
    shares += [(f"rw{i}", path.absolute(), "") for i, path in enumerate(rw)]
    for tag, path, more in shares:
        quoted = str(path).replace(",", ",,")
        options = f"local,path={quoted},mount_tag={tag},security_model=none,multidevs=remap{more}"
        command += ["-virtfs", options]
    return command


def _image(kernel: kernels.Kernel) -> Path:
    """Return the emulated host's initramfs, built once per kernel and content."""
    init = (initramfs.DATA / "host_files/init").read_bytes()
    keeper = initramfs.DATA / "host_files/keeper.c"
    parts = (init, keeper.read_bytes(), kernel.release.encode(), repr(MODULES).encode())

    def build(target: Path) -> None:
        archive = initramfs.Archive()
        archive.directory("bin", "dev", "proc", "sys", "root", "scratch", "modules")
        archive.console()
        archive.file("bin/busybox", initramfs.busybox(), 0o755)
        archive.file("bin/keeper", initramfs.compiled("keeper", [keeper]), 0o755)
        archive.file("init", init, 0o755)
        for stream, names in MODULES.items():
            orders = initramfs.load_orders(kernel, names).values()
            files = {initramfs.unpacked_name(path): path for order in orders for path in order}
            for name, path in files.items():
                archive.file(f"modules/{name}", initramfs.unpacked(path, signed=False))
            archive.file(f"modules/{stream}", "".join(f"{name}\n" for name in files).encode())
        target.write_bytes(archive.finish())

    return initramfs.cached_file(f"images/host-{initramfs.digest(*parts)}.cpio", build)
